"""The kernels of `add_norm.py`, in Triton. Import them only where triton is installed."""

# ruff: noqa: N803  (upper case marks what is known when a kernel is compiled)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def factors(factor, first, row, valid, per_sample):
    """Of tokens `first + row`, each that of its sample: float32 [rows, 1]."""
    sample = first // per_sample
    within = (first - sample * per_sample).to(tl.int32) + row
    return tl.load(factor + sample + within // per_sample, mask=valid, other=0.0).to(tl.float32)[:, None]


@triton.jit
def of_channels(values, column, channels):
    """What each channel has: float32 [1, columns]."""
    return tl.load(values + column, mask=column < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["tokens", "per_sample"])
def add_norm_kernel(
    x,
    branch,
    bias,
    scale,
    factor,
    weight,
    norm_bias,
    total,
    normed,
    stats,
    tokens,
    per_sample,
    channels,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Some tokens with all their channels.

    Args:
        x, branch: [tokens, channels], contiguous.
        bias, scale: [channels] or None.
        factor: [samples] or None.
        weight, norm_bias: [channels].
        total, normed: Written; as x.
        stats: Written; float32 [tokens, 2]: the mean and the reciprocal of the deviation.
        per_sample: Tokens of a sample; int32 holds them.
        BLOCK_ROWS, BLOCK_COLUMNS: Tokens of a program, and their channels or more; powers of two.
        EVEN: Whether there are BLOCK_COLUMNS channels.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    on_map = row < tl.minimum(tokens - first, BLOCK_ROWS).to(tl.int32)
    if EVEN:
        valid = on_map[:, None]
    else:
        valid = on_map[:, None] & (column < channels)[None, :]
    place = first * channels + (row[:, None] * channels + column[None, :])
    value = tl.load(branch + place, mask=valid, other=0.0).to(tl.float32)
    if bias is not None:
        value += of_channels(bias, column, channels)
    if scale is not None:
        value *= of_channels(scale, column, channels)
    if factor is not None:
        value *= factors(factor, first, row, on_map, per_sample)
    rounded = (tl.load(x + place, mask=valid, other=0.0).to(tl.float32) + value).to(total.dtype.element_ty)
    tl.store(total + place, rounded, mask=valid)
    value = rounded.to(tl.float32)
    mean = tl.sum(value, 1) / channels
    centered = value - mean[:, None]
    if not EVEN:
        centered = tl.where((column < channels)[None, :], centered, 0.0)
    reciprocal = tl.rsqrt(tl.sum(centered * centered, 1) / channels + eps)
    place_of_stats = stats + (first + row) * 2
    tl.store(place_of_stats, mean, mask=on_map)
    tl.store(place_of_stats + 1, reciprocal, mask=on_map)
    value = centered * reciprocal[:, None] * of_channels(weight, column, channels)
    value += of_channels(norm_bias, column, channels)
    tl.store(normed + place, value.to(normed.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["tokens", "rows", "per_sample"])
def add_norm_backward_kernel(
    grad_total,
    grad_normed,
    total,
    stats,
    branch,
    bias,
    scale,
    factor,
    weight,
    grad_x,
    grad_branch,
    sums,
    tokens,
    rows,
    per_sample,
    channels,
    SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A run of tokens with all their channels.

    Args:
        grad_total, grad_normed, total: [tokens, channels], contiguous.
        stats: As the forward kernel writes them.
        branch: None where there is no scale.
        bias, scale, factor, weight: As in the forward kernel.
        grad_x, grad_branch: Written; as `total`.
        sums: Written; float32 [programs, SUMS, channels], over the program's tokens: the gradients of the norm's weight
            and bias, of `bias` where there is one, of `scale` where there is one.
        rows: Tokens of a program; int32 holds them.
        per_sample, BLOCK_ROWS, BLOCK_COLUMNS, EVEN: As in the forward kernel.
    """
    first = tl.program_id(0).to(tl.int64) * rows
    count = tl.minimum(tokens - first, rows).to(tl.int32)
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    place = first * channels + (row[:, None] * channels + column[None, :])
    weights = of_channels(weight, column, channels)
    # One sum for each number of a block: threads then add to each other's once, at the end.
    of_weight = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    of_norm_bias = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    of_bias = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    of_scale = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    for done in range(0, count, BLOCK_ROWS):
        on_map = row < count - done
        if EVEN:
            valid = on_map[:, None]
        else:
            valid = on_map[:, None] & (column < channels)[None, :]
        value = tl.load(total + place, mask=valid, other=0.0).to(tl.float32)
        slope = tl.load(grad_normed + place, mask=valid, other=0.0).to(tl.float32)
        grad = tl.load(grad_total + place, mask=valid, other=0.0).to(tl.float32)
        place_of_stats = stats + (first + done + row) * 2
        mean = tl.load(place_of_stats, mask=on_map, other=0.0)[:, None]
        reciprocal = tl.load(place_of_stats + 1, mask=on_map, other=0.0)[:, None]
        value = (value - mean) * reciprocal
        of_norm_bias += slope
        of_weight += slope * value
        slope *= weights
        along_one = tl.sum(slope, 1)[:, None] / channels
        along_value = tl.sum(slope * value, 1)[:, None] / channels
        grad += (slope - along_one - value * along_value) * reciprocal
        tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=valid)
        if factor is not None:
            grad *= factors(factor, first + done, row, on_map, per_sample)
        if scale is not None:
            added = tl.load(branch + place, mask=valid, other=0.0).to(tl.float32)
            if bias is not None:
                added += of_channels(bias, column, channels)
            of_scale += grad * added
            grad *= of_channels(scale, column, channels)
        if bias is not None:
            of_bias += grad
        tl.store(grad_branch + place, grad.to(grad_branch.dtype.element_ty), mask=valid)
        place += BLOCK_ROWS * channels
    inside = column < channels
    place_of_sums = sums + tl.program_id(0).to(tl.int64) * SUMS * channels + column
    tl.store(place_of_sums, tl.sum(of_weight, 0), mask=inside)
    tl.store(place_of_sums + channels, tl.sum(of_norm_bias, 0), mask=inside)
    if bias is not None:
        tl.store(place_of_sums + 2 * channels, tl.sum(of_bias, 0), mask=inside)
    if scale is not None:
        tl.store(place_of_sums + (SUMS - 1) * channels, tl.sum(of_scale, 0), mask=inside)
