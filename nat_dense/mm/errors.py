"""How the command lines report a user's mistake, in one line without a traceback; and what is not logged."""

import itertools
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

import torch
from mmengine.logging import MMLogger

DEBUG_VARIABLE = "NAT_DENSE_DEBUG"
"""Set this environment variable to 1 to see the traceback of every error that a command line reports."""

PYTORCH = os.path.dirname(torch.__file__) + os.sep

IN_WORKER = "Original Traceback (most recent call last):"
"""What PyTorch writes before the traceback of an exception in a loader's worker, in the same message."""


@contextmanager
def one_line_errors(program: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Turns an exception of a kind, raised inside the block, into one line on stderr and exit status 2.

    Wrap what runs before the real work starts (reading the config, the checks, building the model): there, nearly every
    exception means that the input is wrong. What goes wrong later keeps its traceback.

    Args:
        program: the name the line starts with, such as "train.py".
        kind: what is reported this way; other exceptions pass.

    Raises:
        SystemExit: with status 2, if the block raised such an exception and `NAT_DENSE_DEBUG` is unset.
    """
    try:
        yield
    except kind as error:
        if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            raise
        print(f"{program}: error: {describe(error)}\n(traceback: {DEBUG_VARIABLE}=1)", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Puts the field or the option that names a file or a folder before the message of an OSError."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"{field}: {error}.") from error


@contextmanager
def at_least(level: int) -> Iterator[None]:
    """Lets MMEngine log only messages of this level and above inside the block."""
    logger = MMLogger.get_current_instance()
    usual = logger.level
    logger.setLevel(max(usual, level))  # `logging.disable` doesn't reach it once it has logged something
    try:
        yield
    finally:
        logger.setLevel(usual)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A sentence after a space that proposes the known name closest to a wrong one; empty if none is close."""
    close = get_close_matches(given, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def nearly(given: str, known: Iterable[str]) -> str | None:
    """The known name that a given one is so close to that it may be a misspelling, when nothing else shows it."""
    close = get_close_matches(given, list(known), n=1, cutoff=0.8)
    return close[0] if close else None


def describe(error: Exception) -> str:
    """The message of an exception as one readable line, with its type if the text alone says too little.

    If there is no message, the line of code that raised it. The same for what a loader's worker raised.
    """
    # str(KeyError("text")) is the repr of the text, quotes included.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if IN_WORKER in text:
        lines = text.rstrip().splitlines()
        last = max(i for i, line in enumerate(lines) if line.startswith('  File "'))  # and, deeper, its code
        message = itertools.dropwhile(lambda line: line.startswith("    "), lines[last + 1 :])
        name, _, text = "\n".join(message).partition(": ")
    else:
        name = type(error).__name__
    text = " ".join(text.split())
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    if not text:  # as in most assertions
        text = (_frames(error) or [("", "")])[-1][1]
    return f"{name}: {text}" if text else name


def place_of(error: Exception) -> str:
    """The file, line and code that raised an exception, or called PyTorch where it was raised; empty if unknown."""
    frames = _frames(error)
    outside = [frame for frame in frames if not frame[0].startswith(PYTORCH)] or frames
    return ": ".join(outside[-1]) if outside else ""


def _frames(error: Exception) -> list[tuple[str, str]]:
    """Places in files, and the lines of code there; the last one raised the exception."""
    if IN_WORKER in str(error):
        found = re.findall(r'File "(.+)", line (\d+), in .+(?:\n {4}(.*))?', str(error))
        return [(f"{file}:{line}", code.strip()) for file, line, code in found]
    frames = traceback.extract_tb(error.__traceback__)
    return [(f"{frame.filename}:{frame.lineno}", frame.line or "") for frame in frames]
