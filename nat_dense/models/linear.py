"""Linear layers through the faster of the two matrix libraries that torch has on a CPU.

`torch.nn.functional.linear` multiplies float32 by MKL, which is held back on processors of other makers. oneDNN, which
torch uses for convolutions and which is on board anyway, was faster at nearly every shape that was measured
(`benchmarks/README.md`). The choice is by rule and not by a trial at run time: two starts of one model must give the
same bits.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from nat_dense.ops import cpu
from nat_dense.ops.functional import is_exported, is_transformed

LOWERED = (torch.float32, torch.bfloat16, torch.float16)
"""What autocast lowers."""


class Linear(nn.Linear):
    """`nn.Linear` that starts from trunc_normal(std=0.02) and a zero bias, and takes oneDNN on a CPU."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `torch.nn.functional.linear`, differentiable any number of times.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features] or None.
    """
    if not (suits_onednn(x, weight) and _fits(x, weight, bias)):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = linear(grad, weight.t(), None) if needs_x else None
        if not needs_weight:
            return grad_x, None, _tokens(grad).sum(0) if needs_bias else None
        return grad_x, *parameter_gradients(x, weight, grad, needs_bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # oneDNN takes a bias for what lies in memory, whatever its strides.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the sizes are those of the docstring; of others torch knows more, or says what is wrong."""
    return (
        weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.device == x.device))
    )


def parameter_gradients(x: Tensor, weight: Tensor, grad: Tensor, needs_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Of the weight and the bias.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features].
        grad: [..., out_features], of the output.
        needs_bias: Whether the bias's is wanted; else None takes its place.

    A sum over tokens goes along what varies slowest in memory: libraries lay out both operands anew for it. Our kernel
    takes them as they come; it has no gradient of its own.
    """
    if suits_onednn(x, weight) and not torch.is_grad_enabled() and cpu.is_available():
        return cpu.linear_gradient(grad, x, needs_bias)
    tokens = _tokens(grad)
    return linear(tokens.t(), _tokens(x).t(), None), tokens.sum(0) if needs_bias else None


def _tokens(x: Tensor) -> Tensor:
    """[..., C] -> [tokens, C]; a reshape, which gradients in batches know, unlike flatten."""
    return x.reshape(-1, x.shape[-1])


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Plain float32 tensors on a CPU, outside autocast, tracing and transforms, which know F.linear."""
    return bool(
        _HAS_ONEDNN
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.dim() > 1
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not is_traced()
        and not is_transformed()
        and torch.backends.mkldnn.enabled
        and weight.layout is torch.strided  # at last: tracing doesn't know it
    )


def suits_gpu_kernels(x: Tensor, *others: Tensor) -> bool:
    """Plain tensors of one device, in dtypes that autocast lowers or else in one, outside tracing and transforms, which
    know plain operations alone. torch.compile knows operators."""
    return bool(
        type(x) is Tensor
        and all(type(t) in (Tensor, nn.Parameter) for t in others)
        and all(t.dtype in LOWERED and t.device == x.device for t in (x, *others))
        and (torch.is_autocast_enabled(x.device.type) or all(t.dtype == x.dtype for t in others))
        and not is_exported()
        and not torch.jit.is_tracing()
        and not is_transformed()
    )


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is reading the code."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

if _HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *settings, out_shape=None, **named) -> int:
        return 2 * out_shape.numel() * weight_shape[1]


if cpu.is_available():

    @register_flop_formula(torch.ops.nat_dense_cpu.linear_gradient)
    def _gradient_flops(grad_shape, x_shape, *settings, out_shape=None, **named) -> int:
        return 2 * prod(grad_shape) * x_shape[-1]
