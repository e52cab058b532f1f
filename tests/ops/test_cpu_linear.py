"""The kernels for gradients of linear layers and of the GELU between them, against torch in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from nat_dense.ops import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the kernels are not built")
VARIANTS = torch.ops.nat_dense_cpu.instruction_sets() if cpu.is_available() else []
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}

# tokens, inputs, outputs: whole blocks and panels, one more and one less, a single one, more of one than of the others,
# slices of outputs
SIZES = [
    (128, 64, 21),
    (129, 65, 22),
    (127, 31, 20),
    (1, 1, 1),
    (1, 70, 3),
    (3, 1, 40),
    (700, 16, 1),
    (4, 96, 288),
    (300, 33, 130),
    (5000, 24, 40),
    (150, 700, 600),
]


def operands(tokens: int, inputs: int, outputs: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + inputs)
    return (torch.randn(tokens, channels, generator=generator, dtype=dtype) for channels in (outputs, inputs))


def assert_right(grad: torch.Tensor, x: torch.Tensor, variant: str = "") -> None:
    weight, bias = cpu.linear_gradient(grad, x, True, variant)
    g, i = (t.double().reshape(-1, t.shape[-1]) for t in (grad, x))
    # Relative to the sums of absolute values, the rounding of which is the least that any order of adding costs.
    for found, exact, size in ((weight, g.T @ i, g.abs().T @ i.abs()), (bias, g.sum(0), g.abs().sum(0))):
        assert found.shape == exact.shape
        assert found.dtype == x.dtype
        assert found.is_contiguous()
        error = ((found - exact).abs() / size).max().item()
        assert error < TOLERANCE[x.dtype], error  # a NaN is not below either


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_product(sizes, dtype, variant):
    assert_right(*operands(*sizes, dtype), variant)


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "sizes", [(40000, 24, 40), (64, 300, 700), (900, 256, 200), (2, 4000, 600), (1568, 768, 256)], ids=str
)
def test_any_number_of_threads(sizes, threads):
    """Parts of tokens, parts of outputs, both."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        grad, x = operands(*sizes)
        assert_right(grad, x)
        first, second = (cpu.linear_gradient(grad, x, True) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, first, second))  # the same bits


def test_maps_of_tokens_however_they_lie():
    grad, x = torch.randn(2, 30, 9, 7), torch.randn(2, 9, 7, 50)[..., ::2]
    assert_right(grad.permute(0, 2, 3, 1), x)
    assert_right(torch.randn(30).expand(2, 9, 7, 30), x)
    assert_right(torch.randn(2, 9, 7, 90)[..., 30:60], x)


def test_what_lies_beside_the_operands_is_not_used():
    grad, x = torch.full((80, 60), torch.nan), torch.full((80, 90), torch.nan)
    grad[:, 10:35], x[:, 7:60] = torch.randn(80, 25), torch.randn(80, 53)
    assert_right(grad[:, 10:35], x[:, 7:60])


def test_not_a_number_stays_where_it_belongs():
    grad, x = operands(50, 20, 30)
    x[7, 3] = torch.nan
    weight, bias = cpu.linear_gradient(grad, x, True)
    assert weight[:, 3].isnan().all()
    assert not weight[:, torch.arange(20) != 3].isnan().any()
    assert not bias.isnan().any()


def test_the_bias_only_where_it_is_wanted():
    grad, x = operands(50, 20, 30)
    weight, bias = cpu.linear_gradient(grad, x, False)
    assert bias is None
    assert torch.equal(weight, cpu.linear_gradient(grad, x, True)[0])


@pytest.mark.parametrize(
    ("grad", "x", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 4, dtype=torch.float64), "float or double"),
        (torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16), "float or double"),
        (torch.ones(3, 4), torch.ones(2, 4), "as many tokens"),
        (torch.ones(0, 4), torch.ones(0, 4), "outputs"),
    ],
)
def test_what_it_was_not_made_for_is_refused(grad, x, message):
    with pytest.raises(RuntimeError, match=message):
        cpu.linear_gradient(grad, x, True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(1,), (15,), (16, 16), (3, 5, 7), (9, 8192)], ids=str)
def test_gelu_and_its_gradient(shape, variant):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, *shape, generator=generator) * 4
    wide = x.double().requires_grad_()
    exact = F.gelu(wide)
    (exact_grad,) = torch.autograd.grad(exact, wide, grad.double())
    kept = x.clone()
    found = cpu.gelu_backward_(grad, x, variant)
    assert torch.equal(x, kept)
    torch.testing.assert_close(found.double(), exact.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gelu_far_out(variant):
    x = torch.tensor([torch.nan, torch.inf, 300.0, -300.0, -12.0, -0.0, 0.0])
    grad = torch.ones(7)
    found = cpu.gelu_backward_(grad, x, variant)
    torch.testing.assert_close(found[:4], torch.tensor([torch.nan, torch.inf, 300.0, 0.0]), equal_nan=True)
    torch.testing.assert_close(
        found[4].double(), -6 * torch.special.erfc(torch.tensor(72.0).double().sqrt()), rtol=5e-6, atol=0
    )
    assert found[5:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(grad[[0, 2, 3, 5, 6]], torch.tensor([torch.nan, 1.0, 0.0, 0.5, 0.5]), equal_nan=True)


def test_gelu_of_maps_that_have_gaps():
    x, grad = torch.randn(2, 40, 6).unbind()
    x, grad = x.t(), grad.t()
    expected = torch.ops.aten.gelu_backward(grad, x)
    torch.testing.assert_close(cpu.gelu_backward_(grad, x), F.gelu(x))
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("grad", "x", "message"),
    [(torch.ones(3), torch.ones(4), "one shape"), (torch.ones(3).double(), torch.ones(3).double(), "float")],
)
def test_a_gelu_of_other_maps_is_refused(grad, x, message):
    with pytest.raises(RuntimeError, match=message):
        cpu.gelu_backward_(grad, x)


def test_shapes_without_values():
    with FakeTensorMode():
        grad, x = torch.empty(2, 5, 30), torch.empty(2, 5, 20)
        weight, bias = cpu.linear_gradient(grad, x, True)
        assert (weight.shape, bias.shape) == ((30, 20), (30,))
        assert cpu.gelu_backward_(grad, torch.empty(2, 5, 30)).shape == grad.shape


@pytest.mark.parametrize(("name", "arguments"), [("newer", 1), ("forward", 14)])
def test_kernels_of_an_older_build_say_so(monkeypatch, name, arguments):
    monkeypatch.setitem(cpu._OPERATORS, name, arguments)
    assert f"built from other sources, with another {name}: build them with" in cpu._load.__wrapped__()
