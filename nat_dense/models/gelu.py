"""The operators `nat_dense::linear_gelu` and `nat_dense::gelu_backward`: the passes over the widest maps of a network.

Read and written by itself, the map between the linear layers of an MLP takes a GPU as long as the products around it.
The GELU is computed where the product before it is; in the backward pass the GELU, its gradient and the sums of that,
which are the gradient of the first bias, come from one reading.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from nat_dense.ops import triton_launch
from nat_dense.ops.problem import accumulation_dtype
from nat_dense.ops.triton_launch import cdiv

FORWARD_DTYPES = (torch.bfloat16, torch.float16)
"""What the forward kernel multiplies; float32 is left to torch's products."""

FORWARD: dict = dict(BLOCK=(128, 64, 64), num_warps=8, num_stages=3)
"""Of a program: its tokens, its channels and the channels that it sums over at a time; warps; blocks on their way."""

BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 32, 64, 4
"""Of a program of the backward kernel at a time. 64 channels divide the widths of all published models, and are whole
cache lines."""

PROGRAMS = 6
"""Programs of it for each of a GPU's multiprocessors: all run at once, and their sums take no time to add up."""

torch.library.define(
    "nat_dense::linear_gelu", "(Tensor x, Tensor weight, Tensor bias, bool keep) -> (Tensor gelu, Tensor before)"
)
torch.library.define(
    "nat_dense::gelu_backward", "(Tensor grad, Tensor x) -> (Tensor gelu, Tensor grad_x, Tensor column_sums)"
)


@torch.library.impl("nat_dense::linear_gelu", "CompositeExplicitAutograd")
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """The exact GELU of a linear layer.

    Args:
        x: [..., depth]. bfloat16 and float16 have a kernel on GPUs.
        weight: [channels, depth], in the dtype of x.
        bias: [channels], in the dtype of x.
        keep: Whether the map before the GELU is wanted.

    Returns:
        gelu: [..., channels], contiguous. Of the rounded layer, computed in float32 and rounded once.
        before: The layer itself, as `gelu`, or empty.
    """
    operands = {"x": x, "weight": weight, "bias": bias}
    fits = x.dim() > 0 and weight.shape[1:] == x.shape[-1:] and bias.shape == weight.shape[:1]
    _check(operands, fits, "[..., depth], [channels, depth], [channels]")
    x = x.contiguous()
    if x.numel() > 0 and weight.numel() > 0 and x.dtype in FORWARD_DTYPES and _has_kernels(x):
        return launch_forward(x, weight.contiguous(), bias.contiguous(), keep)
    with torch.autocast(x.device.type, enabled=False):
        before = F.linear(x, weight, bias)
    return (F.gelu(before), before) if keep else (torch.ops.aten.gelu_(before), before.new_empty(0))


@torch.library.impl("nat_dense::gelu_backward", "CompositeExplicitAutograd")
def _gelu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exact GELU of x, the gradient of x, and its sums over tokens; the same bits in every run.

    Args:
        grad: [..., C], the gradient of the GELU, in the dtype of x.
        x: [..., C]. float32, bfloat16 and float16 have a kernel on GPUs.

    Returns:
        gelu, grad_x: As x, contiguous. Computed in float32 and rounded once.
        column_sums: [C] of `grad_x` before it is rounded, in float32, or float64 with x.
    """
    _check({"grad": grad, "x": x}, x.dim() > 0 and grad.shape == x.shape, "one shape [..., C]")
    grad, x = grad.contiguous(), x.contiguous()
    if x.numel() > 0 and x.dtype in triton_launch.DTYPES and _has_kernels(x):
        return launch_backward(grad, x)
    wide = accumulation_dtype(x.dtype)
    exact = torch.ops.aten.gelu_backward(grad.to(wide), x.to(wide))
    return F.gelu(x), exact.to(x.dtype), exact[None].flatten(0, -2).sum(0)


def _check(operands: dict[str, Tensor], fits: bool, expected: str) -> None:
    if not fits or len({t.dtype for t in operands.values()}) > 1:
        found = ", ".join(f"{name} {tuple(t.shape)} of {t.dtype}" for name, t in operands.items())
        raise ValueError(f"{found}: expected {expected} and one dtype")


def _has_kernels(x: Tensor) -> bool:
    return triton_launch.why_no_kernels(x.device.type) is None


@torch.library.register_fake("nat_dense::linear_gelu")
def _linear_gelu_fake(x: Tensor, weight: Tensor, _bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    shape = *x.shape[:-1], weight.shape[0]
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


@torch.library.register_fake("nat_dense::gelu_backward")
def _gelu_backward_fake(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=accumulation_dtype(x.dtype))


def _refuse(_ctx, *_grads):
    raise RuntimeError("linear_gelu and gelu_backward have no derivative; nat_dense.models.mlp.mlp has")


for _name in ("nat_dense::linear_gelu", "nat_dense::gelu_backward"):
    torch.library.register_autograd(_name, _refuse)


@register_flop_formula(torch.ops.nat_dense.linear_gelu)
def _flops(x_shape, weight_shape, *_others, out_shape=None, **_named) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """`linear_gelu` through Triton, on contiguous tensors that aren't empty."""
    from nat_dense.models.gelu_kernels import linear_gelu_kernel

    channels, depth = weight.shape
    tokens = x.numel() // depth
    rows, columns, step = FORWARD["BLOCK"]
    gelu = x.new_empty(*x.shape[:-1], channels)
    before = torch.empty_like(gelu) if keep else None
    with torch.cuda.device_of(x):
        linear_gelu_kernel[(cdiv(tokens, rows) * cdiv(channels, columns),)](
            x,
            weight,
            bias,
            before,
            gelu,
            tokens,
            channels,
            depth,
            EVEN=channels % columns == 0 and depth % step == 0,
            PRECISION=triton_launch.product_precision(x.dtype),
            enable_fp_fusion=True,  # Triton 3.10 multiplies and adds in two steps unless told
            **FORWARD,
        )
    return gelu, x.new_empty(0) if before is None else before


def launch_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`gelu_backward` through Triton, on contiguous tensors that aren't empty."""
    from nat_dense.models.gelu_kernels import gelu_backward_kernel

    channels = x.shape[-1]
    tokens, columns = x.numel() // channels, cdiv(channels, BLOCK_COLUMNS)
    runs = max(1, PROGRAMS * triton_launch.processors(x) // columns)
    rows = cdiv(cdiv(tokens, BLOCK_ROWS), runs) * BLOCK_ROWS
    gelu, grad_x = torch.empty_like(x), torch.empty_like(x)
    sums = torch.empty(cdiv(tokens, rows), channels, dtype=torch.float32, device=x.device)
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
            enable_fp_fusion=True,
        )
    return gelu, grad_x, triton_launch.add_up(sums)
