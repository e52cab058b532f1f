"""The linear layer on oneDNN beside torch's own, in every mode that has to fall back to it."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nat_dense.models import linear as module
from nat_dense.models.linear import Linear, linear
from nat_dense.ops import cpu

ONEDNN = pytest.mark.skipif(not module._HAS_ONEDNN, reason="this torch has no oneDNN")


def operands(*shape: int, out: int = 24, bias: bool = True):
    torch.manual_seed(0)
    x = torch.randn(*shape, requires_grad=True)
    weight = torch.randn(out, shape[-1], requires_grad=True)
    return x, weight, torch.randn(out, requires_grad=True) if bias else None


def taken(monkeypatch) -> list:
    """Counts the products that oneDNN makes."""
    calls, product = [], module._product
    monkeypatch.setattr(module, "_product", lambda *tensors: calls.append(1) or product(*tensors))
    return calls


@ONEDNN
@pytest.mark.parametrize("shape", [(7, 16), (2, 5, 6, 16), (2, 40, 16), (90, 16), (1, 16), (3, 1, 300)])
@pytest.mark.parametrize("bias", [True, False])
def test_result_and_gradients_are_those_of_torch(shape, bias, monkeypatch):
    calls = taken(monkeypatch)
    leaves = [t for t in operands(*shape, bias=bias) if t is not None]
    x, weight, *rest = leaves
    found, expected = linear(x, weight, *rest or [None]), F.linear(x, weight, *rest)
    grad = torch.randn_like(found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(out, leaves, grad) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert len(calls) == 2 + (not cpu.is_available())  # forward, the gradient of x; our kernel has that of the weight


def test_second_derivatives_are_those_of_torch():
    def penalty(function):
        leaves = operands(4, 5, 16)
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    for a, b in zip(penalty(linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("bias", ["spread", "expanded", "from the middle"])
def test_a_bias_lies_in_memory_as_it_likes(bias):
    x, weight, _ = operands(3, 5, 16)
    spread = {"spread": torch.randn(24, 3)[:, 1], "expanded": torch.randn(1).expand(24)}
    given = spread.get(bias, torch.randn(50)[7:31])
    torch.testing.assert_close(linear(x, weight, given), F.linear(x, weight, given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        ((4, 17), (24, 16), None),
        ((4, 16), (24, 16), (4,)),
        ((4, 16), (24, 16), (1,)),  # which torch takes
        ((4, 16), (16,), None),
        ((4, 16), (16,), ()),
    ],
)
def test_other_sizes_are_torchs_affair(x, weight, bias):
    tensors = torch.randn(x), torch.randn(weight), None if bias is None else torch.randn(bias)
    answers = []
    for function in (linear, F.linear):
        try:
            answers.append(function(*tensors).shape)
        except RuntimeError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


@ONEDNN
def test_only_what_needs_a_gradient_gets_one():
    x, weight, bias = operands(6, 16)
    linear(x.detach(), weight, bias.detach()).sum().backward()
    assert x.grad is None
    assert bias.grad is None
    assert weight.grad.shape == (24, 16)
    linear(x, weight.detach(), bias.detach()).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.linear(x, weight, bias).sum(), x)[0], rtol=1e-5, atol=1e-5)


@ONEDNN
def test_the_gradient_of_the_output_is_left_alone():
    x, weight, bias = operands(90, 16)
    grad = torch.randn(90, 24)
    before = grad.clone()
    linear(x, weight, bias).backward(grad)
    assert torch.equal(grad, before)


@ONEDNN
def test_views_and_transposes_need_no_copy_by_the_caller():
    x, weight, bias = operands(5, 16, 9)
    view = x.transpose(1, 2)
    torch.testing.assert_close(
        linear(view, weight.new_ones(24, 16), bias), F.linear(view, weight.new_ones(24, 16), bias)
    )


@pytest.mark.parametrize(
    "mode", ["autocast", "float64", "vmap", "grad transform", "forward mode", "disabled", "sparse", "empty", "vector"]
)
def test_falls_back_to_torch(mode, monkeypatch):
    calls = taken(monkeypatch)
    x, weight, bias = (t.detach() for t in operands(6, 16))
    expected = F.linear(x, weight, bias)
    if mode == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = linear(x, weight, bias)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.1)
    elif mode == "float64":
        torch.testing.assert_close(linear(x.double(), weight.double(), bias.double()).float(), expected)
    elif mode == "vmap":
        torch.testing.assert_close(torch.func.vmap(lambda row: linear(row[None], weight, bias)[0])(x), expected)
    elif mode == "grad transform":
        grad = torch.func.grad(lambda w: linear(x, w, bias).sum())(weight)
        torch.testing.assert_close(grad, x.sum(0).expand(24, 16))
    elif mode == "forward mode":
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            tangent = forward_ad.unpack_dual(linear(dual, weight, bias)).tangent
        torch.testing.assert_close(tangent, weight.sum(1).expand(6, 24))
    elif mode == "disabled":
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(linear(x, weight, bias), expected)
    elif mode == "sparse":
        torch.testing.assert_close(linear(x, weight.to_sparse_csr(), bias), expected)
    elif mode == "empty":
        assert linear(x[:0], weight, bias).shape == (0, 24)
    else:
        torch.testing.assert_close(linear(x[0], weight, bias), expected[0])
    assert not calls


@ONEDNN
def test_its_operations_are_counted():
    layer, x = Linear(16, 24), torch.randn(2, 5, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 16 * 24


def test_the_same_bits_every_time():
    x, weight, bias = operands(900, 64, out=192)
    assert torch.equal(linear(x, weight, bias), linear(x, weight, bias))


def test_compiles_without_a_break():
    layer = Linear(16, 24)
    x = torch.randn(3, 16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("shape", [(5, 16), (90, 16), (4, 5, 6, 16)])
def test_gradients_in_batches(shape):
    leaves = operands(*shape)
    grads = torch.randn(3, *shape[:-1], 24)
    found = torch.autograd.grad(linear(*leaves), leaves, grads, is_grads_batched=True)
    expected = torch.autograd.grad(F.linear(*leaves), leaves, grads, is_grads_batched=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
