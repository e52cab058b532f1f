"""Operators that ONNX lacks, written with those of its opset 18.

Pass `TRANSLATIONS` to `torch.onnx.export` as `custom_translation_table`. The functions below take and return values of
the graph being built, in the order of the operator's schema; no size needs to be known before it runs.

Shapes: B batch, H and W the map, N heads, D channels per head, K x L the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18

from nat_dense.ops import functional  # noqa: F401  (defines the operator)
from nat_dense.ops.problem import completed_size

OPSET = 18

op: Any = opset18  # typed for graphs of tensors alone, it also takes Python's numbers and lists


def na2d(
    query,
    key,
    value,
    rpb,
    pad_key,
    pad_value,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    backend: str,
    needs_grad: bool | None,
):
    """`torch.ops.nat_dense.na2d` in float32, one row of the window at a time.

    Its largest tensors are the gathered keys of one window row, L times the map, and the logits, K * L / D times.

    Returns:
        out: [B, H, W, N, D].
        lse: [B, H, W, N], log-sum-exp of the logits.
    """
    if pad_key is not None and not _is_complete(query, kernel_size, dilation):
        key, value = _with_border(key, pad_key), _with_border(value, pad_value)
    rows, row_offsets = _window_indices(query, 1, kernel_size[0], dilation[0])
    columns, column_offsets = _window_indices(query, 2, kernel_size[1], dilation[1])
    query, key, value = (op.Transpose(tokens, perm=[0, 3, 1, 2, 4]) for tokens in (query, key, value))

    def select(tokens, row: int):
        """[B, N, H, W, L, D]: the tokens in one row of each query's window."""
        return op.Gather(op.Gather(tokens, op.Gather(rows, row, axis=1), axis=2), columns, axis=3)

    column_query = op.Unsqueeze(op.Mul(query, scale), [-1])  # [B, N, H, W, D, 1]
    logits = [op.MatMul(select(key, row), column_query) for row in range(kernel_size[0])]
    joined = op.Squeeze(op.Concat(*logits, axis=-2), [-1])  # [B, N, H, W, K * L]
    if rpb is not None:
        bias = op.Gather(op.Gather(rpb, row_offsets, axis=1), column_offsets, axis=3)  # [N, H, K, W, L]
        joined = op.Add(joined, op.Reshape(op.Transpose(bias, perm=[0, 1, 3, 2, 4]), [0, 0, 0, -1]))
    weights = op.Unsqueeze(op.Softmax(joined, axis=-1), [-2])  # [B, N, H, W, 1, K * L]

    def attend(row: int):
        """[B, N, H, W, 1, D]: the contribution of one row of each query's window."""
        first = row * kernel_size[1]
        return op.MatMul(op.Slice(weights, [first], [first + kernel_size[1]], [-1]), select(value, row))

    out = attend(0)
    for row in range(1, kernel_size[0]):
        out = op.Add(out, attend(row))
    lse = op.ReduceLogSumExp(joined, [-1], keepdims=0)
    return op.Transpose(op.Squeeze(out, [-2]), perm=[0, 2, 3, 1, 4]), op.Transpose(lse, perm=[0, 2, 3, 1])


def _is_complete(query, kernel_size: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether the map is known to hold a window; its size may be unknown until the graph runs."""
    height, width = query.shape[1], query.shape[2]
    if not isinstance(height, int) or not isinstance(width, int):
        return False
    size, (rows, columns), (row_step, column_step) = (height, width), kernel_size, dilation
    return completed_size(size, (rows, columns), (row_step, column_step)) == size


def _with_border(tokens, pad):
    """Adds a row and a column of the pad token, which stand for everything beyond the map: [B, H + 1, W + 1, N, D]."""
    for axis in (2, 1):
        shape = op.Shape(op.Gather(tokens, [0], axis=axis))
        tokens = op.Concat(tokens, op.Expand(pad, shape), axis=axis)
    return tokens


def _window_indices(query, axis: int, kernel: int, dilation: int):
    """What `nat_dense.ops.reference.window_indices` gives for an axis of the map, [length, kernel] twice.

    Positions beyond the map are all `length`: the place of the one pad token.
    """
    length = op.Squeeze(op.Shape(query, start=axis, end=axis + 1))
    token = op.Range(0, length, 1)
    group, place = op.Mod(token, dilation), op.Div(token, dilation)
    size = op.Max(length, kernel * dilation)
    members = op.Div(op.Sub(op.Add(size, dilation - 1), group), dilation)
    start = op.Min(op.Max(op.Sub(place, kernel // 2), 0), op.Sub(members, kernel))
    window = op.Add(op.Unsqueeze(start, [1]), op.Constant(value_ints=list(range(kernel))))
    positions = op.Add(op.Mul(window, dilation), op.Unsqueeze(group, [1]))
    offsets = op.Add(op.Sub(window, op.Unsqueeze(place, [1])), kernel - 1)
    return op.Min(positions, length), offsets


def adaptive_avg_pool2d(x, output_size: Sequence[int]):
    """`torch.nn.functional.adaptive_avg_pool2d` as two matrix products: [B, C, H, W] -> [B, C, *output_size].

    PSPNet's pooling pyramid, a part of UPerNet, needs it.
    """
    rows, columns = (_bin_weights(x, axis, bins) for axis, bins in zip((2, 3), output_size, strict=True))
    return op.MatMul(rows, op.MatMul(x, op.Transpose(columns, perm=[1, 0])))


def _bin_weights(x, axis: int, bins: int):
    """[bins, length] float32: the weight of each cell of an axis in the mean of each bin. Bins may share a cell."""
    length = op.Squeeze(op.Shape(x, start=axis, end=axis + 1))
    cell = op.Range(0, length, 1)
    number = op.Unsqueeze(op.Constant(value_ints=list(range(bins))), [1])
    first = op.Div(op.Mul(number, length), bins)
    end = op.Div(op.Add(op.Mul(op.Add(number, 1), length), bins - 1), bins)
    inside = op.And(op.GreaterOrEqual(cell, first), op.Less(cell, end))
    return op.Div(op.CastLike(inside, x), op.CastLike(op.Sub(end, first), x))


TRANSLATIONS: dict[Any, Callable] = {
    torch.ops.nat_dense.na2d.default: na2d,
    torch.ops.aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
}
"""By operator."""
