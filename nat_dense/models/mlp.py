"""Two linear layers with an exact GELU between them, as one function that keeps little for its backward pass.

The maps around the GELU are the widest of a network. Of its own, torch keeps both, for the backward pass reads one and
the product after it the other; torch.compile too, which computes nothing again that a product reads. On a GPU and in
two bytes the GELU is computed where the product before it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nat_dense.models import gelu  # noqa: F401  (registers the operators)
from nat_dense.models.linear import linear, on_gpu, parameter_gradients, suits_gpu_kernels, suits_onednn
from nat_dense.ops import cpu
from nat_dense.ops.functional import is_transformed


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """[..., dim] -> [..., out], differentiable any number of times.

    In training on a GPU, and on a CPU where oneDNN multiplies, it keeps the map before the GELU and computes the one
    after it again: less memory, on a CPU also less that is mapped anew at every step, which costs more than the GELU.

    Args:
        x: [..., dim].
        weight1: [hidden_dim, dim].
        bias1: [hidden_dim].
        weight2: [out, hidden_dim].
        bias2: [out] or None.
    """
    tensors = (x, weight1, bias1, weight2, bias2)
    if torch.is_grad_enabled():
        if weight1.requires_grad and weight2.requires_grad and _is_taken(*tensors):
            return _Mlp.apply(*_lowered(*tensors))  # here, so that what is kept has autocast's dtype
        return linear(F.gelu(linear(x, weight1, bias1)), weight2, bias2)
    if on_gpu(x) and _is_taken(*tensors):
        x, weight1, bias1, weight2, bias2 = _lowered(*tensors)
        return linear(torch.ops.nat_dense.linear_gelu(x, weight1, bias1, False)[0], weight2, bias2)
    activate = F.gelu if is_transformed() else torch.ops.aten.gelu_  # vmap has no rule for it in place
    return linear(activate(linear(x, weight1, bias1)), weight2, bias2)


def _lowered(x: Tensor, *parameters: Tensor | None) -> Any:
    """What autocast makes of operands of a linear layer."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *parameters
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None else t.to(dtype) for t in (x, *parameters))


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None) -> Tensor:
        if on_gpu(x):
            after, before = torch.ops.nat_dense.linear_gelu(x, weight1, bias1, True)
        else:
            before = linear(x, weight1, bias1)
            after = F.gelu(before)
        ctx.save_for_backward(x, before, weight1, bias1, weight2)
        return linear(after, weight2, bias2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, before, weight1, bias1, weight2 = ctx.saved_tensors
        needs_x, _, needs_bias1, _, needs_bias2 = ctx.needs_input_grad
        twice = torch.is_grad_enabled()
        with torch.autocast(x.device.type, enabled=False):
            if twice:
                before = linear(x, weight1, bias1)  # what was kept is a constant to autograd
            grad_after, sums = linear(grad, weight2.t(), None), None
            if on_gpu(x) and not twice:
                after, grad_before, sums = torch.ops.nat_dense.gelu_backward(grad_after, before)
            elif twice or torch._C._functorch.is_legacy_batchedtensor(grad_after):
                after, grad_before = F.gelu(before), torch.ops.aten.gelu_backward(grad_after, before)
            else:  # in its place: one wide map less
                after, grad_before = _gelu_backward_(grad_after, before), grad_after
            del grad_after
            of_second = parameter_gradients(after, weight2, grad, needs_bias2)
            del after
            grad_weight1, grad_bias1 = parameter_gradients(x, weight1, grad_before, needs_bias1 and sums is None)
            of_first = grad_weight1, grad_bias1 if sums is None else sums.to(bias1.dtype)
            grad_x = linear(grad_before, weight1.t(), None) if needs_x else None
        return grad_x, *of_first, *of_second


def _gelu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    """The GELU of x; the gradient of x takes the place of the GELU's in `grad`."""
    if cpu.is_available():
        return cpu.gelu_backward_(grad, x)
    torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    return F.gelu(x)


def _is_taken(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> bool:
    """Plain tensors that the function is for."""
    if bias1 is None:
        return False
    given = [t for t in (weight1, bias1, weight2, bias2) if t is not None]
    if on_gpu(x):
        return suits_gpu_kernels(x, *given)
    return all(suits_onednn(x, parameter) for parameter in given)
