"""How the command lines report a mistake of the user, in one line and without a traceback; and what stays unsaid."""

import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from mmengine.logging import MMLogger

DEBUG_VARIABLE = "NAT_DENSE_DEBUG"
"""Set this environment variable to 1 to see the traceback of every error that a command line reports."""


@contextmanager
def one_line_errors(program: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Turns an exception of a kind, raised inside the block, into one line on stderr and exit status 2.

    Wrap what runs before the real work starts (reading the config, the checks, building the model): there, nearly every
    exception means that the input is wrong. What goes wrong later keeps its traceback.

    Args:
        program: the name the line starts with, such as "train.py".
        kind: what is told so; other exceptions pass.

    Raises:
        SystemExit: with status 2, where the block raised such an exception and `NAT_DENSE_DEBUG` is unset.
    """
    try:
        yield
    except kind as error:
        if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            raise
        print(f"{program}: error: {describe(error)}\n(traceback: {DEBUG_VARIABLE}=1)", file=sys.stderr)
        raise SystemExit(2) from None


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
    """A sentence, a space before it, that proposes the known name nearest to a wrong one; empty if none is near."""
    close = get_close_matches(given, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def nearly(given: str, known: Iterable[str]) -> str | None:
    """The known name that a given one is so like that it may be that one, misspelt, where nothing else says so."""
    close = get_close_matches(given, list(known), n=1, cutoff=0.8)
    return close[0] if close else None


def describe(error: Exception) -> str:
    """The message of an exception as one readable line, with its type where the text alone says too little.

    Where there is no message, the line of code that raised it.
    """
    # str(KeyError("text")) is the repr of the text, quotes included.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    if not text and error.__traceback__:  # as of most assertions
        text = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
