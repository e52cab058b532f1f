"""Where the Triton kernels of these tests run: on a GPU, in Triton's interpreter on the CPU, or not at all."""

import os

import pytest
import torch

from nat_dense.ops import triton_launch

HAS_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if HAS_GPU else "cpu"
REASON = triton_launch.why_no_kernels(DEVICE)
needs_kernel = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")


def count_launches(monkeypatch, module) -> list:
    """One entry for each launch of a kernel by a module's launchers."""
    calls = []
    for name in ("launch_forward", "launch_backward"):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, launch=launch: calls.append(1) or launch(*args))
    return calls
