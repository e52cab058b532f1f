"""The two functions of old NATTEN that transformers calls, written down again from their definition.

They share no code with the package: the windows are found by listing each token's dilated group. Differentiable.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

import torch
from torch import Tensor


def windows(length: int, kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """By token of an axis: the tokens it attends to, and where in the bias' axis each of them is; [length, kernel]."""
    tokens, offsets = [], []
    for i in range(length):
        group = [t for t in range(length) if t % dilation == i % dilation]
        place = group.index(i)
        start = min(max(place - kernel_size // 2, 0), len(group) - kernel_size)
        if start < 0:
            raise ValueError(f"{length} tokens have no window of {kernel_size} with dilation {dilation}")
        tokens.append(group[start : start + kernel_size])
        offsets.append([start + j - place + kernel_size - 1 for j in range(kernel_size)])
    return torch.tensor(tokens), torch.tensor(offsets)


def _neighbours(tokens: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """[B, heads, H, W, D] -> [B, heads, H, W, kernel_size ** 2, D]."""
    rows, columns = (windows(n, kernel_size, dilation)[0] for n in tokens.shape[2:4])
    found = tokens[:, :, rows[:, None, :, None], columns[None, :, None, :]]
    return found.flatten(4, 5)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Logits [B, heads, H, W, kernel_size ** 2] of a scaled query."""
    logits = (query.unsqueeze(-2) * _neighbours(key, kernel_size, dilation)).sum(-1)
    rows, columns = (windows(n, kernel_size, dilation)[1] for n in query.shape[2:4])
    return logits + rpb[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4)


def natten2dav(weights: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """[B, heads, H, W, D]."""
    return (weights.unsqueeze(-1) * _neighbours(value, kernel_size, dilation)).sum(-2)


def install() -> None:
    """Makes transformers 4.57 believe that a NATTEN with these functions is there. Before it imports its NAT."""
    from transformers.utils import import_utils

    package, functional = ModuleType("natten"), ModuleType("natten.functional")
    package.__spec__ = importlib.machinery.ModuleSpec("natten", None)
    functional.natten2dqkrpb, functional.natten2dav = natten2dqkrpb, natten2dav
    package.functional = functional
    sys.modules |= {"natten": package, "natten.functional": functional}
    import_utils._natten_available = True
