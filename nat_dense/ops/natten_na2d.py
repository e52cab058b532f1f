"""The NATTEN back end: its fused CUDA kernels, for inference without a relative position bias.

NATTEN dropped the bias and its CPU kernels in 0.20. What is installed is found out by its features: `na2d` by its
arguments, the kernels by NATTEN's own word on what it was built with and what the GPU can run.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from types import ModuleType

import torch
from torch import Tensor

from nat_dense.ops.problem import Pair, Problem, why_no_gpu

VARIANTS = ("flex",)
"""NATTEN's path through torch's flex_attention, on any device: slow, and what proves the adapter without a GPU."""

_NEEDED = ("kernel_size", "dilation", "scale", "backend", "return_lse")
_FLEX = "flex-fna"


def why_not(problem: Problem, variant: str) -> str | None:
    """Why NATTEN can't run a problem, or None where it can. `variant` is one of `VARIANTS` or empty."""
    if problem.has_rpb:
        return "NATTEN has no relative position bias"
    if problem.is_padded:
        return f"NATTEN takes no map smaller than kernel_size * dilation, and this one counts as {problem.padded_size}"
    if problem.needs_grad:
        return "a gradient is asked for, and NATTEN's backward pass only follows a forward pass under its own autograd"
    if not variant and problem.device != "cuda":
        return f"the tensors are on {problem.device}, and NATTEN's fused kernels run on CUDA devices only"
    reason = _why_not_usable()
    if reason is not None:
        return reason
    if not variant and not _load().HAS_LIBNATTEN:
        return "the installed NATTEN was built without its CUDA kernels (HAS_LIBNATTEN is False)"
    if problem.device == "cuda" and (reason := why_no_gpu()):
        return reason
    device = torch.device(problem.device, torch.cuda.current_device() if problem.device == "cuda" else 0)
    names = _names(problem.dtype, problem.head_dim, device)
    if not (_FLEX in names if variant else set(names) - {_FLEX}):
        what = "flex path takes no" if variant else "fused kernels on this GPU take no"
        return f"NATTEN's {what} {problem.dtype} with head_dim {problem.head_dim}"
    return None


@functools.cache
def _why_not_usable() -> str | None:
    if importlib.util.find_spec("natten") is None:
        return "NATTEN is not installed: `pip install natten --no-build-isolation`"
    try:
        natten = _load()
    except Exception as error:  # its import runs a compiled extension and checks of its own
        return f"NATTEN can't be imported ({type(error).__name__}: {error})"
    function = getattr(natten, "na2d", None)
    arguments = inspect.signature(function).parameters if function else ()
    missing = [name for name in _NEEDED if name not in arguments]
    if missing or not hasattr(natten, "HAS_LIBNATTEN"):
        return f"the installed NATTEN is too old: its na2d lacks {', '.join(missing) or 'HAS_LIBNATTEN'}"
    try:
        from natten.backends import get_compatible_backends  # noqa: F401  (`_names` asks it)
    except ImportError as error:
        return f"the installed NATTEN doesn't say what it can run ({error})"
    return None


@functools.cache
def _load() -> ModuleType:
    import natten

    return natten


@functools.cache
def _names(dtype: torch.dtype, head_dim: int, device: torch.device) -> tuple[str, ...]:
    """NATTEN's names of what runs such tensors there, by its own checks."""
    from natten.backends import get_compatible_backends

    sample = torch.empty(1, 1, 1, 1, head_dim, dtype=dtype, device=device)
    return tuple(get_compatible_backends(sample, sample, sample, torch_compile=False))


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
    variant: str = "",
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`, for problems that `why_not` lets pass; the other arguments go unused."""
    if scale == 0:
        # NATTEN takes a scale of 0 for none given; of a query of 0 it makes the same logits.
        query = torch.zeros_like(query)
    out, lse = _load().na2d(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        kernel_size=kernel_size,
        dilation=dilation,
        scale=scale,
        backend=_FLEX if variant else None,
        return_lse=True,
    )
    return out, lse.contiguous()
