"""Writes files completely or not at all, and overwrites only when asked."""

from __future__ import annotations

import glob
import os
import platform
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
    host = f".{path.name}.{platform.node()}-"
    part = path.with_name(f"{host}{os.getpid()}{suffix}")
    _remove_left_behind(path.parent, host, suffix)
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


def _remove_left_behind(folder: Path, start: str, suffix: str) -> None:
    """Removes the partial files of this machine's processes that were killed while they wrote such a file."""
    for part in folder.glob(f"{glob.escape(start)}*{suffix}"):
        process = part.name.removesuffix(suffix).removeprefix(start)
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


def check_empty_folder(path: Path) -> None:
    """Checks that a folder is empty and writable, or can be created; creates nothing.

    Raises:
        FileExistsError: it is a file, or a folder that is not empty.
        PermissionError: it can't be written to or created.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; give a folder that is empty or doesn't exist yet")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"the folder {path} is not empty, and nothing is overwritten; choose another")
    check_can_be_folder(path)


def check_can_be_folder(path: Path) -> None:
    """Checks that a folder is writable, or can be created; creates nothing.

    Raises:
        NotADirectoryError: it, or a parent, is a file.
        PermissionError: it, or the nearest parent that exists, is not writable.
    """
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{str(nearest)!r} is a file; choose a folder")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"no permission to write to {str(nearest)!r}; choose another folder")
