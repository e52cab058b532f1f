"""The forward kernel."""

# ruff: noqa: N803  (upper case marks what is known when a kernel is compiled)

from __future__ import annotations

import triton
import triton.language as tl

from nat_dense.ops.triton_kernels.common import (
    LOG2_E,
    bias_table,
    box,
    contiguous_strides,
    dot,
    first_key,
    key_block,
    load_tokens,
    moved,
    store_tokens,
    strips,
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
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    DILATED: tl.constexpr,
):
    """Attention of a tile of queries.

    Args:
        query, key, value: [B, H, W, heads, DIM] with unit stride in DIM; their strides are of the other four axes,
            those of values None where they are those of keys.
        bias: float32 [heads, 2 * rows - 1, 2 * columns - 1], contiguous, or None.
        pad_key, pad_value: [heads, DIM], contiguous; None where the map holds a window.
        out, lse: Written; [B, H, W, heads, DIM] and float32 [B, H, W, heads], contiguous.
        height, width, heads: Of the map; one by one, since Triton would compile for each size of a tuple's.
        tiles_h, tiles_w: Rows and columns of tiles over the largest group.
        scale: Of the products, times log2 e.
        KERNEL, TILE, STRIP, BLOCK: (rows, columns) of the window, of a program's queries, of a warp's queries and of
            the keys that a warp takes at a time.
        BINS: Powers of two, at least 16, that hold 2 * KERNEL - 1.
        PRECISION: Of products, see `dot`.
        OFFSET: See `token_pointers`.
        DILATED: Whether there is more than one dilation group.
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

    count: tl.constexpr = TILE[0] // STRIP[0]
    tokens: tl.constexpr = STRIP[0] * STRIP[1]
    largest = tl.full([count, tokens], float("-inf"), tl.float32)
    total = tl.full([count, tokens], 0.0, tl.float32)
    mixed = tl.full([count, tokens, BLOCK_D], 0.0, tl.float32)
    if bias is not None:
        table = bias_table(bias, head, KERNEL, BINS)
    else:
        table = None
    sources = ((key, pad_key, key_strides), (value, pad_value, value_strides))
    key_place = box(first_key(rows, first, members, KERNEL), BLOCK)
    for step_w in range(0, KERNEL[1] + STRIP[1] - 1, BLOCK[1]):
        for step_h in range(0, KERNEL[0] + STRIP[0] - 1, BLOCK[0]):
            corner = moved(first, (step_h, step_w))
            _, v, _, logits = key_block(
                q,
                queries,
                sources,
                owner,
                corner,
                key_place,
                table,
                scale,
                0.0,
                KERNEL,
                BINS,
                DIM,
                BLOCK_D,
                PRECISION,
                OFFSET,
                KEYS_TURNED=True,
            )
            larger = tl.maximum(largest, tl.max(logits, 2))
            shift = tl.where(larger == float("-inf"), 0.0, larger)  # no key of the window yet
            weights = tl.exp2(logits - shift[:, :, None])
            shrink = tl.exp2(largest - shift)
            total = total * shrink + tl.sum(weights, 2)
            mixed = mixed * shrink[:, :, None] + dot(weights.to(v.dtype), v, PRECISION)
            largest = larger

    if out.dtype.element_ty == tl.float32:
        mixed = mixed / total[:, :, None]
    else:  # one division for all channels: what it costs in exactness is less than the rounding that follows
        mixed = mixed * (1.0 / total)[:, :, None]
    out_pointers = token_pointers(out, owner, first, place, contiguous_strides(shape, DIM), OFFSET)
    store_tokens(out_pointers, valid, mixed, DIM, BLOCK_D)
    lse_pointers = token_pointers(lse, owner, first, place, contiguous_strides(shape, 1), OFFSET)
    tl.store(lse_pointers, (largest + tl.log2(total)) / LOG2_E, mask=valid)
