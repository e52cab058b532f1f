"""mmengine's own loading (`load_from`, `resume`, testing, `init_cfg` of other modules) and saving, through ours.

Left alone, mmengine admits `getattr` to its files, and runs whatever a file brings along when reading it as data
fails; a run that is killed while it saves leaves half a file. A training state needs a few real objects to resume:
the loss history and NumPy's arrays and numbers.
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
    """What `getattr` is in these files: the loss history's own statistics by name, and nothing else."""
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
"""What a training state may restore beyond tensors and plain values, under its name in the file."""


def load_from_nat_dense(filename: str, map_location: Any = None, *, trust: bool = False) -> Any:
    """A loader for mmengine: everything that a file holds, as data.

    Args:
        filename: A PyTorch or safetensors file, its URL, or the name of a published checkpoint.
        map_location: As in `torch.load`.
        trust: As in `reading.read`.

    Returns:
        What the file holds; of a safetensors file its tensors under "state_dict".

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or needs code to be run.
    """
    path = fetch(filename)
    if path.is_dir() or is_safetensors(path):
        return {"state_dict": read(path, trust=trust).tensors}
    # Not mapped: training may write to the file from which it resumed.
    return read_torch(path, trust=trust, admit=ADMITTED, map_location=map_location, mapped=False)


class AtomicBackend(LocalBackend):
    """mmengine's local files, of which binary ones (checkpoints) are written whole or not at all.

    mmengine removes the checkpoint that a new one replaces before it writes the new one, so that a run which ends
    between may be left with none. Here it is removed when the next one is there.
    """

    _replaced: ClassVar[set[Path]] = set()

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes bytes to a file; makes its folder where there is none."""
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as part:
            part.write_bytes(obj)
        self._replaced.discard(path.absolute())
        while self._replaced:
            self._replaced.pop().unlink(missing_ok=True)

    def remove(self, filepath: str | Path) -> None:
        """Removes a file; a checkpoint when the next one has been written."""
        if Path(filepath).suffix == ".pth" and Path(filepath).is_file():
            self._replaced.add(Path(filepath).absolute())
        else:
            super().remove(filepath)


def install(*, trust: bool = False) -> None:
    """Makes mmengine load files and URLs through `load_from_nat_dense`, and save atomically, from now on.

    Args:
        trust: Whether the files that it loads may run code.
    """
    # mmengine logs the name of its loader, which a partial function has not.
    loader = update_wrapper(partial(load_from_nat_dense, trust=trust), load_from_nat_dense)
    for prefix in ("", "http://", "https://"):
        CheckpointLoader.register_scheme(prefix, loader, force=True)
    register_backend("local", AtomicBackend, force=True, prefixes="")
