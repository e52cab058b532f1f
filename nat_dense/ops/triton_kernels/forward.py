"""The forward kernel."""

# ruff: noqa: N803  (upper case marks what is known when a kernel is compiled)

from __future__ import annotations

import triton
import triton.language as tl

from nat_dense.ops.triton_kernels.common import (
    LOG2_E,
    bias_table,
    contiguous_strides,
    dot,
    key_block,
    key_box,
    load_tokens,
    places,
    store_tokens,
    tile_of_program,
    token_pointers,
    within,
)


@triton.jit(do_not_specialize=["height", "width", "heads", "tiles_h", "tiles_w"])
def forward_kernel(
    query,
    key,
    value,
    bias,
    pad_key,
    pad_value,
    out,
    lse,
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
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of a tile of queries.

    Args:
        query, key, value: [B, H, W, heads, DIM] with unit stride in DIM; their strides are of the other four axes.
        bias: float32 [heads, 2 * rows - 1, 2 * columns - 1], contiguous, or None.
        pad_key, pad_value: [heads, DIM], contiguous; None where the map holds a window.
        out, lse: Written; [B, H, W, heads, DIM] and float32 [B, H, W, heads], contiguous.
        height, width, heads: Of the map; one by one, since Triton would compile for each size of a tuple's.
        tiles_h, tiles_w: Rows and columns of tiles over the largest group.
        scale: Of the products, times log2 e.
        KERNEL, TILE, BLOCK: (rows, columns) of the window, of a program's queries and of the keys taken at a time.
        BINS: Powers of two, at least 16, that hold 2 * KERNEL - 1.
        PRECISION: Of products, see `dot`.
    """
    shape = (height, width, heads)
    batch, head, group, members, first = tile_of_program(shape, dilation, (tiles_h, tiles_w), TILE)
    if (first[0] >= members[0]) | (first[1] >= members[1]):
        return
    queries = places(first, TILE)
    valid = within(queries, members)
    q_pointers = token_pointers(query, batch, head, group, first, TILE, dilation, query_strides)
    q = load_tokens(q_pointers, valid, DIM, BLOCK_D)

    largest = tl.full([TILE[0] * TILE[1]], float("-inf"), tl.float32)
    total = tl.full([TILE[0] * TILE[1]], 0.0, tl.float32)
    mixed = tl.full([TILE[0] * TILE[1], BLOCK_D], 0.0, tl.float32)
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
            _, v, _, logits = key_block(
                q, queries, sources, owner, corner, table, scale, 0.0, KERNEL, BLOCK, BINS, DIM, BLOCK_D, PRECISION
            )
            larger = tl.maximum(largest, tl.max(logits, 1))
            shift = tl.where(larger == float("-inf"), 0.0, larger)  # no key of the window yet
            weights = tl.exp2(logits - shift[:, None])
            shrink = tl.exp2(largest - shift)
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + dot(weights.to(v.dtype), v, PRECISION)
            largest = larger

    out_pointers = token_pointers(out, batch, head, group, first, TILE, dilation, contiguous_strides(shape, DIM))
    if out.dtype.element_ty == tl.float32:
        mixed = mixed / total[:, None]
    else:  # one division for all channels: what it costs in exactness is less than the rounding that follows
        mixed = mixed * (1.0 / total)[:, None]
    store_tokens(out_pointers, valid, mixed, DIM, BLOCK_D)
    lse_pointers = token_pointers(lse, batch, head, group, first, TILE, dilation, contiguous_strides(shape, 1))
    tl.store(lse_pointers, (largest + tl.log2(total)) / LOG2_E, mask=valid)
