"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TORCH_SUFFIXES = (".pth", ".pt", ".bin")


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


def check_suffix(path: str | Path) -> None:
    """Raises ValueError unless the name's ending chooses a format that `save` writes."""
    if Path(path).suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ValueError(f"{path}: expected a name that ends in .safetensors, {', '.join(TORCH_SUFFIXES)}")


def save(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    content: Mapping[str, Any] | None = None,
) -> None:
    """Writes tensors as safetensors or as a PyTorch file, by the name's ending, atomically.

    Args:
        tensors: By name.
        path: Ends in .safetensors, .pth, .pt or .bin.
        metadata: Text for the header of a safetensors file; transformers wants {"format": "pt"}.
        content: What a PyTorch file holds beside the tensors, which then go under "state_dict"; None for tensors alone.

    Raises:
        ValueError: The ending is another one.
        FileNotFoundError: The folder of `path` does not exist.
    """
    check_suffix(path)
    packed = _pack(tensors)
    with atomic(path) as part:
        if Path(path).suffix == ".safetensors":
            save_file(packed, part, {"format": "pt", **(metadata or {})})
        else:
            torch.save(packed if content is None else {**content, "state_dict": packed}, part)


def _pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies what is not a whole storage of its own: views would drag their base along, aliases can't be told apart."""
    packed: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        packed[name] = tensor if whole and tensor.data_ptr() not in seen else tensor.clone().contiguous()
        seen.add(tensor.data_ptr())
    return packed
