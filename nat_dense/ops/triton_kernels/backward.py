"""The two kernels of the backward pass. What an argument of the forward kernel means is explained there."""

# ruff: noqa: N803  (upper case marks what is known when a kernel is compiled)

from __future__ import annotations

import triton
import triton.language as tl

from nat_dense.ops.triton_kernels.common import (
    LOG2_E,
    bias_table,
    completed,
    contiguous_strides,
    dot,
    key_block,
    key_box,
    load_tokens,
    logits_of,
    places,
    store_tokens,
    tile_of_program,
    token_pointers,
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
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of queries, and the tile's part of those of the bias and the padded token.

    Args:
        grad_out: Like `out`, with strides of its own.
        grad_query: Written; like `out`.
        stats: Written; float32 [B, H, W, heads, 2]: `lse` times log2 e, and the products of `grad_out` and `out`.
        bias_sums: Written; float32 [programs / heads, heads, 2 * rows - 1, 2 * columns - 1].
        pad_sums: Written; float32 [programs / heads, heads, 2, DIM], for the padded key and the padded value.
        grad_scale: The scale without log2 e.
    """
    shape = (height, width, heads)
    batch, head, group, members, first = tile_of_program(shape, dilation, (tiles_h, tiles_w), TILE)
    if (first[0] >= members[0]) | (first[1] >= members[1]):
        return
    queries = places(first, TILE)
    valid = within(queries, members)
    q_pointers = token_pointers(query, batch, head, group, first, TILE, dilation, query_strides)
    q = load_tokens(q_pointers, valid, DIM, BLOCK_D)
    g_pointers = token_pointers(grad_out, batch, head, group, first, TILE, dilation, grad_out_strides)
    g = load_tokens(g_pointers, valid, DIM, BLOCK_D)
    out_pointers = token_pointers(out, batch, head, group, first, TILE, dilation, contiguous_strides(shape, DIM))
    d = tl.sum(g.to(tl.float32) * load_tokens(out_pointers, valid, DIM, BLOCK_D).to(tl.float32), 1)
    lse_pointers = token_pointers(lse, batch, head, group, first, TILE, dilation, contiguous_strides(shape, 1))
    log_sum = tl.load(lse_pointers, mask=valid, other=float("inf")) * LOG2_E  # beyond the group all weights are 0
    stats_pointers = token_pointers(stats, batch, head, group, first, TILE, dilation, contiguous_strides(shape, 2))
    tl.store(stats_pointers[:, None] + tl.arange(0, 2)[None, :], tl.join(log_sum, d), mask=valid[:, None])

    mixed = tl.full([TILE[0] * TILE[1], BLOCK_D], 0.0, tl.float32)
    sums = tl.full([BINS[0], BINS[1]], 0.0, tl.float32)
    padded_weight = tl.full([TILE[0] * TILE[1]], 0.0, tl.float32)
    padded_grad = tl.full([TILE[0] * TILE[1]], 0.0, tl.float32)
    if bias is not None:
        table = bias_table(bias, head, KERNEL, BINS)
    else:
        table = None
    sources = ((key, pad_key, key_strides), (value, pad_value, value_strides))
    owner = (batch, head, group, members, dilation)
    low, end = key_box(first, members, KERNEL, TILE)
    for block_w in range(low[1], end[1], BLOCK[1]):
        for block_h in range(low[0], end[0], BLOCK[0]):
            corner = (block_h, block_w)
            k, v, real, logits = key_block(
                q,
                queries,
                sources,
                owner,
                corner,
                table,
                scale,
                log_sum[:, None],
                KERNEL,
                BLOCK,
                BINS,
                DIM,
                BLOCK_D,
                PRECISION,
            )
            weights = tl.exp2(logits)
            grad_logits = weights * (dot(g, tl.trans(v), PRECISION) - d[:, None])
            rounded = grad_logits.to(k.dtype)
            mixed += dot(rounded, k, PRECISION)
            if bias is not None:
                bin_h, bin_w = block_h - first[0] + KERNEL[0] - 1, block_w - first[1] + KERNEL[1] - 1
                sums += sums_by_offset(rounded, bin_h, bin_w, TILE, BLOCK, BINS, PRECISION)
            if pad_key is not None:
                padded_weight += tl.sum(tl.where(real[None, :], 0.0, weights), 1)
                padded_grad += tl.sum(tl.where(real[None, :], 0.0, grad_logits), 1)

    out_pointers = token_pointers(grad_query, batch, head, group, first, TILE, dilation, contiguous_strides(shape, DIM))
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
        tl.store(own, tl.sum(padded_grad[:, None] * q.to(tl.float32), 0) * grad_scale, mask=channel < DIM)
        tl.store(own + DIM, tl.sum(padded_weight[:, None] * g.to(tl.float32), 0), mask=channel < DIM)


@triton.jit
def sums_by_offset(
    pairs, bin_h, bin_w, TILE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, PRECISION: tl.constexpr
):
    """Sums over all pairs of a query and a key with the same offset between them: float32 [BINS rows, BINS columns].

    Products with matrices of zeros and ones do it: the first over columns, the second over rows.

    Args:
        pairs: [M, N], a value for each query of a tile and each key of a block.
        bin_h, bin_w: Where the first key for the first query goes.
    """
    rows: tl.constexpr = TILE[0] * BLOCK[0]
    columns: tl.constexpr = TILE[1] * BLOCK[1]
    pairs = tl.permute(tl.reshape(pairs, [TILE[0], TILE[1], BLOCK[0], BLOCK[1]]), [0, 2, 1, 3])
    column = tl.arange(0, columns)
    to_bin_w = (bin_w + column % BLOCK[1] - column // BLOCK[1])[:, None] == tl.arange(0, BINS[1])[None, :]
    to_bin_w = tl.where(to_bin_w, 1.0, 0.0).to(pairs.dtype)
    by_column = dot(tl.reshape(pairs, [rows, columns]), to_bin_w, PRECISION)
    row = tl.arange(0, rows)
    to_bin_h = tl.arange(0, BINS[0])[:, None] == (bin_h + row % BLOCK[0] - row // BLOCK[0])[None, :]
    return dot(tl.where(to_bin_h, 1.0, 0.0), by_column, PRECISION)


@triton.jit
def viewers(first, last, members, full, KERNEL: tl.constexpr):
    """First query, and the one after the last, whose windows on one axis meet keys first..last of a group.

    Args:
        members, full: Tokens of the group without and with its padded ones.
    """
    low = tl.where(first < KERNEL, 0, first - KERNEL // 2)
    end = tl.where(last >= full - KERNEL, members, last + KERNEL // 2 + 1)
    return low, end


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
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of keys and of their values.

    Args:
        grad_key, grad_value: Written; [B, H, W, heads, DIM], contiguous.
        TILE, BLOCK: (rows, columns) of a program's keys and of the queries taken at a time.
    """
    shape = (height, width, heads)
    batch, head, group, members, first = tile_of_program(shape, dilation, (tiles_h, tiles_w), TILE)
    if (first[0] >= members[0]) | (first[1] >= members[1]):
        return
    keys = places(first, TILE)
    valid = within(keys, members)
    k_pointers = token_pointers(key, batch, head, group, first, TILE, dilation, key_strides)
    k = load_tokens(k_pointers, valid, DIM, BLOCK_D)
    v_pointers = token_pointers(value, batch, head, group, first, TILE, dilation, value_strides)
    v = load_tokens(v_pointers, valid, DIM, BLOCK_D)

    grad_k = tl.full([TILE[0] * TILE[1], BLOCK_D], 0.0, tl.float32)
    grad_v = tl.full([TILE[0] * TILE[1], BLOCK_D], 0.0, tl.float32)
    if bias is not None:
        table = bias_table(bias, head, KERNEL, BINS)
    else:
        table = None
    full = completed(members, KERNEL)
    last_h, last_w = tl.minimum(first[0] + TILE[0], members[0]) - 1, tl.minimum(first[1] + TILE[1], members[1]) - 1
    low_h, end_h = viewers(first[0], last_h, members[0], full[0], KERNEL[0])
    low_w, end_w = viewers(first[1], last_w, members[1], full[1], KERNEL[1])
    for block_w in range(low_w, end_w, BLOCK[1]):
        for block_h in range(low_h, end_h, BLOCK[0]):
            corner = (block_h, block_w)
            queries = places(corner, BLOCK)
            real = within(queries, members)
            q_pointers = token_pointers(query, batch, head, group, corner, BLOCK, dilation, query_strides)
            q = load_tokens(q_pointers, real, DIM, BLOCK_D)
            g_pointers = token_pointers(grad_out, batch, head, group, corner, BLOCK, dilation, grad_out_strides)
            g = load_tokens(g_pointers, real, DIM, BLOCK_D)
            stats_pointers = token_pointers(
                stats, batch, head, group, corner, BLOCK, dilation, contiguous_strides(shape, 2)
            )
            pairs = tl.load(stats_pointers[:, None] + tl.arange(0, 2)[None, :], mask=real[:, None], other=0.0)
            log_sum, d = tl.split(pairs)
            log_sum = tl.where(real, log_sum, float("inf"))  # beyond the group all weights are 0
            logits = logits_of(
                dot(k, tl.trans(q), PRECISION),
                (keys[0][:, None], keys[1][:, None]),
                (queries[0][None, :], queries[1][None, :]),
                members,
                table,
                scale,
                log_sum[None, :],
                KERNEL,
                BINS,
            )
            weights = tl.exp2(logits)
            grad_v += dot(weights.to(g.dtype), g, PRECISION)
            grad_logits = weights * (dot(v, tl.trans(g), PRECISION) - d[None, :])
            grad_k += dot(grad_logits.to(q.dtype), q, PRECISION)

    k_pointers = token_pointers(grad_key, batch, head, group, first, TILE, dilation, contiguous_strides(shape, DIM))
    store_tokens(k_pointers, valid, grad_k * grad_scale, DIM, BLOCK_D)
    v_pointers = token_pointers(grad_value, batch, head, group, first, TILE, dilation, contiguous_strides(shape, DIM))
    store_tokens(v_pointers, valid, grad_v, DIM, BLOCK_D)
