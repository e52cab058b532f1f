"""The kernel of `gelu.py`, in Triton. Import it only where triton is installed."""

# ruff: noqa: N803  (upper case marks what is known when a kernel is compiled)

from __future__ import annotations

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
PEAK = tl.constexpr(0.3989422804014327)
"""Of the density of the standard normal distribution."""


@triton.jit(do_not_specialize=["tokens", "rows"])
def gelu_backward_kernel(
    grad, x, gelu, grad_x, sums, tokens, rows, channels, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """A run of tokens, in a block of their channels.

    Args:
        grad, x: [tokens, channels], contiguous.
        gelu, grad_x: Written; as x.
        sums: Written; float32 [programs of axis 1, channels], of the rounded `grad_x` over the program's tokens.
        tokens, channels: Of the map.
        rows: Tokens of a program; int32 holds them.
        BLOCK_ROWS, BLOCK_COLUMNS: Tokens and channels that are taken at a time; powers of two.
    """
    first = tl.program_id(1).to(tl.int64) * rows
    count = tl.minimum(tokens - first, rows).to(tl.int32)
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    block = first * channels + (row[:, None] * channels + column[None, :])
    # One sum for each number of a block: threads then add to each other's once, at the end.
    total = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    for done in range(0, count, BLOCK_ROWS):
        valid = (row < count - done)[:, None] & (column < channels)[None, :]
        value = tl.load(x + block, mask=valid, other=0.0).to(tl.float32)
        slope = tl.load(grad + block, mask=valid, other=0.0).to(tl.float32)
        below = 0.5 + 0.5 * tl.math.erf(value * SQRT_HALF)  # the distribution at x
        density = PEAK * tl.exp(-0.5 * value * value)
        rounded = (slope * (below + value * density)).to(grad_x.dtype.element_ty)
        tl.store(gelu + block, (value * below).to(gelu.dtype.element_ty), mask=valid)
        tl.store(grad_x + block, rounded, mask=valid)
        total += rounded.to(tl.float32)
        block += BLOCK_ROWS * channels
    tl.store(sums + tl.program_id(1).to(tl.int64) * channels + column, tl.sum(total, 0), mask=column < channels)
