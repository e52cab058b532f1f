"""Writes files completely or not at all, and overwrites only when asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | Path, suffix: str = ".part") -> Iterator[Path]:
    """Yields a temporary file that replaces `path` if the block succeeds and is deleted if it fails.

    Args:
        path: The final file.
        suffix: Of the temporary file, for readers that need one.

    Raises:
        FileNotFoundError: The folder of `path` does not exist.
    """
    path = Path(path)
    check_folder(path)
    # In the same folder, since a rename is atomic only within a file system.
    part = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors makes files that only their owner can read
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """Raises FileNotFoundError or PermissionError unless the folder of `path` exists and is writable."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent}; can't create {path.name}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"no write permission in {path.parent}; can't create {path.name}")


def check_free(path: Path, overwrite: bool) -> None:
    """Raises FileExistsError or IsADirectoryError if `path` exists and may not be replaced."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name, or allow overwriting (overwrite=True, --overwrite)")


def make_empty_folder(path: Path) -> None:
    """Creates an empty folder, with its parents.

    Raises:
        FileExistsError: it is a file, or a folder that is not empty.
        OSError: it can't be created.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; give a folder that is empty or doesn't exist yet")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"the folder {path} is not empty, and nothing is overwritten; choose another")
    path.mkdir(parents=True, exist_ok=True)
