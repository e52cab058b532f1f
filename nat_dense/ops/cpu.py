"""The native CPU back end: loads the compiled kernels of `csrc/` and says why where they are missing."""

from __future__ import annotations

from nat_dense.ops.problem import Problem

VARIANTS = ("avx512", "avx2", "portable")


def why_not(problem: Problem, variant: str) -> str | None:
    return "the native kernels are not built"


def forward(*args, variant: str = ""):
    raise RuntimeError("not built")


def backward(*args, variant: str = ""):
    raise RuntimeError("not built")
