"""Attention in shifted windows as Swin has it: what the benchmarks compare neighborhood attention with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class SwinWindows:
    """Partition, shift, attention with a relative position bias, and the way back.

    Args:
        size: Height and width of the map in tokens; it is zero-padded to whole windows.
        window, shift: In tokens.
        fused: Through scaled_dot_product_attention with the bias as its mask, or in separate operations.

    Source: Swin Transformer (arXiv:2103.14030), section 3.2.
    """

    def __init__(self, size: tuple[int, int], window: int, shift: int, fused: bool, device: str = "cpu"):
        self.size, self.window, self.shift, self.fused = size, window, shift, fused
        self.counts = tuple(-(-n // window) for n in size)
        height, width = (count * window for count in self.counts)
        place = torch.arange(window, device=device)
        offset = place[:, None] - place[None, :] + window - 1
        grid = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]
        self.entries = grid.reshape(window**2, window**2)
        region = [self._regions(n, device) for n in (height, width)]
        regions = self._partition((region[0][:, None] * 3 + region[1][None, :])[None, ..., None, None])[:, 0, :, 0]
        apart = regions[:, None, :] != regions[:, :, None]  # tokens that the shift brought together
        self.mask = torch.zeros(apart.shape, device=device).masked_fill_(apart, -100.0)[:, None]  # [windows, 1, T, T]

    def _regions(self, length: int, device: str) -> Tensor:
        place = torch.arange(length, device=device)
        return (place >= length - self.window).long() + (place >= length - self.shift).long()

    def _partition(self, tokens: Tensor) -> Tensor:
        """[B, H, W, heads, dim] -> [B * windows, heads, window * window, dim]."""
        batch, (rows, columns), side = len(tokens), self.counts, self.window
        tokens = tokens.view(batch, rows, side, columns, side, *tokens.shape[3:])
        return tokens.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)

    def _reverse(self, tokens: Tensor) -> Tensor:
        (rows, columns), side = self.counts, self.window
        tokens = tokens.unflatten(2, (side, side)).unflatten(0, (-1, rows, columns))
        return tokens.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)

    def __call__(self, qkv: Tensor, rpb: Tensor) -> Tensor:
        """[B, H, W, 3, heads, dim] and [heads, 2 * window - 1, 2 * window - 1] to [B, H, W, heads, dim]."""
        (height, width), side = self.size, self.window
        batch, heads, dim = len(qkv), *qkv.shape[4:]
        down, right = (count * side - n for count, n in zip(self.counts, self.size, strict=True))
        whole = F.pad(qkv.flatten(3), (0, 0, 0, right, 0, down))
        if self.shift:
            whole = whole.roll((-self.shift, -self.shift), (1, 2))
        query, key, value = (self._partition(t) for t in whole.unflatten(3, (3, heads, dim)).unbind(3))
        bias = rpb.flatten(1)[:, self.entries].to(qkv.dtype)  # [heads, T, T]
        if self.shift:
            bias = (bias + self.mask.to(qkv.dtype)).repeat(batch, 1, 1, 1)
        else:
            bias = bias.expand(len(query), -1, -1, -1)
        if self.fused:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        else:
            out = ((query * dim**-0.5) @ key.transpose(-2, -1) + bias).softmax(dim=-1) @ value
        out = self._reverse(out)
        if self.shift:
            out = out.roll((self.shift, self.shift), (1, 2))
        return out[:, :height, :width].contiguous()
