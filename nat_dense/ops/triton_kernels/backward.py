"""The two kernels of the backward pass. What an argument of the forward kernel means is explained there."""

# ruff: noqa: N803  (upper case marks what is known when a kernel is compiled)

from __future__ import annotations

import triton
import triton.language as tl

from nat_dense.ops.triton_kernels.common import (
    LOG2_E,
    bias_table,
    box,
    completed,
    contiguous_strides,
    dot,
    first_key,
    key_block,
    load_tokens,
    logits_of,
    moved,
    store_tokens,
    strips,
    tile_of_program,
    token_pointers,
    turned,
    within,
)


@triton.jit(do_not_specialize=["height", "width", "heads", "tiles_h", "tiles_w"])
def query_gradient_kernel(
    grad_out,
    query,
    key,
    value,
    bias,
    pad_key,
    pad_value,
    out,
    lse,
    grad_query,
    stats,
    bias_sums,
    pad_sums,
    grad_out_strides,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    height,
    width,
    heads,
    dilation,
    tiles_h,
    tiles_w,
    scale,
    grad_scale,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    DILATED: tl.constexpr,
):
    """Gradients of a tile of queries, and the tile's part of those of the bias and the padded token.

    Args:
        grad_out: Like `out`, with strides of its own.
        grad_query: Written; [B, H, W, heads, DIM] with strides of its own.
        stats: Written; float32 [B, H, W, heads, 2]: `lse` times log2 e, and the products of `grad_out` and `out`.
        bias_sums: Written; float32 [programs / heads, heads, 2 * rows - 1, 2 * columns - 1].
        pad_sums: Written; float32 [programs / heads, heads, 2, DIM], for the padded key and the padded value.
        grad_scale: The scale without log2 e.
    """
    shape = (height, width, heads)
    batch, head, group, members, first = tile_of_program(shape, dilation, (tiles_h, tiles_w), TILE, DILATED)
    if (first[0] >= members[0]) | (first[1] >= members[1]):
        return
    if value_strides is None:
        value_strides = key_strides
    owner = (batch, head, group, members, dilation)
    rows = strips(TILE, STRIP)
    place = box((rows, 0), STRIP)
    queries = moved(place, first)
    valid = within(queries, members)
    q = load_tokens(token_pointers(query, owner, first, place, query_strides, OFFSET), valid, DIM, BLOCK_D)
    g = load_tokens(token_pointers(grad_out, owner, first, place, grad_out_strides, OFFSET), valid, DIM, BLOCK_D)
    dense = token_pointers(out, owner, first, place, contiguous_strides(shape, DIM), OFFSET)
    o = load_tokens(dense, valid, DIM, BLOCK_D).to(tl.float32)
    d = tl.sum(g.to(tl.float32) * o, 2)
    lse_pointers = token_pointers(lse, owner, first, place, contiguous_strides(shape, 1), OFFSET)
    log_sum = tl.load(lse_pointers, mask=valid, other=float("inf")) * LOG2_E  # beyond the group all weights are 0
    stats_pointers = token_pointers(stats, owner, first, place, contiguous_strides(shape, 2), OFFSET)
    both = tl.arange(0, 2)[None, None, :]
    tl.store(stats_pointers[:, :, None] + both, tl.join(log_sum, d), mask=valid[:, :, None])
    if pad_value is not None:
        # Products are taken relative to the padded token's: where that carries nearly all of the weight, they hardly
        # differ from `d`, and rounding would be a part of what is left.
        channels = tl.arange(0, BLOCK_D)
        padded = tl.load(pad_value + head * DIM + channels, mask=channels < DIM, other=0.0)
        d = tl.sum(g.to(tl.float32) * (o - padded.to(tl.float32)[None, None, :]), 2)

    count: tl.constexpr = TILE[0] // STRIP[0]
    tokens: tl.constexpr = STRIP[0] * STRIP[1]
    mixed = tl.full([count, tokens, BLOCK_D], 0.0, tl.float32)
    sums = tl.full([BINS[0], BINS[1]], 0.0, tl.float32)
    padded_weight = tl.full([count, tokens], 0.0, tl.float32)
    padded_grad = tl.full([count, tokens], 0.0, tl.float32)
    if bias is not None:
        table = bias_table(bias, head, KERNEL, BINS)
    else:
        table = None
    sources = ((key, pad_key, key_strides), (value, pad_value, value_strides))
    key_place = box(first_key(rows, first, members, KERNEL), BLOCK)
    for step_w in range(0, KERNEL[1] + STRIP[1] - 1, BLOCK[1]):
        for step_h in range(0, KERNEL[0] + STRIP[0] - 1, BLOCK[0]):
            corner = moved(first, (step_h, step_w))
            k, v, real, logits = key_block(
                q,
                queries,
                sources,
                owner,
                corner,
                key_place,
                table,
                scale,
                log_sum[:, :, None],
                KERNEL,
                BINS,
                DIM,
                BLOCK_D,
                PRECISION,
                OFFSET,
                KEYS_TURNED=False,
            )
            weights = tl.exp2(logits)
            if pad_value is not None:
                v = v - padded[None, :, None]
            grad_logits = weights * (dot(g, v, PRECISION) - d[:, :, None])
            rounded = grad_logits.to(k.dtype)
            mixed += dot(rounded, k, PRECISION)
            if bias is not None:
                sums += sums_by_offset(
                    rounded, first, members, (step_h, step_w), KERNEL, TILE, STRIP, BLOCK, BINS, PRECISION
                )
            if pad_key is not None:
                padded_weight += tl.sum(tl.where(real[:, None, :], 0.0, weights), 2)
                padded_grad += tl.sum(tl.where(real[:, None, :], 0.0, grad_logits), 2)

    out_pointers = token_pointers(grad_query, owner, first, place, grad_strides, OFFSET)
    store_tokens(out_pointers, valid, mixed * grad_scale, DIM, BLOCK_D)
    program = tl.program_id(0).to(tl.int64)
    if bias is not None:
        bin_h, bin_w = tl.arange(0, BINS[0])[:, None], tl.arange(0, BINS[1])[None, :]
        heights: tl.constexpr = 2 * KERNEL[0] - 1
        widths: tl.constexpr = 2 * KERNEL[1] - 1
        own = bias_sums + program * heights * widths
        tl.store(own + bin_h * widths + bin_w, sums, mask=(bin_h < heights) & (bin_w < widths))
    if pad_key is not None:
        channel = tl.arange(0, BLOCK_D)
        own = pad_sums + program * 2 * DIM + channel
        tl.store(own, weighted_sum(q, padded_grad) * grad_scale, mask=channel < DIM)
        tl.store(own + DIM, weighted_sum(g, padded_weight), mask=channel < DIM)


@triton.jit
def weighted_sum(tokens, weights):
    """Over all tokens [strips, n, channels], of which each has a weight: [channels]."""
    return tl.sum(tl.sum(weights[:, :, None] * tokens.to(tl.float32), 1), 0)


@triton.jit
def sums_by_offset(
    pairs,
    first,
    members,
    step,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over all pairs of a query and a key with the same offset between them: float32 [BINS rows, BINS columns].

    Products with matrices of zeros and ones do it: the first over columns, the second over rows.

    Args:
        pairs: [strips, M, N], a value for each query of a strip and each key of its block.
        first: Place of the tile's first query.
        step: From the first key that a strip sees to the first of the block.
    """
    count: tl.constexpr = TILE[0] // STRIP[0]
    rows: tl.constexpr = STRIP[0] * BLOCK[0]
    columns: tl.constexpr = STRIP[1] * BLOCK[1]
    pairs = tl.reshape(pairs, [count, STRIP[0], STRIP[1], BLOCK[0], BLOCK[1]])
    pairs = tl.reshape(tl.permute(pairs, [0, 1, 3, 2, 4]), [count * rows, columns])
    row, column = tl.arange(0, count * rows), tl.arange(0, columns)
    query_h = row // rows * STRIP[0]
    low_h, low_w = first_key(query_h, first, members, KERNEL)
    row_bin = low_h + step[0] + row % BLOCK[0] - query_h - row % rows // BLOCK[0] + KERNEL[0] - 1
    column_bin = low_w + step[1] + column % BLOCK[1] - column // BLOCK[1] + KERNEL[1] - 1
    to_bin_w = tl.where(column_bin[:, None] == tl.arange(0, BINS[1])[None, :], 1.0, 0.0).to(pairs.dtype)
    by_column = dot(pairs, to_bin_w, PRECISION)
    if count * rows < 16:  # a product sums over no fewer
        twice = tl.permute(tl.join(by_column, tl.zeros_like(by_column)), [2, 0, 1])
        by_column = tl.reshape(twice, [2 * count * rows, BINS[1]])
        row_bin = tl.reshape(tl.permute(tl.join(row_bin, row_bin), [1, 0]), [2 * count * rows])
    to_bin_h = tl.arange(0, BINS[0])[:, None] == row_bin[None, :]
    return dot(tl.where(to_bin_h, 1.0, 0.0), by_column, PRECISION)


@triton.jit
def first_viewer(place, KERNEL: tl.constexpr):
    """First query on one axis whose window meets the keys from a place on."""
    return tl.where(place < KERNEL, 0, place - KERNEL // 2)


@triton.jit
def last_viewer(place, members, full, KERNEL: tl.constexpr):
    """Last query on one axis whose window meets the keys up to a place.

    Args:
        members, full: Tokens of the group without and with its padded ones.
    """
    return tl.where(place >= full - KERNEL, members - 1, place + KERNEL // 2)


@triton.jit
def most_rows(first, members, full, KERNEL: tl.constexpr, TILE: tl.constexpr, STRIP: tl.constexpr):
    """Rows of queries that the windows of a tile's strip of keys come from, in the strip with the most."""
    most = 0
    for strip in tl.static_range(TILE[0] // STRIP[0]):
        key = first + strip * STRIP[0]
        last = tl.minimum(key + STRIP[0], members) - 1
        rows = last_viewer(last, members, full, KERNEL[0]) + 1 - first_viewer(key, KERNEL[0])
        most = tl.maximum(most, rows)
    return most


@triton.jit(do_not_specialize=["height", "width", "heads", "tiles_h", "tiles_w"])
def key_gradient_kernel(
    grad_out,
    query,
    key,
    value,
    bias,
    stats,
    grad_key,
    grad_value,
    grad_out_strides,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    height,
    width,
    heads,
    dilation,
    tiles_h,
    tiles_w,
    scale,
    grad_scale,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    DILATED: tl.constexpr,
):
    """Gradients of a tile of keys and of their values.

    Args:
        grad_key, grad_value: Written; [B, H, W, heads, DIM] with the strides of `grad_strides`.
        TILE, STRIP, BLOCK: (rows, columns) of a program's keys, of a warp's keys and of the queries that a warp takes
            at a time.
    """
    shape = (height, width, heads)
    batch, head, group, members, first = tile_of_program(shape, dilation, (tiles_h, tiles_w), TILE, DILATED)
    if (first[0] >= members[0]) | (first[1] >= members[1]):
        return
    if value_strides is None:
        value_strides = key_strides
    owner = (batch, head, group, members, dilation)
    rows = strips(TILE, STRIP)
    place = box((rows, 0), STRIP)
    keys = moved(place, first)
    valid = within(keys, members)
    k = load_tokens(token_pointers(key, owner, first, place, key_strides, OFFSET), valid, DIM, BLOCK_D)
    v = load_tokens(token_pointers(value, owner, first, place, value_strides, OFFSET), valid, DIM, BLOCK_D)

    count: tl.constexpr = TILE[0] // STRIP[0]
    tokens: tl.constexpr = STRIP[0] * STRIP[1]
    grad_k = tl.full([count, tokens, BLOCK_D], 0.0, tl.float32)
    grad_v = tl.full([count, tokens, BLOCK_D], 0.0, tl.float32)
    if bias is not None:
        table = bias_table(bias, head, KERNEL, BINS)
    else:
        table = None
    full = completed(members, KERNEL)
    low_h = first_viewer(first[0] + rows, KERNEL[0]) - first[0]
    low_w = first_viewer(first[1], KERNEL[1]) - first[1]
    end_w = last_viewer(tl.minimum(first[1] + STRIP[1], members[1]) - 1, members[1], full[1], KERNEL[1]) + 1
    most_h = most_rows(first[0], members[0], full[0], KERNEL, TILE, STRIP)
    query_place = box((low_h, low_w), BLOCK)
    for step_w in range(0, end_w - first[1] - low_w, BLOCK[1]):
        for step_h in range(0, most_h, BLOCK[0]):
            corner = moved(first, (step_h, step_w))
            queries = moved(query_place, corner)
            real = within(queries, members)
            q_pointers = token_pointers(query, owner, corner, query_place, query_strides, OFFSET)
            q = load_tokens(q_pointers, real, DIM, BLOCK_D)
            g_pointers = token_pointers(grad_out, owner, corner, query_place, grad_out_strides, OFFSET)
            g = load_tokens(g_pointers, real, DIM, BLOCK_D)
            stats_pointers = token_pointers(stats, owner, corner, query_place, contiguous_strides(shape, 2), OFFSET)
            both = tl.arange(0, 2)[None, None, :]
            log_sum, d = tl.split(tl.load(stats_pointers[:, :, None] + both, mask=real[:, :, None], other=0.0))
            logits = logits_of(
                dot(k, turned(q), PRECISION),
                (keys[0][:, :, None], keys[1][:, :, None]),
                (queries[0][:, None, :], queries[1][:, None, :]),
                real[:, None, :],
                members,
                table,
                scale,
                log_sum[:, None, :],
                KERNEL,
                BINS,
            )
            weights = tl.exp2(logits)
            grad_v += dot(weights.to(g.dtype), g, PRECISION)
            grad_logits = weights * (dot(v, turned(g), PRECISION) - d[:, None, :])
            grad_k += dot(grad_logits.to(q.dtype), q, PRECISION)

    k_pointers = token_pointers(grad_key, owner, first, place, grad_strides, OFFSET)
    store_tokens(k_pointers, valid, grad_k * grad_scale, DIM, BLOCK_D)
    v_pointers = token_pointers(grad_value, owner, first, place, grad_strides, OFFSET)
    store_tokens(v_pointers, valid, grad_v, DIM, BLOCK_D)
