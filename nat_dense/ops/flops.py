"""Operation counts of the operator, registered with `torch.utils.flop_counter` on import.

The convention is torch's: a multiply-add counts as two FLOPs, and only matrix products count, not the softmax, the
scale or the bias. Papers on vision backbones write "FLOPs" for multiply-adds; see `nat_dense.mm.flops`.

Every query attends to exactly kernel_size keys wherever it lies, so the counts depend on neither border nor dilation,
and they are those of full attention where the window is the whole map.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from nat_dense.ops import functional  # noqa: F401  (defines the operators that are registered here)

FORWARD_PRODUCTS = 2
"""query x key and weights x value."""

BACKWARD_PRODUCTS = 5
"""query x key again (recomputed), and one product for each gradient: of the weights, the value, the query, the key."""


def product_macs(query_shape: Sequence[int], kernel_size: Sequence[int]) -> int:
    """Multiply-adds of one product between each query and its window's keys.

    Args:
        query_shape: [B, H, W, heads, head_dim].
        kernel_size: Window in tokens (rows, columns).
    """
    return prod(query_shape) * prod(kernel_size)


def bias_additions(query_shape: Sequence[int], kernel_size: Sequence[int]) -> int:
    """Additions of the relative position bias to the logits; arguments as for `product_macs`."""
    return prod(query_shape[:4]) * prod(kernel_size)


# The parameters below have the names of the operators' schemas; torch passes shapes in place of tensors.


@register_flop_formula(torch.ops.nat_dense.na2d)
def _forward_flops(query, key, value, rpb, pad_key, pad_value, kernel_size, *settings, out_shape=None, **named) -> int:
    return 2 * FORWARD_PRODUCTS * product_macs(query, kernel_size)


@register_flop_formula(torch.ops.nat_dense.na2d_qkv)
def _packed_flops(qkv, rpb, pad_key, pad_value, kernel_size, *settings, out_shape=None, **named) -> int:
    return 2 * FORWARD_PRODUCTS * product_macs((*qkv[:3], *qkv[4:]), kernel_size)


@register_flop_formula(torch.ops.nat_dense.na2d_rows)
def _rows_flops(query, key, value, rpb, kernel_size, dilation, scale, rows, *settings, out_shape=None, **named) -> int:
    return 2 * FORWARD_PRODUCTS * product_macs(out_shape, kernel_size)


@register_flop_formula(torch.ops.nat_dense.na2d_backward)
def _backward_flops(
    grad_out, query, key, value, rpb, pad_key, pad_value, out, lse, kernel_size, *settings, out_shape=None, **named
) -> int:
    return 2 * BACKWARD_PRODUCTS * product_macs(query, kernel_size)
