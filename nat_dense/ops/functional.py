"""The operator: signature, validation, registration with torch.library, dispatch to a back end.

`na2d` checks its arguments once and calls `torch.ops.nat_dense.na2d`, which torch.compile and torch.export see as one
opaque operator with a shape rule, a gradient and an autocast rule. The back end is chosen when it runs. `na2d_qkv` does
the same for tokens in one tensor, whose gradient is one tensor too.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nat_dense.ops import backends, reference
from nat_dense.ops.checks import checked
from nat_dense.ops.problem import Pair, Problem, accumulation_dtype, autocast_dtype


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Pair,
    dilation: int | Pair = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
    *,
    pad_key: Tensor | None = None,
    pad_value: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """2-D neighborhood attention with an optional relative position bias.

    Every query attends to exactly `kernel_size` tokens, `dilation` apart, centred on it; at a border the window
    shifts, it does not shrink.

    Args:
        query, key, value: [B, H, W, heads, head_dim], one dtype of float64, float32, bfloat16, float16. Any strides;
            views of a fused qkv projection go in without a copy while head_dim has unit stride.
        kernel_size: Window in tokens, an int or (rows, columns); odd, > 1.
        dilation: Distance of neighbouring window tokens, an int or (rows, columns); >= 1.
        rpb: [heads, 2 * rows - 1, 2 * columns - 1], added to the logits; in the dtype of `query` or float32.
        scale: Multiplies the query; head_dim ** -0.5 when None.
        pad_key, pad_value: [heads, head_dim], both or neither. With them the map may be smaller than
            `kernel_size * dilation`: it counts as completed to that size on the right and bottom with tokens that all
            have this key and value (which is what zero-padding before a qkv projection makes of its biases).
        backend: "auto", or a name of `backends.TABLE`, which runs or raises.

    Returns:
        [B, H, W, heads, head_dim] in the dtype of `query` (under autocast: in autocast's).

    Under `torch.func` transforms (vmap, grad, jvp, ...) and forward-mode gradients the reference runs, in operations
    that they know; it also has second derivatives. Elsewhere the gradients of query, key and value are views of one
    tensor.

    Raises:
        ValueError: Shapes, dtypes, kernel size, dilation or back-end name that don't fit, with what was found.
        RuntimeError: The named back end can't run this.

    Source: NAT (arXiv:2204.07143) section 3.1, DiNAT (arXiv:2209.15001) section 3.1.
    """
    tensors = (query, key, value, rpb, pad_key, pad_value)
    kernel_size, dilation, scale = checked(*tensors, kernel_size, dilation, scale, backend)
    if is_transformed():
        if backend not in ("auto", "reference"):
            raise RuntimeError(
                f"backend={backend!r} can't run under torch.func transforms or forward-mode gradients, only the "
                "reference can. Use backend='auto' to let it"
            )
        dtype = autocast_dtype(query.device)
        if dtype is not None:
            tokens, extras = _lowered(tensors[:3], tensors[3:], dtype)
            tensors = (*tokens, *extras)
        return reference.forward(*tensors, kernel_size, dilation, scale)[0]
    # Found out here, since in a compiled forward pass nothing says so. Programs that leave Python find out as they run.
    # Tensors that need none rule it out only without grad mode: recorders look at them once, and others may follow.
    leaves_python = torch.jit.is_tracing() or is_exported()
    needs_grad = None if leaves_python else torch.is_grad_enabled() and (_any_requires_grad(tensors) or None)
    out, _ = torch.ops.nat_dense.na2d(*tensors, list(kernel_size), list(dilation), scale, backend, needs_grad)
    return out


def na2d_qkv(
    qkv: Tensor,
    kernel_size: int | Pair,
    dilation: int | Pair = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
    *,
    pad_key: Tensor | None = None,
    pad_value: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """As `na2d(*qkv.unbind(3), ...)`, with one gradient that no copy is made of: autograd stacks those of `na2d`.

    Args:
        qkv: [B, H, W, 3, heads, head_dim]: query, key and value, as one projection makes them.
        kernel_size, dilation, rpb, scale, pad_key, pad_value, backend: As in `na2d`.

    Returns:
        [B, H, W, heads, head_dim], as `na2d`.

    Raises:
        ValueError: As `na2d`, or qkv has another shape.
        RuntimeError: As `na2d`.
    """
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected [B, H, W, 3, heads, head_dim]")
    needs_grad = torch.is_grad_enabled() and qkv.requires_grad
    # Inference and programs that leave Python know one operator.
    if not needs_grad or is_transformed() or is_exported() or torch.jit.is_tracing():
        settings: dict = dict(pad_key=pad_key, pad_value=pad_value, backend=backend)
        query, key, value = qkv.unbind(3)
        return na2d(query, key, value, kernel_size, dilation, rpb, scale, **settings)
    query, key, value = qkv.detach().unbind(3)  # to look at alone
    extras = (rpb, pad_key, pad_value)
    kernel_size, dilation, scale = checked(query, key, value, *extras, kernel_size, dilation, scale, backend)
    out, _ = torch.ops.nat_dense.na2d_qkv(qkv, *extras, list(kernel_size), list(dilation), scale, backend, needs_grad)
    return out


def na2d_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Pair,
    dilation: int | Pair,
    rpb: Tensor | None,
    scale: float,
    rows: Pair,
    *,
    backend: str = "auto",
) -> Tensor:
    """Some rows of what `na2d` returns, for models that take their maps band by band. Without gradients or autocast.

    Args:
        query, key, value, kernel_size, dilation, rpb, scale, backend: As in `na2d`.
        rows: (first, last): the rows [first, last) are computed; on back ends that can't, all are, and dropped.

    Returns:
        [B, last - first, W, heads, head_dim].

    Raises:
        ValueError: As `na2d`, or there are no such rows.
        RuntimeError: As `na2d`, or a gradient would be lost.
    """
    kernel_size, dilation, scale = checked(query, key, value, rpb, None, None, kernel_size, dilation, scale, backend)
    if not 0 <= rows[0] < rows[1] <= query.shape[1]:
        raise ValueError(f"rows={rows}: expected first < last in a map of {query.shape[1]} rows")
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, rpb))
    if needs_grad or is_transformed():
        raise RuntimeError("na2d_rows has no gradient: call na2d, or use torch.no_grad()")
    return torch.ops.nat_dense.na2d_rows(
        query, key, value, rpb, list(kernel_size), list(dilation), scale, list(rows), backend
    )


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or a forward-mode gradient is under way.

    Neither reaches through operators that have a gradient rule of their own, or none: a tangent would be lost without
    a word.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_exported() -> bool:
    """Whether torch.export is reading the code.

    `torch.compiler.is_exporting()` says so of torch.compile too, up to torch 2.11.
    """
    return torch.compiler._is_exporting_flag


# --- registration -----------------------------------------------------------------------------------------------------

_EXTRAS = "Tensor? rpb, Tensor? pad_key, Tensor? pad_value"
_SETTINGS = "int[2] kernel_size, int[2] dilation, float scale, str backend"
_FORWARD_SETTINGS = f"{_SETTINGS}, bool? needs_grad"  # None: unknown until it runs
_OUTPUTS = "(Tensor out, Tensor lse)"
torch.library.define(
    "nat_dense::na2d", f"(Tensor query, Tensor key, Tensor value, {_EXTRAS}, {_FORWARD_SETTINGS}) -> {_OUTPUTS}"
)
torch.library.define("nat_dense::na2d_qkv", f"(Tensor qkv, {_EXTRAS}, {_FORWARD_SETTINGS}) -> {_OUTPUTS}")
torch.library.define(
    "nat_dense::na2d_backward",
    f"(Tensor grad_out, Tensor query, Tensor key, Tensor value, {_EXTRAS}, Tensor out, Tensor lse, {_SETTINGS}) "
    "-> (Tensor grad_qkv, Tensor grad_rpb, Tensor grad_pad_key, Tensor grad_pad_value)",
)
torch.library.define(
    "nat_dense::na2d_rows",
    "(Tensor query, Tensor key, Tensor value, Tensor? rpb, int[2] kernel_size, int[2] dilation, float scale, "
    "int[2] rows, str backend) -> Tensor",
)


def _run(pass_name, tensors, rpb, kernel_size, dilation, scale, backend, needs_grad, rows=None):
    """Chooses the back end and calls it with tensors whose head_dim has unit stride."""
    needs_lse = _needs_lse(needs_grad)
    if needs_grad is None:
        needs_grad = _any_requires_grad(tensors)
    # Not `contiguous`, which leaves any stride to a dimension of size 1.
    tensors = [t if t is None or t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format) for t in tensors]
    kernel_size, dilation = tuple(kernel_size), tuple(dilation)
    query = tensors[0] if pass_name == "forward" else tensors[1]
    problem = Problem.of(query, rpb, kernel_size, dilation, needs_grad)
    # Back ends ask what the current GPU can run. (Without one, the context alone would cost half a microsecond.)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        row, variant = backends.select(problem, backend)
    keywords: dict = {"variant": variant} if row.variants else {}
    if rows is not None and row.takes_rows:
        keywords["rows"] = rows
    if not needs_lse and row.spares_lse:
        keywords["needs_lse"] = False
    return getattr(row, pass_name)(*tensors, kernel_size, dilation, scale, **keywords)


def _any_requires_grad(tensors) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _forward(tensors, kernel_size, dilation, scale, backend, needs_grad):
    query, rpb = tensors[0], tensors[3]
    if query.numel() == 0:
        return _empty_outputs(query, needs_grad)
    out, lse = _run("forward", tensors, rpb, kernel_size, dilation, scale, backend, needs_grad)
    if not _needs_lse(needs_grad) and lse.numel() > 0:  # of a back end that can't spare them
        lse = lse.new_empty(0)
    return out, lse


def _needs_lse(needs_grad: bool | None) -> bool:
    """Where nothing is known, a compiler may separate from their gradients what gets here: log-sum-exps are kept."""
    return needs_grad is not False


def _empty_outputs(query, needs_grad):
    lse_shape = query.shape[:4] if _needs_lse(needs_grad) else (0,)
    return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=accumulation_dtype(query.dtype))


@torch.library.impl("nat_dense::na2d", "CompositeExplicitAutograd")
def _na2d(query, key, value, rpb, pad_key, pad_value, kernel_size, dilation, scale, backend, needs_grad):
    return _forward((query, key, value, rpb, pad_key, pad_value), kernel_size, dilation, scale, backend, needs_grad)


@torch.library.impl("nat_dense::na2d_qkv", "CompositeExplicitAutograd")
def _na2d_qkv(qkv, rpb, pad_key, pad_value, *settings):
    return _forward((*qkv.unbind(3), rpb, pad_key, pad_value), *settings)


@torch.library.register_fake("nat_dense::na2d")
def _na2d_fake(query, *others):
    return _empty_outputs(query, others[-1])


@torch.library.register_fake("nat_dense::na2d_qkv")
def _na2d_qkv_fake(qkv, *others):
    return _empty_outputs(qkv.select(3, 0), others[-1])


@torch.library.impl("nat_dense::na2d_rows", "CompositeExplicitAutograd")
def _na2d_rows(query, key, value, rpb, kernel_size, dilation, scale, rows, backend):
    if query.numel() == 0:
        return query[:, slice(*rows)].clone()
    tensors = (query, key, value, rpb, None, None)
    out, _ = _run("forward", tensors, rpb, kernel_size, dilation, scale, backend, False, tuple(rows))
    return out[:, slice(*rows)]


@torch.library.impl("nat_dense::na2d_backward", "CompositeExplicitAutograd")
def _na2d_backward(
    grad_out, query, key, value, rpb, pad_key, pad_value, out, lse, kernel_size, dilation, scale, backend
):
    if query.numel() == 0:
        return tuple(gradient.zero_() for gradient in _empty_gradients(query, rpb, pad_key, pad_value))
    tensors = (grad_out, query, key, value, rpb, pad_key, pad_value, out, lse)
    gradients = _run("backward", tensors, rpb, kernel_size, dilation, scale, backend, True)
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.register_fake("nat_dense::na2d_backward")
def _na2d_backward_fake(_grad_out, query, _key, _value, rpb, pad_key, pad_value, *_others):
    return _empty_gradients(query, rpb, pad_key, pad_value)


def _empty_gradients(query, *extras):
    grad_qkv = query.new_empty(*query.shape[:3], 3, *query.shape[3:])
    return grad_qkv, *(query.new_empty(0) if t is None else t.new_empty(t.shape) for t in extras)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.dilation, ctx.scale, ctx.backend, needs_grad = inputs
    if needs_grad is False:
        raise RuntimeError(
            "needs_grad=False rules a gradient out, and one is asked for: expected True or None. A program that was "
            "traced under torch.no_grad() has to be traced without it"
        )
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_out, _grad_lse):
    """Of the tokens, one tensor or three as they came, and of the small tensors."""
    *tokens, rpb, pad_key, pad_value, out, lse = ctx.saved_tensors
    extras, is_packed = (rpb, pad_key, pad_value), len(tokens) == 1
    query, key, value = tokens[0].unbind(3) if is_packed else tokens
    grad_qkv, *grad_extras = torch.ops.nat_dense.na2d_backward(
        grad_out, query, key, value, *extras, out, lse, ctx.kernel_size, ctx.dilation, ctx.scale, ctx.backend
    )
    grad_tokens = (grad_qkv,) if is_packed else grad_qkv.unbind(3)
    wanted = (gradient if t is not None else None for gradient, t in zip(grad_extras, extras, strict=True))
    return *grad_tokens, *wanted, None, None, None, None, None


def _refuse_second_derivative(_ctx, *_grads):
    raise RuntimeError("na2d has no second derivative; nat_dense.ops.reference.forward on plain tensors has")


torch.library.register_autograd("nat_dense::na2d_backward", _refuse_second_derivative)


def _autocast(operator, device_type: str):
    """Calls an operator as autocast wants it."""

    def cast(*arguments):
        *tokens, rpb, pad_key, pad_value, kernel_size, dilation, scale, backend, needs_grad = arguments
        tokens, extras = _lowered(tokens, (rpb, pad_key, pad_value), torch.get_autocast_dtype(device_type))
        with torch.amp.autocast(device_type, enabled=False):
            return operator(*tokens, *extras, kernel_size, dilation, scale, backend, needs_grad)

    return cast


def _lowered(tokens, extras, dtype: torch.dtype) -> tuple[list, list]:
    """The tokens in autocast's dtype, unless they are float64; the small tensors keep float32, which kernels accept."""
    lowered = [t if t.dtype is torch.float64 else t.to(dtype) for t in tokens]
    kept = (lowered[0].dtype, torch.float32)
    return lowered, [t if t is None or t.dtype in kept else t.to(torch.float32) for t in extras]


def _outside_autocast(operator, device_type: str):
    """Gradients are computed as the forward pass was, also where the backward pass runs under autocast."""

    def call(*arguments):
        with torch.amp.autocast(device_type, enabled=False):
            return operator(*arguments)

    return call


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for _operator in (torch.ops.nat_dense.na2d, torch.ops.nat_dense.na2d_qkv):
        torch.library.impl(f"nat_dense::{_operator.__name__}", _key)(_autocast(_operator, _device))
    torch.library.impl("nat_dense::na2d_backward", _key)(_outside_autocast(torch.ops.nat_dense.na2d_backward, _device))
for _name in ("nat_dense::na2d", "nat_dense::na2d_qkv"):
    torch.library.register_autograd(_name, _gradients, setup_context=_setup_context)
