"""The native CPU back end: loads the compiled kernels of `csrc/` and says why where they are missing."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from nat_dense.ops.problem import Pair, Problem

VARIANTS = ("avx512", "avx2", "portable")
"""Instruction sets, the fastest first; without a variant the best that the processor has is taken."""

LARGEST_KERNEL = 13

_OPERATORS = {"instruction_sets": 0, "forward": 13, "backward": 12, "linear_gradient": 4, "gelu_backward_": 3}
"""What the kernels are called by, and the number of arguments, by which older ones are told."""

_FOLDER = Path(__file__).parent
_BUILD = "pip install -e . --no-build-isolation"


@functools.cache
def _load() -> str | None:
    """Loads the kernels once per process: why they can't be used, or None."""
    library = next((path for path in (_FOLDER / "_cpu.so", _FOLDER / "_cpu.pyd") if path.exists()), None)
    if library is None:
        return f"the native kernels are not built ({_why_not_built()}): build them with `{_BUILD}`"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the native kernels don't load, perhaps because torch was changed ({error}): build them with `{_BUILD}`"
    others = [name for name, count in _OPERATORS.items() if _count_arguments(name) != count]
    if others:
        names = ", ".join(others)
        return f"the native kernels were built from other sources, with another {names}: build them with `{_BUILD}`"
    torch.library.register_fake("nat_dense_cpu::linear_gradient", _linear_gradient_fake)
    torch.library.register_fake("nat_dense_cpu::gelu_backward_", lambda _grad, x, _variant: torch.empty_like(x))
    return None


def _count_arguments(name: str) -> int | None:
    operator = getattr(torch.ops.nat_dense_cpu, name, None)
    return None if operator is None else len(operator.default._schema.arguments)


def _why_not_built() -> str:
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++", "cl"]
    found = next((path for path in map(shutil.which, compilers) if path), None)
    compiler = f"the compiler {found} was found" if found else f"no C++ compiler was found among {', '.join(compilers)}"
    note = _FOLDER / "_cpu_build_failure.txt"  # written by setup.py
    if not note.exists():
        return compiler
    return f"the build failed: {note.read_text(encoding='utf-8').strip()[:500]}; {compiler}"


def why_not(problem: Problem, variant: str) -> str | None:
    """Why the kernels can't run a problem, or None where they can. `variant` is one of `VARIANTS` or empty."""
    if problem.device != "cpu":
        return f"the tensors are on {problem.device}, not on the CPU"
    if max(problem.kernel_size) > LARGEST_KERNEL:
        return f"kernel_size {problem.kernel_size} is larger than {LARGEST_KERNEL}"
    reason = _load()
    if reason is not None:
        return reason
    if variant and variant not in (available := torch.ops.nat_dense_cpu.instruction_sets()):
        return f"this processor, or the value of ATEN_CPU_CAPABILITY, has no {variant}, only {', '.join(available)}"
    return None


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
    rows: Pair | None = None,
    needs_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`, with the instruction set of `variant`.

    `rows` (first, last) computes only the rows [first, last) of the results; the others are left as memory has them.
    Without `needs_lse` the log-sum-exps, which take a twentieth of the time, are left out: their tensor is empty.
    """
    first, last = (0, query.shape[1]) if rows is None else rows
    return torch.ops.nat_dense_cpu.forward(
        query, key, value, rpb, pad_key, pad_value, kernel_size, dilation, scale, first, last, needs_lse, variant
    )


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: Pair,
    dilation: Pair,
    scale: float,
    variant: str = "",
) -> tuple[Tensor | None, ...]:
    """As `reference.backward`, with the instruction set of `variant`. Needs no `out`: it recomputes the weights."""
    gradients = iter(
        torch.ops.nat_dense_cpu.backward(
            grad_out, query, key, value, rpb, pad_key, pad_value, lse, kernel_size, dilation, scale, variant
        )
    )
    return next(gradients), *(None if t is None else next(gradients) for t in (rpb, pad_key, pad_value))


def linear_gradient(grad: Tensor, x: Tensor, needs_bias: bool, variant: str = "") -> tuple[Tensor, Tensor | None]:
    """The gradients of the weight and the bias of a linear layer, where `is_available`. Without gradients of their own.

    Args:
        grad: [..., out_features], of the output; float32 or float64, as x.
        x: [..., in_features].
        needs_bias: Whether the bias's is wanted; else None takes its place.
        variant: One of `VARIANTS`; without one the best that the processor has.

    Returns:
        [out_features, in_features] and [out_features].
    """
    weight, bias = torch.ops.nat_dense_cpu.linear_gradient(grad, x, needs_bias, variant)
    return weight, bias if needs_bias else None


def _linear_gradient_fake(grad, x, needs_bias, _variant):
    outputs = grad.shape[-1]
    return x.new_empty(outputs, x.shape[-1]), x.new_empty(outputs if needs_bias else 0)


def gelu_backward_(grad: Tensor, x: Tensor, variant: str = "") -> Tensor:
    """The exact GELU of x, where `is_available`. Without a gradient of its own.

    Args:
        grad: [...], the gradient of the GELU; float32. Overwritten with the gradient of x.
        x: [...], as grad.
        variant: As in `linear_gradient`.
    """
    return torch.ops.nat_dense_cpu.gelu_backward_(grad, x, variant)


def is_available() -> bool:
    """Whether the kernels are built and load."""
    return _load() is None
