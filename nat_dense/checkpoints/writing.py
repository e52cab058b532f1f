"""Writes tensors to a file in one of the known formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nat_dense.files import atomic

TORCH_SUFFIXES = (".pth", ".pt", ".bin")


def check_suffix(path: str | Path) -> None:
    """Raises ValueError unless the file name has a suffix that `save` supports."""
    if Path(path).suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ValueError(f"{path}: expected a name that ends in .safetensors, {', '.join(TORCH_SUFFIXES)}")


def save(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    content: Mapping[str, Any] | None = None,
) -> None:
    """Writes tensors atomically as a safetensors or PyTorch file, chosen by the file name's suffix.

    Args:
        tensors: By name.
        path: Ends in .safetensors, .pth, .pt or .bin.
        metadata: Text for the header of a safetensors file; transformers wants {"format": "pt"}.
        content: What else a PyTorch file holds; the tensors then go under "state_dict". None for only tensors.

    Raises:
        ValueError: The suffix is not supported.
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
    """Copies tensors that don't own a whole storage: views would save their base too, aliases can't be told apart."""
    packed: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        packed[name] = tensor if whole and tensor.data_ptr() not in seen else tensor.clone().contiguous()
        seen.add(tensor.data_ptr())
    return packed
