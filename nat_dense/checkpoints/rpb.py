"""Resizes relative position biases to another kernel size."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resize_rpb(rpb: Tensor, kernel_size: int) -> Tensor:
    """Interpolates relative position biases bicubically to another kernel size.

    The offsets of both kernels span the same window, as they do where a larger kernel sees a larger image. The
    published 11x11 weights were initialised from 7x7 ones this way. Whether the authors aligned the corners is not
    known; here they are not aligned.

    Args:
        rpb: [heads, 2 k - 1, 2 k - 1], any floating dtype.
        kernel_size: Of the result; odd, >= 3.

    Returns:
        [heads, 2 kernel_size - 1, 2 kernel_size - 1], in the same dtype.

    Raises:
        ValueError: `rpb` is not square per head, or the kernel size is out of range.

    Source: DiNAT (arXiv:2209.15001), the note on 11x11 models.
    """
    if rpb.dim() != 3 or rpb.shape[1] != rpb.shape[2] or rpb.shape[1] % 2 == 0:
        raise ValueError(f"rpb of shape {tuple(rpb.shape)}: expected [heads, 2k - 1, 2k - 1]")
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: expected an odd number >= 3")
    side = 2 * kernel_size - 1
    if rpb.shape[1] == side:
        return rpb
    return F.interpolate(rpb[None].float(), size=(side, side), mode="bicubic", align_corners=False)[0].to(rpb.dtype)
