"""The operator `nat_dense::gelu_backward`: the exact GELU and its gradient from one reading of its input.

The backward pass of an MLP reads both, and the sums of the gradient too: they are the gradient of the first bias.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nat_dense.ops import triton_na2d
from nat_dense.ops.problem import accumulation_dtype

BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 32, 64, 4
"""Of a program at a time. 64 channels divide the widths of all published models, and are whole cache lines."""

PROGRAMS = 4
"""Programs for each of a GPU's multiprocessors: all run at once, and their sums take next to no time to add up."""

torch.library.define(
    "nat_dense::gelu_backward", "(Tensor grad, Tensor x) -> (Tensor gelu, Tensor grad_x, Tensor column_sums)"
)


@torch.library.impl("nat_dense::gelu_backward", "CompositeExplicitAutograd")
def _gelu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exact GELU of x, the gradient of x, and its sums over tokens; the same bits in every run.

    Args:
        grad: [..., C], the gradient of the GELU, in the dtype of x.
        x: [..., C]. float32, bfloat16 and float16 have a kernel on GPUs.

    Returns:
        gelu, grad_x: As x, contiguous. Computed in float32 and rounded once.
        column_sums: [C] of the rounded `grad_x`, in float32, or float64 with x.
    """
    if grad.shape != x.shape or grad.dtype != x.dtype or x.dim() == 0:
        found = f"grad {tuple(grad.shape)} of {grad.dtype}, x {tuple(x.shape)} of {x.dtype}"
        raise ValueError(f"{found}: expected one shape [..., C] and one dtype")
    grad, x = grad.contiguous(), x.contiguous()
    if x.numel() > 0 and x.dtype in triton_na2d.DTYPES and triton_na2d.why_no_kernels(x.device.type) is None:
        return launch(grad, x)
    grad_x = torch.ops.aten.gelu_backward(grad, x)
    return F.gelu(x), grad_x, grad_x[None].flatten(0, -2).sum(0, dtype=accumulation_dtype(x.dtype))


@torch.library.register_fake("nat_dense::gelu_backward")
def _gelu_backward_fake(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=accumulation_dtype(x.dtype))


def _refuse(_ctx, *_grads):
    raise RuntimeError("gelu_backward has no derivative; torch.ops.aten.gelu_backward has")


torch.library.register_autograd("nat_dense::gelu_backward", _refuse)


def launch(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operator through Triton, on contiguous tensors that aren't empty."""
    from nat_dense.models.gelu_kernel import gelu_backward_kernel

    channels = x.shape[-1]
    tokens, columns = x.numel() // channels, -(-channels // BLOCK_COLUMNS)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    blocks = -(-tokens // BLOCK_ROWS)
    rows = -(-blocks // max(1, PROGRAMS * processors // columns)) * BLOCK_ROWS
    gelu, grad_x = torch.empty_like(x), torch.empty_like(x)
    sums = torch.empty(-(-tokens // rows), channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        gelu_backward_kernel[columns, len(sums)](
            grad,
            x,
            gelu,
            grad_x,
            sums,
            tokens,
            rows,
            channels,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=WARPS,
            enable_fp_fusion=True,  # Triton 3.10 multiplies and adds in two steps unless told
        )
    return gelu, grad_x, triton_na2d.add_up(sums)
