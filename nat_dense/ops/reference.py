"""Neighborhood attention in plain torch: the definition that every other back end is tested against.

Shapes: B batch, H and W the map, R a chunk of its rows, N heads, D channels of a head, K x L the window.

Source: NAT (arXiv:2204.07143, section 3.1) and DiNAT (arXiv:2209.15001, section 3.1); the border rule is that of
NATTEN 0.17's kernels: a window shifts to stay inside its dilated group, it never shrinks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nat_dense.ops.problem import Pair, accumulation_dtype, autocast_dtype, completed_size

CHUNK_BYTES = 32 << 20
"""Rows are taken together while one gathered tensor stays under this many bytes (one row is the least).

The forward pass holds two such tensors at a time (keys, values), the backward pass four (their gradients too).
"""


def window_indices(
    length: int, kernel: int, dilation: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Which tokens each query of one axis attends to, and with which bias.

    Tokens with the same index modulo `dilation` form a group; the window is `kernel` consecutive members of the
    query's own group, centred on it where the group allows.

    Args:
        length: Tokens on the axis. Fewer than `kernel * dilation` count as completed to that many.

    Returns:
        positions: int64 [length, kernel], token indices (>= `length` only on a completed axis).
        offsets: int64 [length, kernel], indices into the 2 * kernel - 1 entries of the bias axis.
    """
    size = max(length, kernel * dilation)
    query = torch.arange(length, device=device)
    group = query % dilation
    place = query // dilation  # of the query inside its group
    members = (size - group + dilation - 1) // dilation  # in the group
    start = torch.minimum((place - kernel // 2).clamp_min(0), members - kernel)
    window = start[:, None] + torch.arange(kernel, device=device)  # [length, kernel], places
    return group[:, None] + dilation * window, window - place[:, None] + kernel - 1


Function = TypeVar("Function", bound=Callable)


def _in_dtypes_of_its_own(function: Function) -> Function:
    """Autocast would take the sums, which are in float32, for products to be made in two bytes."""

    @functools.wraps(function)
    def call(tensor, *arguments, **keywords):
        if autocast_dtype(tensor.device) is None:
            return function(tensor, *arguments, **keywords)
        with torch.amp.autocast(tensor.device.type, enabled=False):
            return function(tensor, *arguments, **keywords)

    return call  # type: ignore[return-value]


@_in_dtypes_of_its_own
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    kernel_size: Pair,
    dilation: Pair,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of each query to its window.

    Args:
        query, key, value: [B, H, W, N, D] of one floating dtype.
        rpb: [N, 2K-1, 2L-1] or None.
        pad_key, pad_value: [N, D]; the key and value of every token beyond the map, where the map is smaller than
            `kernel_size * dilation` on an axis and counts as completed to that size on the right or bottom.
        scale: Multiplies the query.
        dropout: Probability with which an attention weight is dropped. Only for calls under autograd's own eye.

    Returns:
        out: [B, H, W, N, D] in the dtype of `query`.
        lse: [B, H, W, N], log-sum-exp of the logits, in at least float32.
    """
    key, value = _complete(key, pad_key, kernel_size, dilation), _complete(value, pad_value, kernel_size, dilation)
    outs, lses = [], []
    for chunk in _chunks(query, kernel_size, dilation):
        logits = _logits(query[:, chunk.rows], chunk.gather(key), rpb, chunk, scale)
        lses.append(torch.logsumexp(logits, dim=(-2, -1)))
        weights = logits.flatten(-2).softmax(dim=-1).unflatten(-1, kernel_size)
        weights = F.dropout(weights, dropout, training=dropout > 0)
        outs.append(torch.einsum("brwnkl,brkwlnd->brwnd", weights, chunk.gather(value)).to(query.dtype))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


@_in_dtypes_of_its_own
def attention_weights(
    query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Pair, dilation: Pair, scale: float
) -> Tensor:
    """The weights that `forward` gives the keys and doesn't keep: [B, H, W, N, K, L], in at least float32.

    Args are those of `forward`; the map holds at least one dilated window an axis.
    """
    logits = [
        _logits(query[:, chunk.rows], chunk.gather(key), rpb, chunk, scale)
        for chunk in _chunks(query, kernel_size, dilation)
    ]
    return torch.cat(logits, dim=1).flatten(-2).softmax(dim=-1).unflatten(-1, kernel_size)


@_in_dtypes_of_its_own
def apply_weights(weights: Tensor, value: Tensor, kernel_size: Pair, dilation: Pair) -> Tensor:
    """The values [B, H, W, N, D] summed with the weights that `attention_weights` returned, in the values' dtype."""
    outs = [
        torch.einsum("brwnkl,brkwlnd->brwnd", weights[:, chunk.rows], chunk.gather(value))
        for chunk in _chunks(value, kernel_size, dilation)
    ]
    return torch.cat(outs, dim=1).to(value.dtype)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: Pair,
    dilation: Pair,
    scale: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`'s first output, from its inputs and outputs.

    Returns:
        grad_qkv: [B, H, W, 3, N, D], those of query, key and value in their dtype; contiguous, so that one projection
            that made the three gets its gradient without a copy.
        grad_rpb, grad_pad_key, grad_pad_value: Each of its tensor's shape and dtype; None where the tensor is None.
    """
    acc = accumulation_dtype(query.dtype)
    height, width = query.shape[1:3]
    full_key, full_value = (
        _complete(key, pad_key, kernel_size, dilation),
        _complete(value, pad_value, kernel_size, dilation),
    )
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros(full_key.shape, dtype=acc, device=key.device)
    grad_value = torch.zeros(full_value.shape, dtype=acc, device=key.device)
    grad_rpb = None if rpb is None else torch.zeros(rpb.shape, dtype=acc, device=rpb.device)
    for chunk in _chunks(query, kernel_size, dilation):
        rows = chunk.rows
        q, g, k, v = query[:, rows].to(acc), grad_out[:, rows].to(acc), chunk.gather(full_key), chunk.gather(full_value)
        weights = torch.exp(_logits(query[:, rows], k, rpb, chunk, scale) - lse[:, rows, :, :, None, None])
        delta = (g * out[:, rows].to(acc)).sum(-1)[..., None, None]
        grad_logits = weights * (torch.einsum("brwnd,brkwlnd->brwnkl", g, v) - delta)
        grad_query[:, rows] = torch.einsum("brwnkl,brkwlnd->brwnd", grad_logits, k).mul_(scale).to(query.dtype)
        chunk.scatter_add(grad_key, torch.einsum("brwnkl,brwnd->brkwlnd", grad_logits, q * scale))
        chunk.scatter_add(grad_value, torch.einsum("brwnkl,brwnd->brkwlnd", weights, g))
        if grad_rpb is not None:
            per_offset = grad_logits.sum(0).permute(2, 0, 3, 1, 4)  # [N, R, K, W, L]
            grad_rpb.index_put_(
                (torch.arange(len(grad_rpb), device=grad_rpb.device)[:, None, None, None, None], *chunk.offsets),
                per_offset,
                accumulate=True,
            )
    real_key, real_value = (tokens[:, :height, :width].to(query.dtype) for tokens in (grad_key, grad_value))
    return (
        torch.stack((grad_query, real_key, real_value), dim=3),
        None if grad_rpb is None or rpb is None else grad_rpb.to(rpb.dtype),
        _pad_gradient(grad_key, pad_key, (height, width)),
        _pad_gradient(grad_value, pad_value, (height, width)),
    )


class _Chunk:
    """A run of query rows with the indices of their windows."""

    def __init__(self, rows: slice, row_window: tuple[Tensor, Tensor], column_window: tuple[Tensor, Tensor]):
        self.rows = rows
        self.positions, self.offsets = (
            (by_row[rows, :, None, None], by_column[None, None])
            for by_row, by_column in zip(row_window, column_window, strict=True)
        )  # each a pair that broadcasts to [R, K, W, L]

    def gather(self, tokens: Tensor) -> Tensor:
        """[B, H, W, N, D] -> [B, R, K, W, L, N, D], in at least float32."""
        return tokens[:, self.positions[0], self.positions[1]].to(accumulation_dtype(tokens.dtype))

    def scatter_add(self, tokens: Tensor, updates: Tensor) -> None:
        """The transpose of `gather`: adds [B, R, K, W, L, N, D] into [B, H, W, N, D]."""
        batch = torch.arange(len(tokens), device=tokens.device)[:, None, None, None, None]
        tokens.index_put_((batch, *self.positions), updates, accumulate=True)


def _chunks(query: Tensor, kernel_size: Pair, dilation: Pair) -> Iterator[_Chunk]:
    batch, height, width, heads, dim = query.shape
    windows = [
        window_indices(n, k, d, query.device) for n, k, d in zip((height, width), kernel_size, dilation, strict=True)
    ]
    row_bytes = batch * width * heads * dim * kernel_size[0] * kernel_size[1] * accumulation_dtype(query.dtype).itemsize
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, height, step):
        yield _Chunk(slice(start, min(start + step, height)), *windows)


def _logits(query: Tensor, gathered_key: Tensor, rpb: Tensor | None, chunk: _Chunk, scale: float) -> Tensor:
    """[B, R, W, N, K, L] for query rows [B, R, W, N, D] and their gathered keys."""
    logits = torch.einsum("brwnd,brkwlnd->brwnkl", query.to(gathered_key.dtype) * scale, gathered_key)
    if rpb is None:
        return logits
    bias = rpb[:, chunk.offsets[0], chunk.offsets[1]]  # [N, R, K, W, L]
    return logits + bias.permute(1, 3, 0, 2, 4).to(logits.dtype)


def _complete(tokens: Tensor, pad: Tensor | None, kernel_size: Pair, dilation: Pair) -> Tensor:
    """Grows a map smaller than a window on the right and bottom with copies of one token."""
    batch, height, width, heads, dim = tokens.shape
    size = completed_size((height, width), kernel_size, dilation)
    if pad is None or size == (height, width):
        return tokens
    columns = pad.expand(batch, height, size[1] - width, heads, dim)
    rows = pad.expand(batch, size[0] - height, size[1], heads, dim)
    return torch.cat([torch.cat([tokens, columns], dim=2), rows], dim=1)


def _pad_gradient(grad_tokens: Tensor, pad: Tensor | None, size: Pair) -> Tensor | None:
    """The transpose of `_complete` for `pad`."""
    if pad is None:
        return None
    height, width = size
    total = grad_tokens[:, height:].sum((0, 1, 2)) + grad_tokens[:, :height, width:].sum((0, 1, 2))
    return total.to(pad.dtype)
