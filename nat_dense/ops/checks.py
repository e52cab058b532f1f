"""Whether the operator's arguments fit: every error names what was found and what was expected."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from nat_dense.ops import backends
from nat_dense.ops.problem import Pair, completed_size

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    kernel_size: int | Pair,
    dilation: int | Pair,
    scale: float | None,
    backend: str,
) -> tuple[Pair, Pair, float]:
    """The kernel size and the dilation as pairs, and the scale, of arguments that fit; ValueError for others."""
    for name, tensor in dict(query=query, key=key, value=value).items():
        _check_is_tensor(name, tensor)
    kernel_size, dilation = _pair("kernel_size", kernel_size), _pair("dilation", dilation)
    _check_tensors(query, key, value)
    _check_window(query, kernel_size, dilation, padded=pad_key is not None)
    _check_extras(query, rpb, pad_key, pad_value, kernel_size)
    backends.check_name(backend)
    return kernel_size, dilation, query.shape[-1] ** -0.5 if scale is None else float(scale)


def _pair(name: str, value: int | Pair) -> Pair:
    if type(value) is int:
        return value, value
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or any(not isinstance(n, (int, Integral)) or isinstance(n, bool) for n in pair):
        raise ValueError(f"{name}={value!r}: expected an int or a pair of ints (rows, columns)")
    return int(pair[0]), int(pair[1])


def _check_is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    shape = query.shape
    if len(shape) != 5 or not shape == key.shape == value.shape:
        shapes = f"query {tuple(shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"{shapes}: expected three tensors of one shape [B, H, W, heads, head_dim]")
    if 0 in shape[1:]:
        raise ValueError(
            f"query, key and value {tuple(shape)}: expected at least one row, column, head and channel (only the batch "
            "may be empty)"
        )
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        found = f"query {query.dtype}, key {key.dtype}, value {value.dtype}"
        raise ValueError(f"{found}: expected one dtype of {', '.join(map(str, DTYPES))}")
    if not query.device == key.device == value.device:
        raise ValueError(f"query on {query.device}, key on {key.device}, value on {value.device}: expected one device")


def _check_window(query: Tensor, kernel_size: Pair, dilation: Pair, padded: bool) -> None:
    if min(kernel_size) < 3 or kernel_size[0] % 2 == 0 or kernel_size[1] % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: expected odd numbers >= 3")
    if min(dilation) < 1:
        raise ValueError(f"dilation={dilation}: expected numbers >= 1")
    size = (query.shape[1], query.shape[2])
    if not padded and completed_size(size, kernel_size, dilation) != size:
        raise ValueError(
            f"map of {size[0]} x {size[1]} tokens is smaller than kernel_size * dilation = "
            f"{kernel_size[0] * dilation[0]} x {kernel_size[1] * dilation[1]}: use a smaller window, or pass "
            "pad_key and pad_value (NeighborhoodAttention2D does) to complete it"
        )


def _check_extras(
    query: Tensor, rpb: Tensor | None, pad_key: Tensor | None, pad_value: Tensor | None, kernel_size: Pair
) -> None:
    heads, dim = query.shape[3:]

    def check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        _check_is_tensor(name, tensor)
        if tensor.shape != shape:
            wanted = f"{shape} for {heads} heads of {dim}, kernel_size {kernel_size}"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {wanted}")
        if tensor.dtype not in (query.dtype, torch.float32):
            other = "" if query.dtype is torch.float32 else " or torch.float32"
            raise ValueError(f"{name} is {tensor.dtype}; expected {query.dtype} (the query's){other}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {query.device} (the query's)")

    if rpb is not None:
        check("rpb", rpb, (heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1))
    if pad_key is not None:
        check("pad_key", pad_key, (heads, dim))
    if pad_value is not None:
        check("pad_value", pad_value, (heads, dim))
    if (pad_key is None) != (pad_value is None):
        raise ValueError("pad_key and pad_value go together: pass both or neither")
