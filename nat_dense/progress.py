"""One line that says how far something is and when it will be done."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

T = TypeVar("T")


class Board:
    """Where progress lines are shown: redrawn in place on a terminal, else written one after the other.

    Args:
        stream: Where to write; stderr when None.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.in_place = self.stream.isatty()
        self.texts: dict[ProgressLine, str] = {}
        self.live: Live | None = None

    def show(self, line: ProgressLine, text: str) -> None:
        """Replaces what is shown of a line; where nothing can be redrawn, writes it below."""
        if not self.in_place:
            self._write(text)
            return
        self.texts[line] = text
        if self.live is None:
            console = Console(file=self.stream)
            self.live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self.live.start()
        self.live.update(Text("\n".join(self.texts.values())), refresh=True)

    def end(self, line: ProgressLine, text: str) -> None:
        """Writes a line for good, above those that go on."""
        self.texts.pop(line, None)
        if self.live is None:
            self._write(text)
            return
        self.live.update(Text("\n".join(self.texts.values())))
        self.live.console.print(Text(text))
        if not self.texts:
            self.live.transient = True  # nothing is left to show
            self.live.stop()
            self.live = None

    def _write(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()


class ProgressLine:
    """Counts steps and shows them with the time that is left: redrawn on a terminal, else every ten seconds.

    Nothing is shown of what takes less than a second.

    Args:
        what: What is being done, such as "Drawing pictures".
        total: Steps.
        done: Steps that were done before, in an earlier run; they don't count for the speed.
        board: Where to show it; lines of what runs at once share one. Its own, on stderr, when None.
    """

    def __init__(self, what: str, total: int, done: int = 0, board: Board | None = None) -> None:
        self.what, self.total, self.done = what, total, done
        self.before = done
        self.board = board or Board()
        self.interval = 0.2 if self.board.in_place else 10.0
        self.start = time.monotonic()
        self.shown: float | None = None

    def advance(self, note: str = "", steps: int = 1) -> None:
        """Counts steps; `note` is shown behind them."""
        self.done += steps
        now = time.monotonic()
        if now - (self.shown or self.start + 1 - self.interval) >= self.interval:
            self.shown = now
            self.board.show(self, self._text(now, note))

    def close(self, note: str = "") -> None:
        """Writes the last state, with the time that the steps of this line took."""
        if self.shown is not None:
            taken = f"in {clock(time.monotonic() - self.start)}"
            if self.before:
                taken = f"({self.done - self.before} of them {taken})"
            self.board.end(self, f"{self.what}: {self.done}/{self.total} {taken}{_spaced(note)}")

    def _text(self, now: float, note: str) -> str:
        elapsed = now - self.start
        left = elapsed / max(1, self.done - self.before) * (self.total - self.done)
        return f"{self.what}: {self.done}/{self.total}, {clock(left)} left{_spaced(note)}"


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yields the items and shows a ProgressLine while they are worked on."""
    line = ProgressLine(what, total)
    for item in items:
        yield item
        line.advance()
    line.close()


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _spaced(note: str) -> str:
    return f"  {note}" if note else ""
