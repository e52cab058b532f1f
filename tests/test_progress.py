"""What the progress line writes, with a clock that the test moves."""

import io

import pytest

from nat_dense import progress
from nat_dense.progress import Board, ProgressLine, clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    time = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_lines_tell_steps_time_left_and_time_taken(now):
    stream = io.StringIO()
    line = ProgressLine("Counting", 10, board=Board(stream))
    for _ in range(10):
        now[0] += 3
        line.advance("loss 1")
    line.close()
    assert stream.getvalue().splitlines() == [
        "Counting: 1/10, 0:27 left  loss 1",
        "Counting: 5/10, 0:15 left  loss 1",
        "Counting: 9/10, 0:03 left  loss 1",
        "Counting: 10/10 in 0:30",
    ]


def test_lines_of_a_terminal_are_redrawn(now, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    board = Board(stream)
    lines = [ProgressLine(what, 4, board=board) for what in ("Counting", "Sorting")]
    for _ in range(4):
        now[0] += 1
        for line in lines:
            line.advance()
    for line in lines:
        line.close()
    text = stream.getvalue()
    assert all(f"Counting: {n}/4" in text and f"Sorting: {n}/4" in text for n in range(1, 5))
    assert "\x1b[1A" in text, "the cursor goes up to redraw"
    assert text.index("Counting: 4/4 in 0:04") < text.index("Sorting: 4/4 in 0:04")
    assert board.live is None


def test_what_is_quick_stays_silent(now):
    stream = io.StringIO()
    line = ProgressLine("Counting", 100, board=Board(stream))
    for _ in range(100):
        now[0] += 0.005
        line.advance()
    line.close()
    assert stream.getvalue() == ""


def test_steps_of_an_earlier_run_do_not_count_for_the_speed(now):
    stream = io.StringIO()
    line = ProgressLine("Training", 100, done=90, board=Board(stream))
    now[0] += 20
    line.advance(steps=2)
    line.close()
    assert stream.getvalue() == "Training: 92/100, 1:20 left\nTraining: 92/100 (2 of them in 0:20)\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text
