"""Writing files whole or not at all, and never over others unasked."""

from __future__ import annotations

import glob
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
    _remove_left_behind(path, suffix)
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


def _remove_left_behind(path: Path, suffix: str) -> None:
    """Removes what processes that were killed while they wrote this file have left of it."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*{suffix}"):
        process = part.name.removesuffix(suffix).rpartition(".")[2]
        if process.isdigit() and not _is_running(int(process)):
            part.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # where this signal is none
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or not known here
        return True
    return True


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


def check_empty_folder(path: Path) -> None:
    """Checks that a folder can be filled, or created where there is none; creates nothing.

    Raises:
        FileExistsError: there is a file, or a folder that holds something.
        PermissionError: it may not be written to, or not be created.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; name a folder, or none that exists")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"the folder {path} is not empty, and nothing is overwritten; name another")
    check_can_be_folder(path)


def check_can_be_folder(path: Path) -> None:
    """Checks that there is a folder that can be written to, or that it can be made; creates nothing.

    Raises:
        NotADirectoryError: it, or one that it would lie in, is a file.
        PermissionError: it, or the first that it would lie in, may not be written to.
    """
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{str(nearest)!r} is a file; choose a folder")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"no permission to write to {str(nearest)!r}; choose another folder")
