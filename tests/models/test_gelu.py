"""The GELU's operators against float64: kernels on a GPU or in Triton's interpreter, torch's operations elsewhere.

The interpreter has to be chosen before anything imports triton: `TRITON_INTERPRET=1 python -m pytest`, as `make test`
does.
"""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nat_dense.models import gelu as module
from tests.kernels import DEVICE, HAS_GPU, REASON, count_launches, needs_gpu, needs_kernel

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
    exact = torch.ops.aten.gelu_backward(grad64, x64)
    return (gelu, grad_x, sums), (F.gelu(x64), exact, exact.flatten(0, -2).sum(0))


def assert_right(grad: torch.Tensor, x: torch.Tensor) -> None:
    """GELU and gradient to a unit of x's dtype; the sums, which are those of the gradient unrounded, to float32's."""
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
    return count_launches(monkeypatch, module)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, dtype, launches):
    assert_right(*operands(shape, dtype))
    assert len(launches) == (REASON is None and dtype != torch.float64)


LAYERS = (  # of the tokens, their channels, those of the layer
    ((1,), 1, 1),
    ((70,), 48, 144),
    ((3, 5, 7), 20, 60),
    ((2, 130), 65, 33),  # blocks of few tokens, of few channels, of few to sum over
    ((31,), 64, 192),  # what blocks divide
)
FULL_LAYERS = (((8, 200, 304), 64, 192), ((8, 25, 38), 512, 1536), ((100_003,), 72, 203))


def layer_operands(tokens, depth: int, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, weight and bias of a layer whose results have a deviation of three, so that some are far out."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*tokens, depth), (channels, depth), (channels,))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return tuple(t.to(DEVICE, dtype) for t in (x, weight * 3 * depth**-0.5, bias))


def assert_layer_right(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Both maps to a unit of x's dtype; the GELU is that of the rounded layer, as its gradient is later."""
    gelu, before = torch.ops.nat_dense.linear_gelu(x, weight, bias, True)
    assert gelu.dtype == before.dtype == x.dtype
    assert gelu.is_contiguous()
    assert before.is_contiguous()
    exact = F.linear(x.double(), weight.double(), bias.double())
    rtol, atol = TOLERANCE[x.dtype], min(TOLERANCE[x.dtype], TOLERANCE[torch.float32])
    torch.testing.assert_close(before.double(), exact, rtol=rtol, atol=10 * atol)  # sums of up to 512 products
    torch.testing.assert_close(gelu.double(), F.gelu(before.double()), rtol=rtol, atol=atol)
    alone, nothing = torch.ops.nat_dense.linear_gelu(x, weight, bias, False)
    assert torch.equal(alone, gelu)
    assert nothing.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_a_layer_equals_float64(shape, dtype, launches):
    assert_layer_right(*layer_operands(*shape, dtype))
    assert len(launches) == 2 * (REASON is None and dtype in module.FORWARD_DTYPES)


@needs_kernel
def test_a_program_takes_several_blocks_of_rows():
    """What the case of 260 tokens is for."""
    if not HAS_GPU:
        columns = -(-65 // module.BLOCK_COLUMNS)
        assert module.BLOCK_ROWS * (module.PROGRAMS // columns) < 260
    assert_right(*operands((40_000 if HAS_GPU else 260, 65), torch.float32))


def test_a_layer_has_its_own_dtype_under_autocast():
    operands = layer_operands((6,), 16, 48, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = torch.ops.nat_dense.linear_gelu(*operands, True)
    assert all(torch.equal(a, b) for a, b in zip(found, torch.ops.nat_dense.linear_gelu(*operands, True), strict=True))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 3, 16), (4, 0)], ids=str)
def test_empty_maps_have_sums_of_zero(shape):
    gelu, grad_x, sums = torch.ops.nat_dense.gelu_backward(*operands(shape, torch.float32))
    assert gelu.shape == grad_x.shape == shape
    assert torch.equal(sums.cpu(), torch.zeros(shape[-1]))


@pytest.mark.parametrize("tokens", [(0,), (2, 0, 3)], ids=str)
def test_a_layer_of_no_tokens(tokens):
    gelu, before = torch.ops.nat_dense.linear_gelu(*layer_operands(tokens, 16, 48, torch.bfloat16), True)
    assert gelu.shape == before.shape == (*tokens, 48)


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
    x, weight, bias = layer_operands((20, 9), 32, 40, torch.bfloat16)
    assert_layer_right(x.transpose(0, 1)[:, ::2], weight.t().contiguous().t(), bias[None].expand(2, -1)[1])


@needs_kernel
def test_every_number_is_written():
    """Fresh memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        results = (
            *torch.ops.nat_dense.gelu_backward(*operands((70, 65), torch.float32)),
            *torch.ops.nat_dense.linear_gelu(*layer_operands((70,), 20, 65, torch.bfloat16), True),
        )
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
    x, weight, bias = layer_operands((6, 5), 24, 40, dtype)
    for keep in (False, True):
        layer = (x.transpose(0, 1) if strided else x, weight, bias, keep)
        torch.library.opcheck(torch.ops.nat_dense.linear_gelu.default, layer)


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


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (4, 2), (4,)), r"x \(2, 3\) of .*, weight \(4, 2\) .*expected \[..., depth\], \[channels, depth\]"),
        (((2, 3), (4, 3), (3,)), r"bias \(3,\) .*expected \[..., depth\]"),
        (((), (4, 3), (4,)), r"x \(\) .*expected \[..., depth\]"),
    ],
)
def test_layers_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.nat_dense.linear_gelu(*(torch.ones(shape) for shape in shapes), True)


def test_layers_of_two_dtypes_are_refused():
    x, weight, bias = (torch.ones(shape) for shape in ((2, 3), (4, 3), (4,)))
    with pytest.raises(ValueError, match=r"bias .* of torch.float16: expected .* one dtype"):
        torch.ops.nat_dense.linear_gelu(x, weight, bias.half(), True)


def test_has_no_derivative():
    grad, x = operands((4, 16), torch.float32)
    out = torch.ops.nat_dense.gelu_backward(grad, x.requires_grad_())[0]
    layer = torch.ops.nat_dense.linear_gelu(x, *layer_operands((), 16, 48, torch.float32)[1:], True)[0]
    for result in (out, layer):
        with pytest.raises(RuntimeError, match="gelu_backward have no derivative"):
            result.sum().backward()


def test_operations_of_a_layer_are_counted():
    with FlopCounterMode(display=False) as counter:
        torch.ops.nat_dense.linear_gelu(*layer_operands((2, 5), 16, 48, torch.float32), True)
    assert counter.get_total_flops() == 2 * 10 * 16 * 48


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_at_full_size(shape, dtype):
    grad, x = operands(shape, dtype)
    assert_right(grad, x)
    first, second = (torch.ops.nat_dense.gelu_backward(grad, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", FULL_LAYERS, ids=str)
def test_a_layer_at_full_size(shape, dtype):
    assert_layer_right(*layer_operands(*shape, dtype))


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
    parts = (part.float() for part in x.split(1 << 22))
    exact = sum(torch.ops.aten.gelu_backward(torch.ones_like(p), p).sum(0, dtype=torch.float64) for p in parts)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=0)
    del grad, grad_x
    weight, bias = layer_operands((1,), 64, 64, torch.bfloat16)[1:]
    layer = torch.ops.nat_dense.linear_gelu(x, weight, bias, True)
    few = torch.ops.nat_dense.linear_gelu(x[-70:], weight, bias, True)
    assert all(torch.equal(a[-70:], b) for a, b in zip(layer, few, strict=True))
