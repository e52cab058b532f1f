"""The sum of a residual branch and the norm that follows it, in one pass each way in compiled training on GPUs.

Between two products of a block the map is read and written, and little is computed: bytes are all that counts. The
operators `nat_dense::add_norm` and `nat_dense::add_norm_backward` touch each number once. With them come the bias of
the branch's last layer, layer scale and stochastic depth, and the sums over tokens that are the gradients of all these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nat_dense.models.linear import on_gpu, suits_gpu_kernels
from nat_dense.ops import triton_launch
from nat_dense.ops.problem import accumulation_dtype
from nat_dense.ops.triton_launch import cdiv

FORWARD: dict = dict(elements=1024, num_warps=2)
"""Numbers of a program of the forward kernel at a time; its warps."""

BACKWARD: dict = dict(elements=512, num_warps=4)
"""As `FORWARD`, of the backward kernel. With four numbers a thread it needn't lay out anew what has four bytes beside
what has two, and takes 48 registers: for each number it keeps three sums."""

PROGRAMS = 8
"""Programs of the backward kernel for each of a GPU's multiprocessors: all run at once."""

LARGEST = 2048
"""Channels that a program holds in registers."""

torch.library.define(
    "nat_dense::add_norm",
    "(Tensor x, Tensor? branch, Tensor? bias, Tensor? scale, Tensor? factor, Tensor weight, Tensor norm_bias, "
    "float eps, ScalarType dtype) -> (Tensor total, Tensor normed, Tensor stats)",
)
torch.library.define(
    "nat_dense::add_norm_backward",
    "(Tensor? grad_total, Tensor grad_normed, Tensor total, Tensor stats, Tensor? branch, Tensor? bias, Tensor? scale, "
    "Tensor? factor, Tensor weight) -> (Tensor grad_x, Tensor grad_branch, Tensor sums)",
)


def add_norm(
    x: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`total = x + factor * scale * (branch + bias)` and its layer norm.

    Args:
        x: [B, ..., C].
        branch: As x; of the last layer of a residual branch without its bias.
        bias: [C], of that layer, or None.
        scale: [C] or None: layer scale.
        factor: [B] or None: stochastic depth; has no gradient.
        weight, norm_bias: [C], of the norm.
        eps: Of the norm.

    Returns:
        total: As x and branch.
        normed: Of the same shape. Under autocast in its dtype, as the product that follows takes it, or in float32, as
            autocast has norms, where the operator isn't taken.
    """
    tensors = (x, branch, bias, scale, factor, weight, norm_bias)
    if not is_taken(*tensors):
        return formula(*tensors, eps)
    return torch.ops.nat_dense.add_norm(*tensors, eps, _dtype_of_norm(x))[:2]


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The layer norm of [B, ..., C] without a branch, as `add_norm`.

    Behind another norm, inductor makes one kernel of both, which takes twice the time of two.
    """
    if not takes_kernels(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return torch.ops.nat_dense.add_norm(x, *[None] * 4, weight, bias, eps, _dtype_of_norm(x))[1]


def _dtype_of_norm(x: Tensor) -> torch.dtype:
    autocast = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def is_taken(
    x: Tensor, branch: Tensor, bias: Tensor | None, scale: Tensor | None, factor: Tensor | None, *norm: Tensor
) -> bool:
    """What the operator is for: also a sum that has the dtype of x."""
    added = [t for t in (branch, scale) if t is not None]
    parameters = [t for t in (bias, *norm) if t is not None]
    return bool(
        takes_kernels(x, *added, *parameters)
        and (factor is None or (type(factor) is Tensor and not factor.requires_grad))
        and all(torch.promote_types(x.dtype, t.dtype) == x.dtype for t in added)
    )


def takes_kernels(x: Tensor, *others: Tensor) -> bool:
    """Plain tensors of not too many channels on a GPU, in a training step that torch.compile reads.

    Called from Python one by one, the operators take twice as long to launch as the operations that they are made of;
    where nothing is trained, inductor's own kernels are as good.
    """
    in_training = torch.compiler.is_compiling() and torch.is_grad_enabled()
    return on_gpu(x) and in_training and x.shape[-1] <= LARGEST and suits_gpu_kernels(x, *others)


def formula(
    x: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`add_norm` in torch's operations."""
    total = _sum(x, branch, bias, scale, factor)
    return total, F.layer_norm(total, weight.shape, weight, norm_bias, eps)


def _sum(x: Tensor, branch: Tensor, bias: Tensor | None, scale: Tensor | None, factor: Tensor | None) -> Tensor:
    return x + _scaled(branch if bias is None else branch + bias.to(branch.dtype), scale, factor)


def _scaled(branch: Tensor, scale: Tensor | None, factor: Tensor | None) -> Tensor:
    branch = branch if scale is None else branch * scale
    return branch if factor is None else branch * factor.view(-1, *[1] * (branch.dim() - 1))


@torch.library.impl("nat_dense::add_norm", "CompositeExplicitAutograd")
def _add_norm(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the function `add_norm`, with gradients, but no second ones and none of `factor`.

    Args:
        branch: None for the norm of x alone; bias, scale and factor are None with it.
        dtype: Of `normed`.

    Returns:
        total: In the dtype of x, contiguous, or empty without a branch. Computed in float32, or float64 with x, and
            rounded once.
        normed: Of the rounded sum; as x, contiguous.
        stats: [*x.shape[:-1], 2], of the norm: the mean and the reciprocal of the deviation; has no gradient.
    """
    channels = x.shape[-1:]
    named = dict(x=x, branch=branch, factor=factor, bias=bias, scale=scale, weight=weight, norm_bias=norm_bias)
    given = {name: t for name, t in named.items() if t is not None}
    expected = dict(branch=x.shape, factor=x.shape[:1])
    if x.dim() < 2 or any(t.shape != expected.get(name, channels) for name, t in given.items() if t is not x):
        found = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
        raise ValueError(f"{found}: expected one shape [B, ..., C], factor [B], all others [C]")
    if branch is None and len(given) > 3:
        raise ValueError(f"{', '.join(given)} without a branch: expected x, weight, norm_bias alone")
    operands: list = [x, branch, bias, scale, factor, weight, norm_bias]
    if _has_kernels(x):
        operands = [t if t is None else t.contiguous() for t in operands]
        return launch_forward(*operands, eps, dtype)  # type: ignore[call-arg]
    wide = accumulation_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        operands = [t if t is None else t.to(wide) for t in operands]
        *added, scales, shifts = operands
        total = x if branch is None else _sum(*added).to(x.dtype).contiguous()
        normed, mean, reciprocal = torch.native_layer_norm(total.to(wide), channels, scales, shifts, eps)
    return _of_branch(total, branch), normed.to(dtype).contiguous(), torch.cat([mean, reciprocal], -1)


def _of_branch(result: Tensor, branch: Tensor | None) -> Tensor:
    """What is empty without a branch."""
    return result.new_empty(0) if branch is None else result


@torch.library.impl("nat_dense::add_norm_backward", "CompositeExplicitAutograd")
def _add_norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    stats: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `add_norm`; the same bits in every run.

    Args:
        grad_total: Of `total`; None without a branch.
        grad_normed: Of `normed`.
        total: The sum; x without a branch.
        stats: As `add_norm` returns them.
        branch: As it was given; without a scale only its dtype counts, and it may be empty.
        bias, scale, factor, weight: As they were given.

    Returns:
        grad_x: As `total`, contiguous.
        grad_branch: As `grad_x`, in the dtype of `branch`; empty without one.
        sums: [2 - 4, C] in float32, or float64 with x: the gradients of the norm's weight and bias, of `bias` where
            there is one, of `scale` where there is one.
    """
    if _has_kernels(total):
        operands: list = [grad_total, grad_normed, total, stats, branch, bias, scale, factor, weight]
        operands = [t if t is None else t.contiguous() for t in operands]
        return launch_backward(*operands)
    wide = stats.dtype
    with torch.autocast(total.device.type, enabled=False):
        grad_x, *sums = torch.ops.aten.native_layer_norm_backward(
            grad_normed.to(wide),
            total.to(wide),
            total.shape[-1:],
            *(column.contiguous() for column in stats.split(1, -1)),  # torch reads on as if they were
            weight.to(wide),
            torch.zeros_like(weight, dtype=wide),
            [True] * 3,
        )
        grad_x = grad_x if grad_total is None else grad_x + grad_total
        unscaled = _scaled(grad_x, None, factor)
        grad_branch = _scaled(unscaled, scale, None)
        if bias is not None:
            sums.append(grad_branch.flatten(0, -2).sum(0))
        if branch is not None and scale is not None:
            added = branch.to(wide) if bias is None else branch.to(wide) + bias
            sums.append((unscaled * added).flatten(0, -2).sum(0))
        if branch is not None:
            grad_branch = grad_branch.to(branch.dtype, copy=True)  # outputs of an operator may not share memory
    return grad_x.to(total.dtype).contiguous(), _of_branch(grad_branch, branch).contiguous(), torch.stack(sums).to(wide)


def _has_kernels(x: Tensor) -> bool:
    fits = x.dtype in triton_launch.DTYPES and 0 < x.shape[-1] <= LARGEST and x.numel() > 0
    return fits and triton_launch.why_no_kernels(x.device.type) is None


@torch.library.register_fake("nat_dense::add_norm")
def _add_norm_fake(x: Tensor, branch: Tensor | None, *others) -> tuple[Tensor, Tensor, Tensor]:
    *_, dtype = others
    normed = x.new_empty(x.shape, dtype=dtype)
    stats = x.new_empty(*x.shape[:-1], 2, dtype=accumulation_dtype(x.dtype))
    return _of_branch(x.new_empty(x.shape), branch), normed, stats


@torch.library.register_fake("nat_dense::add_norm_backward")
def _add_norm_backward_fake(
    _grad_total: Tensor | None,
    _grad_normed: Tensor,
    total: Tensor,
    stats: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    *_others,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = total.shape
    grad_branch = total.new_empty(shape, dtype=None if branch is None else branch.dtype)
    sums = stats.new_empty(_number_of_sums(bias, scale), shape[-1])
    return total.new_empty(shape), _of_branch(grad_branch, branch), sums


def _number_of_sums(bias: Tensor | None, scale: Tensor | None) -> int:
    return 2 + (bias is not None) + (scale is not None)


def _setup_context(ctx, inputs, output) -> None:
    x, branch, bias, scale, factor, weight, norm_bias, _eps, _dtype = inputs
    total, _normed, stats = output
    kept = branch if branch is None or scale is not None else branch.new_empty(0)
    ctx.save_for_backward(x if branch is None else total, stats, kept, bias, scale, factor, weight)
    ctx.dtype_of_norm_bias = norm_bias.dtype
    ctx.mark_non_differentiable(stats)


def _gradients(ctx, grad_total: Tensor, grad_normed: Tensor, _grad_stats) -> tuple[Tensor | None, ...]:
    *_, branch, bias, scale, _factor, weight = tensors = ctx.saved_tensors
    of_total = None if branch is None else grad_total
    grad_x, grad_branch, sums = torch.ops.nat_dense.add_norm_backward(of_total, grad_normed, *tensors)
    of_weight, of_norm_bias, *others = sums.unbind()
    of_bias = None if bias is None else others[0].to(bias.dtype)
    of_scale = None if scale is None else others[-1].to(scale.dtype)
    of_norm = of_weight.to(weight.dtype), of_norm_bias.to(ctx.dtype_of_norm_bias)
    return grad_x, None if branch is None else grad_branch, of_bias, of_scale, None, *of_norm, None, None


def _refuse_second_derivative(_ctx, *_grads):
    raise RuntimeError("add_norm has no second derivative; nat_dense.models.add_norm.formula has")


torch.library.register_autograd("nat_dense::add_norm", _gradients, setup_context=_setup_context)
torch.library.register_autograd("nat_dense::add_norm_backward", _refuse_second_derivative)


def launch_forward(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_norm` through Triton, on contiguous tensors that aren't empty."""
    from nat_dense.models.add_norm_kernels import add_norm_kernel

    channels, per_sample = x.shape[-1], x.shape[1:-1].numel()
    block, warps = _block(channels, **FORWARD)
    total = None if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    stats = torch.empty(*x.shape[:-1], 2, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        add_norm_kernel[(len(x) * cdiv(per_sample, block["BLOCK_ROWS"]),)](
            x,
            branch,
            bias,
            scale,
            factor,
            weight,
            norm_bias,
            total,
            normed,
            stats,
            per_sample,
            channels,
            1 / channels,
            eps,
            num_warps=warps,
            enable_fp_fusion=True,  # Triton 3.10 multiplies and adds in two steps unless told
            **block,
        )
    return x.new_empty(0) if total is None else total, normed, stats


def launch_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    stats: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_norm_backward` through Triton, on contiguous tensors that aren't empty."""
    from nat_dense.models.add_norm_kernels import add_norm_backward_kernel

    channels, per_sample = total.shape[-1], total.shape[1:-1].numel()
    block, warps = _block(channels, **BACKWARD)
    runs = max(1, PROGRAMS * triton_launch.processors(total) // len(total))  # of a sample
    run = cdiv(cdiv(per_sample, block["BLOCK_ROWS"]), runs) * block["BLOCK_ROWS"]
    kinds = _number_of_sums(bias, scale)
    grad_x = torch.empty_like(total)
    grad_branch = None if branch is None else torch.empty_like(total, dtype=branch.dtype)
    sums = torch.empty(len(total) * cdiv(per_sample, run), kinds, channels, dtype=torch.float32, device=total.device)
    with torch.cuda.device_of(total):
        add_norm_backward_kernel[(len(sums),)](
            grad_total,
            grad_normed,
            total,
            stats,
            None if scale is None else branch,
            bias,
            scale,
            factor,
            weight,
            grad_x,
            grad_branch,
            sums,
            per_sample,
            run,
            channels,
            1 / channels,
            SUMS=kinds,
            num_warps=warps,
            enable_fp_fusion=True,
            **block,
        )
    return grad_x, total.new_empty(0) if grad_branch is None else grad_branch, triton_launch.add_up(sums)


def _block(channels: int, elements: int, num_warps: int) -> tuple[dict, int]:
    """Tokens that a program takes at a time, all channels of each; its warps."""
    columns = triton_launch.power_of_two(channels)
    return dict(BLOCK_ROWS=max(1, elements // columns), BLOCK_COLUMNS=columns, EVEN=columns == channels), num_warps
