"""The Triton kernels compiled for GPUs that are not there: what the launcher passes, for what it is typed to be.

The interpreter runs kernels as Python, which takes much that Triton's compiler refuses.
"""

import importlib.util
import os
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nat_dense.models import add_norm, gelu
from nat_dense.ops import triton_na2d
from tests.ops.cases import Case

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

SMALLEST_SHARED = 99 << 10
"""Bytes of shared memory that a program may have on the GPUs of 8.6, 8.9 and 12.0."""

PLAIN = Case("plain", (64, 80), strided=True)
SLOW = pytest.mark.slow
COMPILED = (
    pytest.param(PLAIN, torch.bfloat16, id="plain, bfloat16"),
    pytest.param(PLAIN, torch.float32, id="plain, float32"),
    pytest.param(Case("", (1, 1), heads=1, padded=True, dim=16), torch.float16, id="one padded token of one head"),
    pytest.param(Case("", (33, 40), (3, 7), (2, 3), heads=1, dim=24, rpb=False), torch.bfloat16, id="pairs, no bias"),
    pytest.param(Case("", (9, 10), (3, 3), heads=1, dim=1), torch.bfloat16, id="one channel", marks=SLOW),
    pytest.param(Case("", (40, 70), (13, 13), dim=128), torch.bfloat16, id="largest", marks=SLOW),
    pytest.param(Case("", (40, 70), (13, 13), dim=64), torch.float32, id="largest, float32", marks=SLOW),
    pytest.param(Case("", (40, 70), (13, 13), dim=128), torch.float32, id="widest, float32", marks=SLOW),
)


class Gpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 1000 + self.capability  # kernels are kept by device: none that is there

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def kernels(monkeypatch) -> list:
    """Kernels in the order in which launchers call them: compiled and not launched."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels = []
    run = JITFunction.run
    active = "active" if "active" in vars(driver) else "_active"  # a property since Triton 3.5
    monkeypatch.setattr(driver, active, getattr(driver, active))

    def compile_only(self, *args, warmup, grid, **options):
        assert all(programs <= 65_535 for programs in grid[1:]), f"{self.__name__}: CUDA launches no grid of {grid}"
        kernels.append(run(self, *args, warmup=True, grid=grid, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return kernels


@pytest.fixture
def compile_for(kernels):
    """A function that runs forward and backward of a case in the launcher: three kernels."""
    from triton.runtime import driver

    def compile_for(capability: int, case: Case, dtype: torch.dtype, variant: str = "") -> list:
        kernels.clear()
        driver.set_active(Gpu(capability))
        tensors = {n: None if t is None else t.detach() for n, t in case.tensors(dtype).items()}
        grad_out = tensors.pop("grad_out")
        settings = (case.kernel_size, case.dilation, 1.0, variant)
        out, lse = triton_na2d.forward(*tensors.values(), *settings)
        triton_na2d.backward(grad_out, *tensors.values(), out, lse, *settings)
        names = [kernel.name for kernel in kernels]
        assert names[:3] == ["forward_kernel", "query_gradient_kernel", "key_gradient_kernel"]
        assert set(names[3:]) <= {"sum_kernel"}
        return list(kernels)

    return compile_for


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("case", "dtype"), COMPILED)
def test_compiles_within_the_shared_memory(case, dtype, capability, compile_for):
    for kernel in compile_for(capability, case, dtype):
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SMALLEST_SHARED


class TokensCopied(TorchDispatchMode):
    """The operations inside it that make tokens of tokens, but for the rounding of the cases' own."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copies = func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy)
        if copies and out.dim() >= 5 and args[0].dtype is not torch.float64:
            self.names.append(str(func))
        return out


def test_views_of_one_projection_are_not_copied(compile_for):
    with TokensCopied() as copied:
        compile_for(90, PLAIN, torch.bfloat16)
    assert copied.names == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 89, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiles_for_other_gpus(dtype, capability, compile_for):
    assert all(kernel.metadata.shared <= SMALLEST_SHARED for kernel in compile_for(capability, PLAIN, dtype))


def test_more_heads_than_a_launch_axis_has(compile_for):
    """The grids are checked wherever a kernel is called."""
    assert len(compile_for(90, Case("", (8, 8), (3, 3), heads=70_000, dim=1), torch.bfloat16)) == 4


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gelu_takes_16_bytes_at_a_time(dtype, capability, kernels):
    """At the widths of published models, which share a kernel."""
    from triton.runtime import driver

    driver.set_active(Gpu(capability))
    for shape in ((2, 70, 192), (33, 1536)):
        gelu.launch_backward(*torch.randn(2, *shape).to(dtype))
    first, second = (kernel for kernel in kernels if kernel.name == "gelu_backward_kernel")
    assert first is second
    assert first.metadata.shared <= SMALLEST_SHARED
    code = first.asm["ptx"]
    block = gelu.BLOCK_ROWS * gelu.BLOCK_COLUMNS * dtype.itemsize
    wide = 2 * block // (16 * 32 * gelu.WARPS)  # of two maps, for each thread
    assert re.findall(r"ld\.global\S*", code) == ["ld.global.v4.b32"] * wide
    assert re.findall(r"st\.global\S*", code) == ["st.global.v4.b32"] * wide + ["st.global.b32"]  # the sums


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("keep", [False, True])
def test_a_layer_takes_16_bytes_at_a_time(keep, capability, kernels):
    from triton.runtime import driver

    driver.set_active(Gpu(capability))
    for depth, channels in ((64, 192), (512, 1536)):
        shapes = ((2, 70, depth), (channels, depth), (channels,))
        gelu.launch_forward(*(torch.randn(shape).bfloat16() for shape in shapes), keep)
    assert kernels[0] is kernels[1]
    assert kernels[0].metadata.shared <= SMALLEST_SHARED
    code = kernels[0].asm["ptx"]
    assert set(re.findall(r"cp\.async\.c[ag]\S* .*?, (0x\w+|\d+)[,;]", code)) == {"0x10"}
    stores = re.findall(r"st\.global\S*", code)
    rows, columns, _ = gelu.FORWARD["BLOCK"]
    assert stores == ["st.global.v4.b32"] * ((1 + keep) * rows * columns * 2 // (16 * 32 * gelu.FORWARD["num_warps"]))
    assert ("wgmma" in code) == (capability == 90)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels", [64, 512])
def test_a_joined_norm_takes_four_numbers_at_a_time(channels, capability, kernels):
    """In four bytes and in two, at the widths of published models; what has one number a channel or a token apart."""
    from triton.runtime import driver

    driver.set_active(Gpu(capability))
    for size in ((9, 11), (8, 5)):
        wide, narrow = torch.randn(2, *size, channels), torch.randn(2, *size, channels).bfloat16()
        vector, factor, stats = torch.randn(channels), torch.ones(2), torch.randn(2, *size, 2)
        add_norm.launch_forward(wide, narrow, vector, None, factor, vector, vector, 1e-5, torch.bfloat16)
        add_norm.launch_backward(wide, narrow, wide, stats, narrow, vector, None, factor, vector)
    forward, again = (kernel for kernel in kernels if kernel.name == "add_norm_kernel")
    assert forward is again
    backward, again = (kernel for kernel in kernels if kernel.name == "add_norm_backward_kernel")
    assert backward is again
    assert max(forward.metadata.shared, backward.metadata.shared) <= SMALLEST_SHARED
    loads = re.findall(r"ld\.global\.v\S*", backward.asm["ptx"])
    assert loads.count("ld.global.v4.b32") >= 2  # the sum and its gradient
    assert "ld.global.v2.b32" in loads  # the gradient of the norm
    loads = re.findall(r"ld\.global\.v\S*", forward.asm["ptx"])
    elements, threads = add_norm.FORWARD["elements"], 32 * add_norm.FORWARD["num_warps"]
    assert loads.count("ld.global.v4.b32") >= (4 + 2) * elements // (16 * threads)


def test_a_joined_norm_of_an_odd_width_compiles(kernels):
    from triton.runtime import driver

    driver.set_active(Gpu(80))
    for width in (1, 65, 1500):
        x, vector, factor = torch.randn(2, 5, width), torch.randn(width), torch.ones(2)
        stats = torch.randn(2, 5, 2)
        for branch, extras in ((None, (None,) * 3), (x, (vector, vector, factor)), (x, (None, vector, None))):
            add_norm.launch_forward(x, branch, *extras, vector, vector, 1e-5, torch.float16)
            grad = None if branch is None else x
            add_norm.launch_backward(grad, x, x, stats, branch, *extras, vector)
    assert all(kernel.asm["cubin"] for kernel in kernels)


def test_a_gelu_of_an_odd_width_compiles(kernels):
    from triton.runtime import driver

    driver.set_active(Gpu(80))
    for width in (1, 65):
        gelu.launch_backward(*torch.randn(2, 5, width))
        gelu.launch_forward(*(torch.randn(shape).half() for shape in ((5, 3), (width, 3), (width,))), True)
    assert all(kernel.asm["cubin"] for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("variant", triton_na2d.VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tile_compiles(variant, dtype, compile_for):
    for kernel in compile_for(80, Case("", (64, 80), dim=32), dtype, variant):
        assert kernel.metadata.shared <= SMALLEST_SHARED


def test_maps_of_many_sizes_share_their_kernels(compile_for):
    """Training at many scales would wait for a compiler otherwise."""
    sizes = ((64, 80), (65, 77), (128, 16), (7, 7))
    sets = [
        compile_for(80, Case("", size, heads=heads, strided=True), torch.bfloat16, "4x8")
        for size, heads in zip(sizes, (2, 1, 16, 3), strict=True)
    ]
    for found in sets[1:]:
        assert {id(kernel) for kernel in found} <= {id(kernel) for kernel in sets[0]}
