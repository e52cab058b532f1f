"""The kernels of `add_norm.py`, in Triton. Import them only where triton is installed."""

# ruff: noqa: N803  (upper case marks what is known when a kernel is compiled)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def run_of_program(per_sample, run):
    """The sample of a run of tokens, its first token, and how many it has: as many as `run` or what is left."""
    runs = tl.cdiv(per_sample, run)
    sample = tl.program_id(0) // runs
    done = tl.program_id(0) % runs * run
    return sample, sample.to(tl.int64) * per_sample + done, tl.minimum(per_sample - done, run)


@triton.jit
def of_channels(values, column, channels):
    """What each channel has: float32 [1, columns]."""
    return tl.load(values + column, mask=column < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["per_sample"])
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
    per_sample,
    channels,
    per_channel,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Some tokens with all their channels.

    Args:
        x: [tokens, channels], contiguous.
        branch: As x, or None: then `total` is None, and the norm is that of x.
        bias, scale: [channels] or None.
        factor: [samples] or None.
        weight, norm_bias: [channels].
        total, normed: Written; as x.
        stats: Written; float32 [tokens, 2]: the mean and the reciprocal of the deviation.
        per_sample: Tokens of a sample; int32 holds them.
        per_channel: 1 / channels.
        BLOCK_ROWS, BLOCK_COLUMNS: Tokens of a program, and their channels or more; powers of two.
        EVEN: Whether there are BLOCK_COLUMNS channels.
    """
    sample, first, count = run_of_program(per_sample, BLOCK_ROWS)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)
    on_map = row < count
    if EVEN:
        valid = on_map
    else:
        valid = on_map & (column < channels)[None, :]
    place = first * channels + (row * channels + column[None, :])
    value = tl.load(x + place, mask=valid, other=0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + place, mask=valid, other=0.0).to(tl.float32)
        if bias is not None:
            added += of_channels(bias, column, channels)
        if scale is not None:
            added *= of_channels(scale, column, channels)
        if factor is not None:
            added *= tl.load(factor + sample).to(tl.float32)
        rounded = (value + added).to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=valid)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 1)[:, None] * per_channel
    centered = value - mean
    if not EVEN:
        centered = tl.where((column < channels)[None, :], centered, 0.0)
    reciprocal = tl.rsqrt(tl.sum(centered * centered, 1)[:, None] * per_channel + eps)
    place_of_stats = stats + (first + row) * 2
    tl.store(place_of_stats, mean, mask=on_map)
    tl.store(place_of_stats + 1, reciprocal, mask=on_map)
    value = centered * reciprocal * of_channels(weight, column, channels)
    value += of_channels(norm_bias, column, channels)
    tl.store(normed + place, value.to(normed.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["per_sample", "run"])
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
    per_sample,
    run,
    channels,
    per_channel,
    SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A run of tokens with all their channels.

    Args:
        grad_total: [tokens, channels], contiguous, or None where the forward kernel had no branch.
        grad_normed, total: [tokens, channels], contiguous.
        stats: As the forward kernel writes them.
        branch: None where there is no scale.
        bias, scale, factor, weight: As in the forward kernel.
        grad_x: Written; as `total`.
        grad_branch: Written; as `total`, or None with `grad_total`.
        sums: Written; float32 [programs, SUMS, channels], over the program's tokens: the gradients of the norm's weight
            and bias, of `bias` where there is one, of `scale` where there is one.
        run: Tokens of a program, or fewer at the end of a sample; a multiple of BLOCK_ROWS.
        per_sample, per_channel, BLOCK_ROWS, BLOCK_COLUMNS, EVEN: As in the forward kernel.
    """
    sample, first, count = run_of_program(per_sample, run)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)
    place = first * channels + (row * channels + column[None, :])
    place_of_stats = first * 2 + row * 2
    weights = of_channels(weight, column, channels)
    if factor is not None:
        kept = tl.load(factor + sample).to(tl.float32)
    # One sum for each number of a block: threads then add to each other's once, at the end.
    of_weight = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    of_norm_bias = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    of_bias = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    of_scale = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    for done in range(0, count, BLOCK_ROWS):
        on_map = row < count - done
        if EVEN:
            valid = on_map
        else:
            valid = on_map & (column < channels)[None, :]
        value = tl.load(total + place, mask=valid, other=0.0).to(tl.float32)
        slope = tl.load(grad_normed + place, mask=valid, other=0.0).to(tl.float32)
        mean = tl.load(stats + place_of_stats, mask=on_map, other=0.0)
        reciprocal = tl.load(stats + place_of_stats + 1, mask=on_map, other=0.0)
        value = (value - mean) * reciprocal
        of_norm_bias += slope
        of_weight += slope * value
        slope *= weights
        along_one = tl.sum(slope, 1)[:, None] * per_channel
        along_value = tl.sum(slope * value, 1)[:, None] * per_channel
        grad = (slope - along_one - value * along_value) * reciprocal
        if grad_total is not None:
            grad += tl.load(grad_total + place, mask=valid, other=0.0).to(tl.float32)
        tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=valid)
        if grad_branch is not None:
            if factor is not None:
                grad *= kept
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
        place_of_stats += BLOCK_ROWS * 2
    inside = column < channels
    place_of_sums = sums + tl.program_id(0).to(tl.int64) * SUMS * channels + column
    tl.store(place_of_sums, tl.sum(of_weight, 0), mask=inside)
    tl.store(place_of_sums + channels, tl.sum(of_norm_bias, 0), mask=inside)
    if bias is not None:
        tl.store(place_of_sums + 2 * channels, tl.sum(of_bias, 0), mask=inside)
    if scale is not None:
        tl.store(place_of_sums + (SUMS - 1) * channels, tl.sum(of_scale, 0), mask=inside)
