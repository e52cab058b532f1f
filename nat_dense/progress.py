"""One line that says how far something is and when it will be done."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar("T")


class ProgressLine:
    """Counts steps and shows them with the time that is left: redrawn in place on a terminal, else every ten seconds.

    Nothing is shown of what takes less than a second.

    Args:
        what: What is being done, such as "Drawing pictures".
        total: Steps.
        done: Steps that were done before, in an earlier run; they don't count for the speed.
        stream: Where to write; stderr when None.
    """

    def __init__(self, what: str, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self.what, self.total, self.done = what, total, done
        self.before = done
        self.stream = stream or sys.stderr
        self.in_place = self.stream.isatty()
        self.interval = 0.2 if self.in_place else 10.0
        self.start = time.monotonic()
        self.shown: float | None = None
        self.width = 0

    def advance(self, note: str = "", steps: int = 1) -> None:
        """Counts steps; `note` is shown behind them."""
        self.done += steps
        now = time.monotonic()
        if now - (self.shown or self.start + 1 - self.interval) >= self.interval:
            self.shown = now
            self._write(self._text(now, note), end=False)

    def close(self, note: str = "") -> None:
        """Writes the last state, with the time it took."""
        if self.shown is not None:
            seconds = time.monotonic() - self.start
            self._write(f"{self.what}: {self.done}/{self.total} in {clock(seconds)}{_spaced(note)}", end=True)

    def _text(self, now: float, note: str) -> str:
        elapsed = now - self.start
        left = elapsed / max(1, self.done - self.before) * (self.total - self.done)
        return f"{self.what}: {self.done}/{self.total}, {clock(left)} left{_spaced(note)}"

    def _write(self, text: str, end: bool) -> None:
        if self.in_place:
            self.stream.write("\r" + text.ljust(self.width) + ("\n" if end else ""))
            self.width = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()


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
