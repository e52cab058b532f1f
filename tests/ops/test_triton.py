"""The Triton kernels against the reference in float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before anything imports triton: `TRITON_INTERPRET=1 python -m pytest`, as `make test`
does. It takes about a tenth of a second for a program, so only small cases run without a GPU.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from nat_dense.ops import backend_report, na2d, triton_launch, triton_na2d
from nat_dense.ops.problem import Problem
from nat_dense.ops.triton_na2d import Tile, choose_tile
from tests.kernels import DEVICE, HAS_GPU
from tests.ops.cases import CASES, Case, assert_close, expected

REASON = triton_na2d.why_not(Problem((9, 9), (3, 3), (1, 1), 16, torch.float32, DEVICE, True), "")
needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-9}
"""Weights and gradients of logits are rounded to the tokens' dtype; the interpreter rounds bfloat16 toward zero."""

SMALL = (
    Case("one tile", (6, 7), (5, 3), dim=16, heads=1),
    Case("tiles in both axes, odd head_dim", (9, 11), (5, 5), dim=19, heads=1),
    Case("ragged groups", (7, 8), (3, 3), (2, 2), dim=8, heads=1),
    Case("kernel pair, views of a fused qkv", (9, 8), (3, 7), heads=2, dim=8, strided=True),
    Case("no bias, batch", (5, 6), (3, 5), batch=2, heads=1, dim=24, rpb=False),
    Case("largest window", (14, 14), (13, 13), dim=8, heads=1),
    Case("padded", (4, 9), (7, 7), dim=16, heads=1, padded=True, batch=2),
    Case("padded, dilated", (3, 5), (3, 5), (2, 2), dim=16, heads=1, padded=True),
    Case("one token", (1, 1), padded=True, heads=1, rpb=False),
)


def run(case: Case, dtype: torch.dtype, backend: str = "triton") -> dict[str, torch.Tensor]:
    """Output and gradients, on the CPU."""
    tensors = case.tensors(dtype, device=DEVICE)
    grad_out = tensors.pop("grad_out")
    leaves = {name: t for name, t in tensors.items() if t is not None}
    out = na2d(kernel_size=case.kernel_size, dilation=case.dilation, backend=backend, **tensors)
    gradients = torch.autograd.grad(out, leaves.values(), grad_out)
    return {"out": out.detach().cpu()} | {n: g.cpu() for n, g in zip(leaves, gradients, strict=True)}


def named(name: str) -> Case:
    return next(case for case in SMALL if case.name == name)


@needs_kernels
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_equals_reference_in_float32(case):
    assert_close(run(case, torch.float32), expected(case, torch.float32), TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_reference_on_every_shared_case(case):
    assert_close(run(case, torch.float32), expected(case, torch.float32), TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["one tile", "no bias, batch"])
def test_equals_reference_in_low_precision(name, dtype):
    found = run(named(name), dtype)
    assert {t.dtype for t in found.values()} == {dtype}
    assert_close(found, expected(named(name), dtype), TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padded_maps_in_low_precision(dtype):
    """Gradients of logits cancel where most keys are the padded one: those are tested in float32."""
    case = named("padded")
    found, wanted = run(case, dtype), expected(case, dtype)
    exact = ("out", "value", "pad_value")
    assert_close({name: found[name] for name in exact}, {name: wanted[name] for name in exact}, TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("variant", triton_na2d.VARIANTS)
def test_every_tile(variant):
    case = Case("tiles", (5, 6), (3, 5), dim=16, heads=1)
    assert_close(run(case, torch.float32, f"triton:{variant}"), expected(case, torch.float32), 1e-5)


@needs_kernels
@pytest.mark.parametrize("name", ["one tile", "padded"])
def test_gradients_are_what_the_operator_promises(name):
    """Tensors of their own, contiguous: torch.compile goes by what the operator says of its outputs."""
    tensors = {n: t if t is None else t.detach() for n, t in named(name).tensors(torch.float32, device=DEVICE).items()}
    grad_out = tensors.pop("grad_out")
    settings = (list(named(name).kernel_size), list(named(name).dilation), 0.3, "triton")
    outputs = torch.ops.nat_dense.na2d(*tensors.values(), *settings, True)
    arguments = (grad_out, *tensors.values(), *outputs, *settings)
    torch.library.opcheck(
        torch.ops.nat_dense.na2d_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    leaves = [t if t is None else t.requires_grad_() for t in tensors.values()]
    torch.library.opcheck(torch.ops.nat_dense.na2d.default, (*leaves, *settings, True))


@needs_kernels
def test_same_bits_in_every_run():
    case = named("padded")
    first, second = run(case, torch.float32), run(case, torch.float32)
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_kernels
def test_every_element_of_every_output_is_written():
    """Fresh memory is filled with NaN."""
    case = named("ragged groups")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        found = run(case, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, expected(case, torch.float32), TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 3), (300, 2, 13, 13), (2049, 17)])
def test_adds_up(shape):
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch.testing.assert_close(triton_launch.add_up(parts), parts.double().sum(0).float(), rtol=1e-5, atol=1e-4)


@needs_kernels
def test_log_sum_exp():
    case = named("padded, dilated")
    tensors = {n: None if t is None else t.detach() for n, t in case.tensors(torch.float32, device=DEVICE).items()}
    tensors.pop("grad_out")
    settings = (list(case.kernel_size), list(case.dilation), 0.3)
    found, wanted = (
        torch.ops.nat_dense.na2d(*tensors.values(), *settings, backend, True)[1] for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.skipif(HAS_GPU, reason="test_gpu.py has offsets of this size in memory that is really there")
@pytest.mark.parametrize("axis", [1, 2, 3], ids=["rows", "columns", "heads"])
def test_offsets_beyond_32_bits(axis):
    """The third row, column or head begins 2**31 numbers after the first, in memory that is mostly left untouched."""
    heads, dim, apart = 3, 8, 2**30
    room = torch.empty(2 * apart + 27 * dim, dtype=torch.float16)
    strides = [27 * dim, 9 * dim, 3 * dim, dim, 1]
    strides[axis] = apart
    far = room.as_strided((1, 3, 3, heads, dim), strides)
    far.copy_(torch.randn(far.shape, generator=torch.Generator().manual_seed(0)))
    rpb = torch.randn(heads, 5, 5)

    def results(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        forward, backward = torch.ops.nat_dense.na2d, torch.ops.nat_dense.na2d_backward
        arguments, settings = (*[tokens] * 3, rpb, None, None), ([3, 3], [1, 1], 0.3, "triton")
        outputs = forward(*arguments, *settings, True)
        return *outputs, *backward(tokens, *arguments, *outputs, *settings)

    for found, wanted in zip(results(far), results(far.contiguous()), strict=True):
        assert torch.equal(found, wanted)


@needs_kernels
def test_logits_of_any_size():
    """Softmax neither overflows nor underflows, and a bias of -inf hides its keys."""
    case = Case("large", (6, 7), (5, 5), dim=16, heads=1)
    tensors = {n: None if t is None else t.detach() for n, t in case.tensors(torch.float32, device=DEVICE).items()}
    tensors.pop("grad_out")
    tensors["query"] *= 100
    tensors["rpb"][:, :, 6:] = -torch.inf
    found = na2d(kernel_size=5, backend="triton", **tensors)
    exact = na2d(kernel_size=5, backend="reference", **{n: t if t is None else t.double() for n, t in tensors.items()})
    assert_close({"out": found}, {"out": exact}, 1e-4)


@needs_kernels
def test_float32_bias_with_bfloat16_tokens():
    case = named("one tile")
    tensors = {n: None if t is None else t.detach() for n, t in case.tensors(torch.bfloat16, device=DEVICE).items()}
    grad_out = tensors.pop("grad_out")
    rpb = torch.randn(1, 9, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    out = na2d(kernel_size=case.kernel_size, backend="triton", **(tensors | {"rpb": rpb}))
    out.backward(grad_out)
    wide = {n: t if t is None else t.double() for n, t in tensors.items()}
    exact_rpb = rpb.detach().double().requires_grad_()
    exact = na2d(kernel_size=case.kernel_size, backend="reference", **(wide | {"rpb": exact_rpb}))
    exact.backward(grad_out.double())
    assert rpb.grad.dtype == torch.float32
    found, wanted = {"out": out.detach(), "rpb": rpb.grad}, {"out": exact.detach(), "rpb": exact_rpb.grad}
    assert_close(found, wanted, TOLERANCE[torch.bfloat16])


# --- without kernels --------------------------------------------------------------------------------------------------


def test_tiles_follow_the_group():
    """What computes the fewest pairs: strips of 4 x 4 see more of what they don't use, but fit narrow groups."""
    assert choose_tile("forward", (200, 304), (7, 7), 64, 2).owned == (4, 8)
    assert choose_tile("forward", (16, 4), (7, 7), 64, 2).owned == (8, 4)


def test_cost_counts_the_pairs_of_every_tile():
    """Strips of 2 x 8 queries see 8 x 14 keys, two blocks of 4 x 16; 24 x 20 tokens take 6 x 3 tiles."""
    tile = Tile((4, 8), (2, 8), (4, 16))
    assert tile.warps == 2
    assert tile.cost((24, 20), (7, 7)) == 6 * 3 * 32 * (2 * 64)


@pytest.mark.parametrize("kernel", triton_na2d.KERNELS)
@pytest.mark.parametrize("variant", triton_na2d.VARIANTS)
@pytest.mark.parametrize("token_bytes", [64, 128, 256, 512])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fill_the_matrix_units(kernel, variant, token_bytes, itemsize):
    """A warp's products are 16 tokens high and sum over 16 at least; a tile is a stack of strips."""
    tile = Tile.of(kernel, variant, token_bytes, itemsize)
    assert tile.strip[0] * tile.strip[1] >= 16
    assert tile.block[0] * tile.block[1] >= 16
    assert tile.owned == (tile.warps * tile.strip[0], tile.strip[1])
    if kernel == "query_gradient":  # which sums the bias's gradient over pairs of rows, doubled at most once
        assert tile.owned[0] * tile.block[0] >= 8


def test_offsets_are_wide_where_they_must_be():
    near = torch.empty(1, 9, 9, 2, 16, device="meta")
    far = torch.empty_strided(near.shape, (0, 2**25, 32, 16, 1), device="meta")
    strides = triton_na2d._strides((1, 1), query=near, key=near, value=near)
    assert (strides["OFFSET"].primitive_bitwidth, strides["value_strides"]) == (32, None)
    strides = triton_na2d._strides((1, 1), query=near, key=near, value=far)
    assert (strides["OFFSET"].primitive_bitwidth, strides["value_strides"]) == (64, far.stride()[:4])
    assert triton_na2d._strides((2**20, 1), query=near, key=near, value=near)["OFFSET"].primitive_bitwidth == 64


def test_programs_without_tokens_are_known():
    """Their sums must be zero; all others write theirs."""

    def idle(size: tuple[int, int], dilation: tuple[int, int]) -> bool:
        query = torch.empty(1, *size, 1, 16)
        return triton_na2d.Launch.of("query_gradient", query, (3, 3), dilation, 1.0, "4x8").idle

    assert not idle((25, 41), (1, 1))
    assert not idle((25, 41), (8, 3))  # groups of 3 or 4 and 13 or 14 tokens
    assert idle((17, 40), (2, 1))  # groups of 9 and 8
    assert not idle((2, 3), (5, 5))  # groups of one token


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "dtype torch.float64 is none of"),
        ({"head_dim": 256}, "head_dim 256 is larger than 128"),
        ({"kernel_size": (3, 15)}, "larger than 13"),
    ],
)
def test_says_why_not(changes, reason):
    values = {"size": (19, 19), "kernel_size": (3, 3), "dilation": (1, 1), "head_dim": 16, "dtype": torch.float32}
    problem = Problem(**(values | changes), device="cuda", has_rpb=True)
    assert reason in triton_na2d.why_not(problem, "")
    assert reason in backend_report(problem)["triton"]


def test_a_gpu_that_is_not_there_is_explained(monkeypatch):
    problem = Problem((9, 9), (3, 3), (1, 1), 16, torch.float32, "cuda", True)
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend_report(problem)["triton"] == "torch sees no GPU (torch.cuda.is_available() is False)"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_torch_and_triton_are_enough():
    """A machine with a GPU may have neither numpy nor what the models need."""
    code = """
import sys
for name in ("numpy", "mmengine", "mmcv", "mmdet", "mmseg", "transformers", "safetensors"):
    sys.modules[name] = None
from nat_dense.ops import triton_launch
print(triton_launch.why_no_kernels("xpu"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert told.startswith("the tensors are on xpu, not on a GPU")


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_follows_torch(monkeypatch, allowed):
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        assert triton_launch.product_precision(torch.float32) == ("tf32" if allowed else "tf32x3")
        torch.backends.cuda.matmul.allow_tf32 = not allowed
        assert triton_launch.product_precision(torch.float32) == ("tf32x3" if allowed else "tf32")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "the GPU has compute capability 7.5; Triton needs 8.0"), ((8, 6), None), ((9, 0), None)],
)
def test_old_gpus_are_refused(monkeypatch, capability, reason):
    """What a GPU says of itself is made up; the rest is real."""
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    problem = Problem((9, 9), (3, 3), (1, 1), 128, torch.float32, "cuda", True)
    assert triton_na2d.why_not(problem, "") == reason


def test_missing_triton_is_explained(monkeypatch):
    problem = Problem((9, 9), (3, 3), (1, 1), 16, torch.float32, "cuda", True)
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: None)
    assert triton_na2d.why_not(problem, "") == "triton is not installed: `pip install triton`"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_tensors_on_the_cpu_are_refused_without_the_interpreter(monkeypatch):
    problem = Problem((9, 9), (3, 3), (1, 1), 16, torch.float32, "cpu", True)
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)
    reason = triton_na2d.why_not(problem, "")
    assert reason == "the tensors are on cpu, not on a GPU (TRITON_INTERPRET=1 runs the kernels there, slowly)"
