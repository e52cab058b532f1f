"""Writing files whole or not at all, and never over others unasked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | Path, suffix: str = ".part") -> Iterator[Path]:
    """A file to write to, which takes the place of `path` when the block ends well and vanishes when it doesn't.

    Args:
        path: The file to be.
        suffix: Of the file to write to, for readers that ask for one.

    Raises:
        FileNotFoundError: The folder of `path` does not exist.
    """
    path = Path(path)
    check_folder(path)
    # In the same folder, since a rename is atomic within a file system only.
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
    """Raises FileNotFoundError or PermissionError unless there is a folder for `path` that can be written to."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the folder {path.parent} may not be written to, so {path.name} can't be")


def check_free(path: Path, overwrite: bool) -> None:
    """Raises FileExistsError or IsADirectoryError where there is something that may not be replaced."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; name another, or allow to replace it (overwrite=True, --overwrite)")


def make_empty_folder(path: Path) -> None:
    """Creates a folder to fill, with those that it lies in.

    Raises:
        FileExistsError: there is a file, or a folder that holds something.
        OSError: it can't be created.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; name a folder, or none that exists")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"the folder {path} is not empty, and nothing is overwritten; name another")
    path.mkdir(parents=True, exist_ok=True)
