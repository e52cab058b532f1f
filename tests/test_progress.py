"""What the progress line writes, with a clock that the test moves."""

import io

import pytest

from nat_dense import progress
from nat_dense.progress import ProgressLine, clock


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
    line = ProgressLine("Counting", 10, stream=stream)
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


def test_a_terminal_line_is_redrawn(now):
    stream = Terminal()
    line = ProgressLine("Counting", 4, stream=stream)
    for _ in range(4):
        now[0] += 1
        line.advance()
    line.close()
    assert stream.getvalue().count("\r") == 5
    assert stream.getvalue().endswith("Counting: 4/4 in 0:04   \n")


def test_what_is_quick_stays_silent(now):
    stream = io.StringIO()
    line = ProgressLine("Counting", 100, stream=stream)
    for _ in range(100):
        now[0] += 0.005
        line.advance()
    line.close()
    assert stream.getvalue() == ""


def test_steps_of_an_earlier_run_do_not_count_for_the_speed(now):
    stream = io.StringIO()
    line = ProgressLine("Training", 100, done=90, stream=stream)
    now[0] += 20
    line.advance(steps=2)
    assert stream.getvalue() == "Training: 92/100, 1:20 left\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text
