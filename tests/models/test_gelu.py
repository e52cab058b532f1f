"""The GELU's operator against float64: its kernel on a GPU or in Triton's interpreter, torch's operations elsewhere.

The interpreter has to be chosen before anything imports triton: `TRITON_INTERPRET=1 python -m pytest`, as `make test`
does.
"""

import os

import pytest
import torch
from torch.nn import functional as F

from nat_dense.models import gelu as module
from nat_dense.ops import triton_na2d

HAS_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if HAS_GPU else "cpu"
REASON = triton_na2d.why_no_kernels(DEVICE)
needs_kernel = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of a value: a unit in the last place of two bytes, since the interpreter rounds bfloat16 toward zero."""

SHAPES = (
    (1, 1),
    (70, 48),
    (3, 5, 7, 20),
    (33, 64),
    (2, 130, 65),  # programs of several blocks of rows, the last one of few
    (31, 640),  # more blocks of columns than programs
)
FULL = ((8, 200, 304, 192), (8, 25, 38, 1536), (100_003, 203))
"""NAT-Tiny's widest and narrowest stage at 800 x 1216 in batches of 8, and a map that nothing divides."""


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient, and inputs of which some are far out."""
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return grad, x * 3


def found_and_exact(grad: torch.Tensor, x: torch.Tensor):
    gelu, grad_x, sums = torch.ops.nat_dense.gelu_backward(grad, x)
    grad64, x64 = grad.double(), x.double()
    exact = F.gelu(x64), torch.ops.aten.gelu_backward(grad64, x64), grad_x.double().flatten(0, -2).sum(0)
    return (gelu, grad_x, sums), exact


def assert_right(grad: torch.Tensor, x: torch.Tensor) -> None:
    """GELU and gradient to a unit of x's dtype; the sums, which are those of the rounded gradient, to float32's."""
    (gelu, grad_x, sums), exact = found_and_exact(grad, x)
    assert gelu.dtype == grad_x.dtype == x.dtype
    assert gelu.is_contiguous()
    assert grad_x.is_contiguous()
    assert sums.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    rtol, atol = TOLERANCE[x.dtype], min(TOLERANCE[x.dtype], TOLERANCE[torch.float32])
    torch.testing.assert_close(gelu.double(), exact[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(grad_x.double(), exact[1], rtol=rtol, atol=4 * atol)  # gradients reach 4
    atol = 1e-6 * grad_x.double().abs().flatten(0, -2).sum(0).max().item()
    torch.testing.assert_close(sums.double(), exact[2], rtol=0, atol=atol)


@pytest.fixture
def launches(monkeypatch) -> list:
    """One entry for each launch of the kernel."""
    calls, launch = [], module.launch
    monkeypatch.setattr(module, "launch", lambda grad, x: calls.append(x.shape) or launch(grad, x))
    return calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, dtype, launches):
    assert_right(*operands(shape, dtype))
    assert len(launches) == (REASON is None and dtype != torch.float64)


@needs_kernel
def test_a_program_takes_several_blocks_of_rows():
    """What the case of 260 tokens is for."""
    if not HAS_GPU:
        columns = -(-65 // module.BLOCK_COLUMNS)
        assert module.BLOCK_ROWS * (module.PROGRAMS // columns) < 260
    assert_right(*operands((40_000 if HAS_GPU else 260, 65), torch.float32))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 3, 16), (4, 0)], ids=str)
def test_empty_maps_have_sums_of_zero(shape):
    gelu, grad_x, sums = torch.ops.nat_dense.gelu_backward(*operands(shape, torch.float32))
    assert gelu.shape == grad_x.shape == shape
    assert torch.equal(sums.cpu(), torch.zeros(shape[-1]))


def test_one_token():
    """Channels alone, in a dtype that has no kernel."""
    x = torch.randn(5, dtype=torch.float64)
    _, grad_x, sums = torch.ops.nat_dense.gelu_backward(torch.ones_like(x), x)
    assert torch.equal(sums, grad_x)


def test_views_are_laid_out_anew():
    grad, x = operands((20, 9, 30), torch.float32)
    grad, x = grad.transpose(0, 1)[:, ::2], x.transpose(0, 1)[:, ::2]
    assert_right(grad, x)
    assert_right(grad[:1, 0].expand(9, 30), x[:, 0])


@needs_kernel
def test_every_number_is_written():
    """Fresh memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        results = torch.ops.nat_dense.gelu_backward(*operands((70, 65), torch.float32))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(result).all() for result in results)


def test_the_same_bits_in_every_run():
    grad, x = operands((2, 130, 65), torch.bfloat16)
    first, second = (torch.ops.nat_dense.gelu_backward(grad, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_far_out_it_is_the_line_or_zero():
    x = torch.tensor([[-1e18, -20.0, 0.0, 20.0, 1e18]], device=DEVICE)
    gelu, grad_x, _ = torch.ops.nat_dense.gelu_backward(torch.full_like(x, 2.0), x)
    torch.testing.assert_close(grad_x[0].cpu(), torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(gelu[0].cpu(), torch.tensor([0.0, 0.0, 0.0, 20.0, 1e18]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(dtype, strided):
    grad, x = operands((6, 5, 24), dtype)
    if strided:
        grad, x = grad.transpose(0, 1), x.transpose(0, 1)
    torch.library.opcheck(torch.ops.nat_dense.gelu_backward.default, (grad, x))


@pytest.mark.parametrize(
    ("grad", "x", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), r"grad \(2, 3\) of torch.float32, x \(3, 2\)"),
        (torch.ones(2, 3), torch.ones(2, 3).half(), "x .* of torch.float16"),
        (torch.ones(()), torch.ones(()), r"expected one shape \[..., C\]"),
    ],
)
def test_operands_that_do_not_fit_are_refused(grad, x, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.nat_dense.gelu_backward(grad, x)


def test_has_no_derivative():
    grad, x = operands((4, 16), torch.float32)
    out = torch.ops.nat_dense.gelu_backward(grad, x.requires_grad_())[0]
    with pytest.raises(RuntimeError, match="gelu_backward has no derivative"):
        out.sum().backward()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_at_full_size(shape, dtype):
    grad, x = operands(shape, dtype)
    assert_right(grad, x)
    first, second = (torch.ops.nat_dense.gelu_backward(grad, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
@pytest.mark.skipif(HAS_GPU and torch.cuda.mem_get_info()[0] < 24 << 30, reason="less than 24 GiB of GPU memory")
def test_offsets_beyond_two_to_the_31():
    """The last tokens of a map of more than 2**31 numbers equal the same tokens alone."""
    tokens = 2**31 // 64 + 100
    x = torch.randn(tokens, 64, dtype=torch.bfloat16, device="cuda")
    grad = torch.ones(1, 64, dtype=torch.bfloat16, device="cuda").repeat(tokens, 1)
    gelu, grad_x, sums = torch.ops.nat_dense.gelu_backward(grad, x)
    few = torch.ops.nat_dense.gelu_backward(grad[-70:], x[-70:])
    assert torch.equal(gelu[-70:], few[0])
    assert torch.equal(grad_x[-70:], few[1])
    torch.testing.assert_close(sums, grad_x.sum(0, dtype=torch.float32), rtol=1e-5, atol=0)
