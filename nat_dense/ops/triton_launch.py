"""What all kernels in Triton share: where they can run, how precisely they multiply, and the sum of their parts."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from nat_dense.ops.problem import why_no_gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_GPU = (8, 0)
"""Compute capability from which Triton supports NVIDIA's GPUs."""

SUM_BLOCK = 512, 8
LONGEST_RUN, SHORTEST_RUN = 2048, 512
"""Parts that one program adds up: more are shared out among several first."""


@functools.cache
def kernels() -> ModuleType:
    from nat_dense.ops import triton_kernels

    return triton_kernels


@functools.cache
def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when triton was imported)."""
    from triton.runtime.jit import JITFunction  # the interpreter itself needs numpy, which compiled kernels don't

    return not isinstance(kernels().forward_kernel, JITFunction)


def why_no_kernels(device: str) -> str | None:
    """Why no kernel in Triton can run on a type of device, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton`"
    if interpreted():
        return None
    if device != "cuda":
        return f"the tensors are on {device}, not on a GPU (TRITON_INTERPRET=1 runs the kernels there, slowly)"
    if reason := why_no_gpu():
        return reason
    if torch.version.hip is not None:
        return "the kernels have not been tried on AMD's GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_GPU:
        found, needed = (".".join(map(str, pair)) for pair in (capability, OLDEST_GPU))
        return f"the GPU has compute capability {found}; Triton needs {needed}"
    return None


def power_of_two(n: int) -> int:
    """The least of at least n."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def processors(x: Tensor) -> int:
    """How many multiprocessors run the kernels on x: in the interpreter one."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def product_precision(dtype: torch.dtype) -> str:
    """Of products of float32: tf32 where torch's own matrix products may use it, else three of them for one.

    Three products of tf32 halves have an error like float32's. Triton's products in true float32 run outside the
    matrix units, which takes far more registers than a program has. With tokens in two bytes the only such products
    are sums of rounded numbers.
    """
    if dtype is torch.bfloat16 and interpreted():
        return "widened"
    if dtype is not torch.float32:
        return "tf32"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch >= 2.9; reading the older setting may raise there
        return "tf32" if matmul.fp32_precision == "tf32" else "tf32x3"
    return "tf32" if matmul.allow_tf32 else "tf32x3"


def add_up(parts: Tensor) -> Tensor:
    """The sum over the first axis of float32 [n, ...], contiguous; the same bits in every run.

    torch's own sum takes up to four times as long where the first axis is the long one.
    """
    while len(parts) > 1:
        runs = 1 if len(parts) <= LONGEST_RUN else cdiv(len(parts), SHORTEST_RUN)
        totals = torch.empty(runs, *parts.shape[1:], dtype=parts.dtype, device=parts.device)
        columns = totals[0].numel()
        with torch.cuda.device_of(parts):
            kernels().sum_kernel[(runs * cdiv(columns, SUM_BLOCK[1]),)](
                parts, totals, len(parts), columns, cdiv(len(parts), runs), runs, BLOCK=SUM_BLOCK
            )
        parts = totals
    return parts[0]
