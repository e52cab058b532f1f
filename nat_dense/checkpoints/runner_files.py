"""Routes mmengine's loading (`load_from`, `resume`, testing, `init_cfg` of other modules) and saving through ours.

By itself, mmengine admits `getattr` in its files, and runs whatever code a file contains if reading it as data fails; a
run that is killed while saving leaves a partial file. Resuming needs a few real objects from the training state: the
loss history and NumPy's arrays and numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from nat_dense.checkpoints.download import fetch
from nat_dense.checkpoints.reading import is_safetensors, read, read_torch
from nat_dense.files import atomic


def _statistic(owner: type, name: str) -> Callable:
    """Stands in for `getattr` in these files: gives the loss history's own statistics by name, and nothing else."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise ValueError(f"it asks for attribute {name!r} of {owner!r}")
    return getattr(HistoryBuffer, name)


_SCALAR: Any = np.float64(0).__reduce__()[0]
_RECONSTRUCT: Any = np.zeros(0).__reduce__()[0]
_NUMBERS = ("bool", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64")
ADMITTED: tuple[tuple[Callable, str], ...] = (
    (HistoryBuffer, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_statistic, "builtins.getattr"),
    (np.ndarray, "numpy.ndarray"),
    (np.dtype, "numpy.dtype"),
    *((type(np.dtype(name)), f"numpy.dtypes.{type(np.dtype(name)).__name__}") for name in _NUMBERS),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
)
"""What a training state may restore besides tensors and plain values, with its name in the file."""


def load_from_nat_dense(filename: str, map_location: Any = None, *, trust: bool = False) -> Any:
    """A loader for mmengine: reads the whole content of a file, as data.

    Args:
        filename: A PyTorch or safetensors file, its URL, or the name of a published checkpoint.
        map_location: As in `torch.load`.
        trust: As in `reading.read`.

    Returns:
        The content of the file; for safetensors, its tensors under "state_dict".

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is corrupt, or needs code to be run.
    """
    path = fetch(filename)
    if path.is_dir() or is_safetensors(path):
        return {"state_dict": read(path, trust=trust).tensors}
    # Not mapped: training may write to the file from which it resumed.
    return read_torch(path, trust=trust, admit=ADMITTED, map_location=map_location, mapped=False)


class AtomicBackend(LocalBackend):
    """mmengine's local file backend; binary files (checkpoints) are written completely or not at all.

    mmengine removes the checkpoint that a new one replaces before it writes the new one, so a run that is
    killed in between may be left with none. Here it is removed once the new one exists.
    """

    _replaced: ClassVar[set[Path]] = set()

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes bytes to a file; creates its folder if needed."""
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as part:
            part.write_bytes(obj)
        path = path.absolute()
        for old in [old for old in self._replaced if old.parent == path.parent]:  # others are another run's
            self._replaced.remove(old)
            if old != path:
                old.unlink(missing_ok=True)

    def remove(self, filepath: str | Path) -> None:
        """Removes a file; a checkpoint only after the next one has been written."""
        if Path(filepath).suffix == ".pth" and Path(filepath).is_file():
            self._replaced.add(Path(filepath).absolute())
        else:
            super().remove(filepath)


def install(*, trust: bool = False) -> None:
    """Makes mmengine load files and URLs through `load_from_nat_dense`, and save atomically, from now on.

    Args:
        trust: Whether the files that it loads may run code.
    """
    # mmengine logs the name of its loader, which a partial function doesn't have.
    loader = update_wrapper(partial(load_from_nat_dense, trust=trust), load_from_nat_dense)
    for prefix in ("", "http://", "https://"):
        CheckpointLoader.register_scheme(prefix, loader, force=True)
    register_backend("local", AtomicBackend, force=True, prefixes="")
