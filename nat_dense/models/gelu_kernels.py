"""The kernels of `gelu.py`, in Triton. Import them only where triton is installed."""

# ruff: noqa: N803  (upper case marks what is known when a kernel is compiled)

from __future__ import annotations

import triton
import triton.language as tl

from nat_dense.ops.triton_kernels.common import dot

MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
PEAK = tl.constexpr(0.3989422804014327)
"""Of the density of the standard normal distribution."""


@triton.jit
def normal(x):
    """The distribution function and the density of the standard normal distribution at float32 x.

    One exponential serves both: the distribution at -a is exp(-a * a / 2) * t * P(t) with t = 1 / (1 + 0.26421142 a).
    P was fitted by us to a relative error of 6e-7 for a from 0 to 14 (Lawson's iteration, degree 6). An error function
    and an exponential are twice the instructions, and these bound both kernels.
    """
    bell = tl.exp2(x * x * MINUS_HALF_LOG2_E)
    t = tl.rsqrt(1.0 + 0.26421142257968677 * tl.abs(x))
    t = t * t  # two instructions for the nine of a division
    p = 0.20133230391953608 - t * 0.068862738834805
    p = t * p - 0.07365161014665644
    p = t * p + 0.14698593093071047
    p = t * p + 0.08113445456935522
    p = t * p + 0.10779540400120342
    p = t * p + 0.1052660487144158
    tail = bell * (t * p)
    return tl.where(x < 0, tail, 1.0 - tail), bell * PEAK


@triton.jit(do_not_specialize=["tokens"])
def linear_gelu_kernel(
    x,
    weight,
    bias,
    before,
    gelu,
    tokens,
    channels,
    depth,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some tokens of a linear layer and of its GELU, in a block of their channels.

    Args:
        x: [tokens, depth], contiguous.
        weight: [channels, depth], contiguous.
        bias: [channels].
        before: Written, where it isn't None; [tokens, channels], contiguous: the linear layer.
        gelu: Written; as `before`.
        BLOCK: Tokens and channels of a program, and the channels of x that it takes at a time; powers of two.
        EVEN: Whether blocks divide `channels` and `depth`.
        PRECISION: Of products, see `dot`.
    """
    blocks = tl.cdiv(channels, BLOCK[1])
    program = tl.program_id(0)  # neighbours have the same tokens, of which then one reading reaches memory
    first = (program // blocks).to(tl.int64) * BLOCK[0]
    row = tl.arange(0, BLOCK[0])
    column = program % blocks * BLOCK[1] + tl.arange(0, BLOCK[1])
    step = tl.arange(0, BLOCK[2])
    on_map = (row < tl.minimum(tokens - first, BLOCK[0]).to(tl.int32))[:, None]
    x_block = x + first * depth + (row[:, None] * depth + step[None, :])
    weight_block = weight + (step[:, None] + column[None, :] * depth)
    total = tl.full([BLOCK[0], BLOCK[1]], 0.0, tl.float32)
    for done in range(0, depth, BLOCK[2]):
        if EVEN:
            x_tile = tl.load(x_block, mask=on_map, other=0.0)
            weight_tile = tl.load(weight_block)
        else:
            left = step < depth - done
            x_tile = tl.load(x_block, mask=on_map & left[None, :], other=0.0)
            weight_tile = tl.load(weight_block, mask=left[:, None] & (column < channels)[None, :], other=0.0)
        total += dot(x_tile, weight_tile, PRECISION)
        x_block += BLOCK[2]
        weight_block += BLOCK[2]
    total += tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)[None, :]
    rounded = total.to(gelu.dtype.element_ty)
    place = first * channels + (row[:, None] * channels + column[None, :])
    if EVEN:
        valid = on_map
    else:
        valid = on_map & (column < channels)[None, :]
    if before is not None:
        tl.store(before + place, rounded, mask=valid)
    value = rounded.to(tl.float32)
    below, _ = normal(value)
    tl.store(gelu + place, (value * below).to(gelu.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["tokens", "rows"])
def gelu_backward_kernel(
    grad, x, gelu, grad_x, sums, tokens, rows, channels, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """A run of tokens, in a block of their channels.

    Args:
        grad, x: [tokens, channels], contiguous.
        gelu, grad_x: Written; as x.
        sums: Written; float32 [programs of axis 1, channels]: over the program's tokens, of `grad_x` before rounding.
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
        below, density = normal(value)
        slope *= below + value * density
        tl.store(gelu + block, (value * below).to(gelu.dtype.element_ty), mask=valid)
        tl.store(grad_x + block, slope.to(grad_x.dtype.element_ty), mask=valid)
        total += slope
        block += BLOCK_ROWS * channels
    tl.store(sums + tl.program_id(1).to(tl.int64) * channels + column, tl.sum(total, 0), mask=column < channels)
