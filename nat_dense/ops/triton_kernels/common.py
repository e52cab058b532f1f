"""What the kernels share: places, windows, loads and products."""

# ruff: noqa: N803  (upper case marks what is known when a kernel is compiled)

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_of_program(shape, dilation, tiles, TILE: tl.constexpr, DILATED: tl.constexpr):
    """What this program works on.

    Heads vary fastest, then groups: programs that run at the same time share cache lines and a region of the map.

    Args:
        shape: H, W, heads.
        tiles: Rows and columns of tiles over the largest group.
        DILATED: Whether there is more than one group.

    Returns:
        batch, head.
        group: First token of the dilation group.
        members: Rows and columns of tokens in the group.
        first: Place of the tile's first token; beyond `members` where this group has fewer tiles than the largest.
    """
    rest, head = split(tl.program_id(0), shape[2])
    if DILATED:
        rest, group_w = split(rest, tl.minimum(dilation[1], shape[1]))
        rest, group_h = split(rest, tl.minimum(dilation[0], shape[0]))
        members = (tl.cdiv(shape[0] - group_h, dilation[0]), tl.cdiv(shape[1] - group_w, dilation[1]))
    else:
        group_h, group_w, members = 0, 0, (shape[0], shape[1])
    rest, tile_w = split(rest, tiles[1])
    batch, tile_h = split(rest, tiles[0])
    return batch, head, (group_h, group_w), members, (tile_h * TILE[0], tile_w * TILE[1])


@triton.jit
def split(number, by):
    """Quotient and remainder of numbers that are not negative: a division without signs is shorter."""
    quotient = (number.to(tl.uint32) // by.to(tl.uint32)).to(tl.int32)
    return quotient, number - quotient * by


@triton.jit
def strips(TILE: tl.constexpr, STRIP: tl.constexpr):
    """First row of each strip of a tile, counted from the tile's first: int32 [strips, 1]."""
    return tl.arange(0, TILE[0] // STRIP[0])[:, None] * STRIP[0]


@triton.jit
def box(low, BOX: tl.constexpr):
    """Places of the tokens of boxes, of which each strip has its own: rows int32 [strips, n], columns int32 [1, n].

    Args:
        low: First rows [strips, 1], and the first column, which is the same for all.
    """
    index = tl.arange(0, BOX[0] * BOX[1])[None, :]
    return low[0] + index // BOX[1], low[1] + index % BOX[1]


@triton.jit
def moved(place, by):
    """A place, further on by some rows and columns."""
    return place[0] + by[0], place[1] + by[1]


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
def first_key(rows, first, members, KERNEL: tl.constexpr):
    """Place of the first key in the windows of each strip, counted from the tile's first query.

    The windows of a strip lie in a box of KERNEL + STRIP - 1 rows and columns from there.

    Args:
        rows: First row of each strip, counted from the tile's first query.
        first: Place of that.
    """
    full = completed(members, KERNEL)
    row = window_start(first[0] + rows, full[0], KERNEL[0]) - first[0]
    return row, window_start(first[1], full[1], KERNEL[1]) - first[1]


@triton.jit
def contiguous_strides(shape, CHANNELS: tl.constexpr):
    """Strides of the first four axes of a contiguous [B, H, W, heads, CHANNELS]."""
    token = shape[2].to(tl.int64) * CHANNELS
    return shape[0] * shape[1] * token, shape[1] * token, token, CHANNELS


@triton.jit
def token_pointers(tensor, owner, corner, place, strides, OFFSET: tl.constexpr):
    """Pointers to the first channel of a head's tokens, [strips, n].

    Args:
        owner: Batch, head, group, members and dilation of the program.
        corner: Place that `place` is counted from: all that changes from block to block is one number.
        place: From `box`.
        strides: Of [B, H, W, heads].
        OFFSET: Integer type that holds what lies between the corner and its tokens.
    """
    batch, head, group, _, dilation = owner
    row, column = group[0] + dilation[0] * corner[0], group[1] + dilation[1] * corner[1]
    origin = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3]
    origin += row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]
    # Widened before the strides come in and not earlier: the GPU has one instruction for such a product.
    down, right = (place[0] * dilation[0]).to(OFFSET), (place[1] * dilation[1]).to(OFFSET)
    return (tensor + origin) + (down * tl.cast(strides[1], OFFSET) + right * tl.cast(strides[2], OFFSET))


@triton.jit
def load_tokens(pointers, valid, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens [strips, n, BLOCK_D]; zeros where not valid and beyond DIM."""
    channel = tl.arange(0, BLOCK_D)[None, None, :]
    return tl.load(pointers[:, :, None] + channel, mask=valid[:, :, None] & (channel < DIM), other=0.0)


@triton.jit
def load_turned(pointers, valid, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens [strips, BLOCK_D, n], as `load_tokens`.

    For a product that sums over channels. What is turned only when it is in registers goes through shared memory in
    many small steps.
    """
    channel = tl.arange(0, BLOCK_D)[None, :, None]
    return tl.load(pointers[:, None, :] + channel, mask=valid[:, None, :] & (channel < DIM), other=0.0)


@triton.jit
def store_tokens(pointers, valid, tokens, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The opposite of `load_tokens`, in the dtype that the pointers have."""
    channel = tl.arange(0, BLOCK_D)[None, None, :]
    rounded = tokens.to(pointers.dtype.element_ty)
    tl.store(pointers[:, :, None] + channel, rounded, mask=valid[:, :, None] & (channel < DIM))


@triton.jit
def complete(tokens, valid, pad, head, DIM: tl.constexpr, BLOCK_D: tl.constexpr, TURNED: tl.constexpr):
    """Puts a head's padded token [DIM] where tokens are not valid; nothing without a pad."""
    if pad is not None:
        channel = tl.arange(0, BLOCK_D)
        padded = tl.load(pad + head * DIM + channel, mask=channel < DIM, other=0.0)
        if TURNED:
            tokens = tl.where(valid[:, None, :], tokens, padded[None, :, None])
        else:
            tokens = tl.where(valid[:, :, None], tokens, padded[None, None, :])
    return tokens


@triton.jit
def turned(tokens):
    """[strips, n, channels] -> [strips, channels, n]."""
    return tl.permute(tokens, (0, 2, 1))


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
def logits_of(products, keys, queries, real, members, table, scale, shift, KERNEL: tl.constexpr, BINS: tl.constexpr):
    """Scaled and biased products of queries and keys less `shift`; -inf where a key is outside a query's window.

    Args:
        products: [strips, M, N].
        keys, queries: Places (rows, columns) with an axis of length 1 each, so that they broadcast to [strips, M, N].
        real: Which queries are on the map, or None where `shift` says it by an infinity.
        table: From `bias_table`, or None without a bias.
        shift: One number, or one a query.
    """
    full = completed(members, KERNEL)
    logits = products * scale
    if table is not None:
        # Outside a window any entry will do, but it must be one. By axes, since few differ in an axis of a program.
        row_bin = (keys[0] - queries[0] + KERNEL[0] - 1) & (BINS[0] - 1)
        column_bin = (keys[1] - queries[1] + KERNEL[1] - 1) & (BINS[1] - 1)
        entry = tl.reshape(row_bin * BINS[1] + column_bin, [products.shape[0] * products.shape[1] * products.shape[2]])
        found = tl.gather(table, entry, 0)
        logits += tl.reshape(found, [products.shape[0], products.shape[1], products.shape[2]])
    # One comparison an axis: what lies before the window is large without a sign.
    row = (keys[0] - window_start(queries[0], full[0], KERNEL[0])).to(tl.uint32)
    column = (keys[1] - window_start(queries[1], full[1], KERNEL[1])).to(tl.uint32)
    logits = tl.where(column < KERNEL[1], logits, float("-inf"))
    shift = -shift
    if real is not None:
        shift = tl.where(real, shift, float("-inf"))
    return logits + tl.where(row < KERNEL[0], shift, float("-inf"))


@triton.jit
def key_block(
    q,
    queries,
    sources,
    owner,
    corner,
    place,
    table,
    scale,
    shift,
    KERNEL: tl.constexpr,
    BINS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    KEYS_TURNED: tl.constexpr,
):
    """A block of keys with their values, padded tokens in place of what is not on the map, and the queries' logits.

    Args:
        q, queries: [strips, M, BLOCK_D] and their places.
        sources: Of keys and of values a tensor, a padded token or None, and strides.
        owner, corner, place: As in `token_pointers`.
        table, scale, shift: As in `logits_of`.
        KEYS_TURNED: Whether keys, or else values, come as `load_turned` has them: what only sums over channels.

    Returns:
        keys, values: [strips, N, BLOCK_D], one of them turned.
        real: Which of them are on the map.
        logits: [strips, M, N].
    """
    keys = moved(place, corner)
    real = within(keys, owner[3])
    k = source_tokens(sources[0], owner, corner, place, real, DIM, BLOCK_D, OFFSET, KEYS_TURNED)
    v = source_tokens(sources[1], owner, corner, place, real, DIM, BLOCK_D, OFFSET, not KEYS_TURNED)
    if KEYS_TURNED:
        products = dot(q, k, PRECISION)
    else:
        products = dot(q, turned(k), PRECISION)
    logits = logits_of(
        products,
        (keys[0][:, None, :], keys[1][:, None, :]),
        (queries[0][:, :, None], queries[1][:, :, None]),
        None,
        owner[3],
        table,
        scale,
        shift,
        KERNEL,
        BINS,
    )
    return k, v, real, logits


@triton.jit
def source_tokens(
    source,
    owner,
    corner,
    place,
    real,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OFFSET: tl.constexpr,
    TURNED: tl.constexpr,
):
    """The keys or the values of a block; see `key_block`."""
    pointers = token_pointers(source[0], owner, corner, place, source[2], OFFSET)
    if TURNED:
        tokens = load_turned(pointers, real, DIM, BLOCK_D)
    else:
        tokens = load_tokens(pointers, real, DIM, BLOCK_D)
    return complete(tokens, real, source[1], owner[1], DIM, BLOCK_D, TURNED)
