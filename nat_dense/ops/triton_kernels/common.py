"""What the kernels share: places, windows, loads and products."""

# ruff: noqa: N803  (upper case marks what is known when a kernel is compiled)

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_of_program(shape, dilation, tiles, TILE: tl.constexpr):
    """What this program works on.

    Heads vary fastest, then groups: programs that run at the same time share cache lines and a region of the map.

    Args:
        shape: H, W, heads.
        tiles: Rows and columns of tiles over the largest group.

    Returns:
        batch, head.
        group: First token of the dilation group.
        members: Rows and columns of tokens in the group.
        first: Place of the tile's first token; beyond `members` where this group has fewer tiles than the largest.
    """
    groups_h, groups_w = tl.minimum(dilation[0], shape[0]), tl.minimum(dilation[1], shape[1])
    rest = tl.program_id(0)
    head = rest % shape[2]
    rest = rest // shape[2]
    group_w = rest % groups_w
    rest = rest // groups_w
    group_h = rest % groups_h
    rest = rest // groups_h
    tile_w = rest % tiles[1]
    rest = rest // tiles[1]
    tile_h = rest % tiles[0]
    members = (tl.cdiv(shape[0] - group_h, dilation[0]), tl.cdiv(shape[1] - group_w, dilation[1]))
    return rest // tiles[0], head, (group_h, group_w), members, (tile_h * TILE[0], tile_w * TILE[1])


@triton.jit
def places(first, BOX: tl.constexpr):
    """Rows and columns of a box's tokens, each int32 [BOX rows * BOX columns]."""
    index = tl.arange(0, BOX[0] * BOX[1])
    return first[0] + index // BOX[1], first[1] + index % BOX[1]


@triton.jit
def within(place, members):
    """Which places are in the group, and so on the map."""
    return (place[0] < members[0]) & (place[1] < members[1])


@triton.jit
def completed(members, KERNEL: tl.constexpr):
    """Rows and columns of a group with its padded tokens."""
    return tl.maximum(members[0], KERNEL[0]), tl.maximum(members[1], KERNEL[1])


@triton.jit
def window_start(place, members, KERNEL: tl.constexpr):
    """First place of a query's window on one axis of a completed group."""
    return tl.minimum(tl.maximum(place - KERNEL // 2, 0), members - KERNEL)


@triton.jit
def key_box(first, members, KERNEL: tl.constexpr, TILE: tl.constexpr):
    """First place, and the one after the last, of the keys in the windows of a tile of queries."""
    full = completed(members, KERNEL)
    last_h = tl.minimum(first[0] + TILE[0], members[0]) - 1
    last_w = tl.minimum(first[1] + TILE[1], members[1]) - 1
    low = (window_start(first[0], full[0], KERNEL[0]), window_start(first[1], full[1], KERNEL[1]))
    end_h = window_start(last_h, full[0], KERNEL[0]) + KERNEL[0]
    end_w = window_start(last_w, full[1], KERNEL[1]) + KERNEL[1]
    return low, (end_h, end_w)


@triton.jit
def contiguous_strides(shape, CHANNELS: tl.constexpr):
    """Strides of the first four axes of a contiguous [B, H, W, heads, CHANNELS]."""
    token = shape[2].to(tl.int64) * CHANNELS
    return shape[0] * shape[1] * token, shape[1] * token, token, CHANNELS


@triton.jit
def token_pointers(tensor, batch, head, group, first, BOX: tl.constexpr, dilation, strides):
    """Pointers to the first channel of a head's tokens in a box of places; strides are those of [B, H, W, heads].

    What depends on the box's place is one number: from block to block a program has a sum a pointer to do.
    """
    index = tl.arange(0, BOX[0] * BOX[1])
    row, column = group[0] + dilation[0] * first[0], group[1] + dilation[1] * first[1]
    origin = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3]
    origin += row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]
    # Widened before the strides come in and not earlier: the GPU has one instruction for such a product.
    down, right = (index // BOX[1]) * dilation[0], (index % BOX[1]) * dilation[1]
    return (tensor + origin) + (down.to(tl.int64) * strides[1] + right.to(tl.int64) * strides[2])


@triton.jit
def load_tokens(pointers, valid, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens [len(pointers), BLOCK_D]; zeros where not valid and beyond DIM."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(pointers[:, None] + channel, mask=valid[:, None] & (channel < DIM), other=0.0)


@triton.jit
def store_tokens(pointers, valid, tokens, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The opposite of `load_tokens`, in the dtype that the pointers have."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    rounded = tokens.to(pointers.dtype.element_ty)
    tl.store(pointers[:, None] + channel, rounded, mask=valid[:, None] & (channel < DIM))


@triton.jit
def complete(tokens, valid, pad, head, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Puts a head's padded token [DIM] where tokens are not valid; nothing without a pad."""
    if pad is not None:
        channel = tl.arange(0, BLOCK_D)
        padded = tl.load(pad + head * DIM + channel, mask=channel < DIM, other=0.0)
        tokens = tl.where(valid[:, None], tokens, padded[None, :])
    return tokens


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a x b, summed in float32; "widened" is for Triton's interpreter, whose products know no bfloat16."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def bias_table(bias, head, KERNEL: tl.constexpr, BINS: tl.constexpr):
    """A head's biases times log2 e, [BINS rows * BINS columns] with BINS columns a row.

    Only with a bias: Triton 3.6 and older refuse functions that may return None. Held in registers, so that a program
    looks its biases up in shared memory, in the layout of its products.
    """
    index = tl.arange(0, BINS[0] * BINS[1])
    row, column = index // BINS[1], index % BINS[1]
    heights: tl.constexpr = 2 * KERNEL[0] - 1
    widths: tl.constexpr = 2 * KERNEL[1] - 1
    entries = bias + (head * heights + row) * widths + column
    return tl.load(entries, mask=(row < heights) & (column < widths), other=0.0) * LOG2_E


@triton.jit
def logits_of(products, keys, queries, members, table, scale, shift, KERNEL: tl.constexpr, BINS: tl.constexpr):
    """Scaled and biased products of queries and keys less `shift`; -inf where a key is outside a query's window.

    Args:
        products: [M, N].
        keys, queries: Places (rows, columns) with one axis of length 1 each, so that they broadcast to [M, N].
        table: From `bias_table`, or None without a bias.
        shift: One number, or one a query.
    """
    full = completed(members, KERNEL)
    logits = products * scale
    if table is not None:
        # Outside a window any entry will do, but it must be one. By axes, since few differ in an axis of a program.
        row_bin = (keys[0] - queries[0] + KERNEL[0] - 1) & (BINS[0] - 1)
        column_bin = (keys[1] - queries[1] + KERNEL[1] - 1) & (BINS[1] - 1)
        entry = tl.reshape(row_bin * BINS[1] + column_bin, [products.shape[0] * products.shape[1]])
        logits += tl.reshape(tl.gather(table, entry, 0), [products.shape[0], products.shape[1]])
    # One comparison an axis: what lies before the window is large without a sign.
    row = (keys[0] - window_start(queries[0], full[0], KERNEL[0])).to(tl.uint32)
    column = (keys[1] - window_start(queries[1], full[1], KERNEL[1])).to(tl.uint32)
    logits = tl.where(column < KERNEL[1], logits, float("-inf"))
    return logits + tl.where(row < KERNEL[0], -shift, float("-inf"))


@triton.jit
def key_block(
    q,
    queries,
    sources,
    owner,
    corner,
    table,
    scale,
    shift,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of keys with their values, padded tokens in place of what is not on the map, and the queries' logits.

    Args:
        q, queries: [M, BLOCK_D] and their places.
        sources: Of keys and of values a tensor, a padded token or None, and strides.
        owner: Batch, head, group, members and dilation of the program.
        corner: Place of the first key.
        table, scale, shift: As in `logits_of`.

    Returns:
        keys, values: [N, BLOCK_D].
        real: Which of them are on the map.
        logits: [M, N].
    """
    batch, head, group, members, dilation = owner
    keys = places(corner, BLOCK)
    real = within(keys, members)
    k_pointers = token_pointers(sources[0][0], batch, head, group, corner, BLOCK, dilation, sources[0][2])
    k = complete(load_tokens(k_pointers, real, DIM, BLOCK_D), real, sources[0][1], head, DIM, BLOCK_D)
    v_pointers = token_pointers(sources[1][0], batch, head, group, corner, BLOCK, dilation, sources[1][2])
    v = complete(load_tokens(v_pointers, real, DIM, BLOCK_D), real, sources[1][1], head, DIM, BLOCK_D)
    key_places, query_places = (keys[0][None, :], keys[1][None, :]), (queries[0][:, None], queries[1][:, None])
    products = dot(q, tl.trans(k), PRECISION)
    logits = logits_of(products, key_places, query_places, members, table, scale, shift, KERNEL, BINS)
    return k, v, real, logits
