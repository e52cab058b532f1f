"""What the operator is asked to do, as data: the thing that back ends accept or decline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """One call of the operator, without its data.

    Attributes:
        size: Height and width of the map in tokens.
        kernel_size: Window in tokens (rows, columns); odd, > 1.
        dilation: Distance of neighbouring window tokens (rows, columns).
        head_dim: Channels of one head.
        dtype: Of query, key and value.
        device: `torch.device.type` of the inputs.
        has_rpb: Whether a relative position bias is added.
        needs_grad: Whether a gradient will be asked for.
    """

    size: Pair
    kernel_size: Pair
    dilation: Pair
    head_dim: int
    dtype: torch.dtype
    device: str
    has_rpb: bool
    needs_grad: bool = False

    @classmethod
    def of(
        cls, query: Tensor, rpb: Tensor | None, kernel_size: Pair, dilation: Pair, needs_grad: bool = False
    ) -> Problem:
        return cls(
            size=(query.shape[1], query.shape[2]),
            kernel_size=kernel_size,
            dilation=dilation,
            head_dim=query.shape[4],
            dtype=query.dtype,
            device=query.device.type,
            has_rpb=rpb is not None,
            needs_grad=needs_grad,
        )

    @property
    def padded_size(self) -> Pair:
        """The map after completion on the right and bottom to at least one window per axis."""
        return completed_size(self.size, self.kernel_size, self.dilation)

    @property
    def is_padded(self) -> bool:
        return self.padded_size != self.size


def completed_size(size: Pair, kernel_size: Pair, dilation: Pair) -> Pair:
    """Smallest map (rows, columns) that holds `size` and one dilated window per axis."""
    return max(size[0], kernel_size[0] * dilation[0]), max(size[1], kernel_size[1] * dilation[1])


def why_no_gpu() -> str | None:
    """Why nothing runs on a GPU here, or None where torch sees one."""
    return None if torch.cuda.is_available() else "torch sees no GPU (torch.cuda.is_available() is False)"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on such a device, or None where it is off."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax and sums run in this type: at least float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32
