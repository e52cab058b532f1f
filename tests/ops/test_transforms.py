"""The operator under `torch.func`, forward-mode gradients, and `torch.export` and `torch.compile` with open sizes."""

import dataclasses

import pytest
import torch
from torch.autograd import forward_ad
from torch.export import Dim

from nat_dense.models.attention import NeighborhoodAttention2D
from nat_dense.ops import na2d, na2d_qkv, reference
from tests.ops.cases import Case

CASE = Case("small", (5, 6), (3, 3), (1, 2), dim=4)
NAMES = ("query", "key", "value", "rpb")


def inputs(seed=0):
    tensors = CASE.tensors(seed=seed)
    return tuple(tensors[name].detach() for name in NAMES)


def attend(query, key, value, rpb, backend="auto"):
    return na2d(query, key, value, CASE.kernel_size, CASE.dilation, rpb, backend=backend)


def defined(query, key, value, rpb):
    return reference.forward(query, key, value, rpb, None, None, CASE.kernel_size, CASE.dilation, CASE.dim**-0.5)[0]


def test_vmap_is_a_loop():
    pairs = [torch.stack(pair) for pair in zip(inputs(0), inputs(1), strict=True)]
    found = torch.func.vmap(attend)(*pairs)
    torch.testing.assert_close(found, torch.stack([attend(*inputs(0)), attend(*inputs(1))]))


def test_grad_of_each_sample():
    pairs = [torch.stack(pair) for pair in zip(inputs(0), inputs(1), strict=True)]
    found = torch.func.vmap(torch.func.grad(lambda *t: attend(*t).square().sum(), argnums=(0, 3)))(*pairs)
    for sample in (0, 1):
        leaves = [t.requires_grad_() for t in inputs(sample)]
        wanted = torch.autograd.grad(attend(*leaves).square().sum(), (leaves[0], leaves[3]))
        for gradients, gradient in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradients[sample], gradient)


def test_under_autocast_transforms_compute_what_the_operator_does():
    tensors = [t.float() for t in inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = attend(*tensors, backend="reference")
        found = torch.func.vmap(attend)(*(t[None] for t in tensors))[0]
        pulled_back, _ = torch.func.vjp(attend, *tensors)
    assert wanted.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
    assert torch.equal(pulled_back, wanted)


@pytest.mark.parametrize("way", ["torch.func", "dual level"])
def test_forward_mode_is_the_derivative(way):
    """Against a central difference, which in float64 is right to a part in 10^8."""
    points, tangents = inputs(0), inputs(1)
    if way == "torch.func":
        out, tangent = torch.func.jvp(attend, points, tangents)
    else:
        with forward_ad.dual_level():
            out, tangent = forward_ad.unpack_dual(attend(*map(forward_ad.make_dual, points, tangents)))
    step = 1e-6
    ahead, behind = (attend(*(p + sign * step * t for p, t in zip(points, tangents, strict=True))) for sign in (1, -1))
    torch.testing.assert_close(out, attend(*points))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)
    assert tangent.abs().max() > 0.1


def test_second_derivatives_come_from_the_reference():
    *tokens, rpb = inputs()
    found = torch.func.hessian(lambda bias: attend(*tokens, bias).square().sum())(rpb)
    wanted = torch.autograd.functional.hessian(lambda bias: defined(*tokens, bias).square().sum(), rpb)
    torch.testing.assert_close(found, wanted)
    assert wanted.abs().max() > 0.01


def test_packed_tokens_are_transformed_as_their_parts():
    """Also a leaf with a gradient of its own, which alone would choose the operator that loses tangents."""
    *tokens, rpb = inputs(0)
    qkv, tangent = torch.stack(tokens, dim=3).requires_grad_(), torch.stack(inputs(1)[:3], dim=3)
    settings = CASE.kernel_size, CASE.dilation, rpb
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(na2d_qkv(forward_ad.make_dual(qkv, tangent), *settings)).tangent
    _, wanted = torch.func.jvp(lambda *t: na2d(*t, *settings), tuple(tokens), inputs(1)[:3])
    torch.testing.assert_close(found, wanted)
    hessian = torch.func.hessian(lambda t: na2d_qkv(t, *settings)[0, 0, 0].square().sum())(qkv.detach())
    assert hessian.abs().max() > 0.01


def test_transforms_refuse_a_named_backend():
    with pytest.raises(RuntimeError, match=r"backend='cpu' can't run under torch\.func transforms"):
        torch.func.vmap(lambda *t: attend(*t, backend="cpu"))(*(t[None] for t in inputs()))


def test_a_transform_compiles():
    gradient = torch.func.grad(lambda *t: attend(*t).square().sum())
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs()), gradient(*inputs()))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_module_takes_any_size(strict):
    """Also maps smaller than the window, which it has not seen."""
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(8, 2, kernel_size=3, dilation=3).eval()
    torch.nn.init.normal_(module.qkv.bias)
    sizes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC, 2: Dim.DYNAMIC},)
    program = torch.export.export(module, (torch.randn(2, 12, 15, 8),), dynamic_shapes=sizes, strict=strict).module()
    for size in ((2, 12, 15), (3, 9, 40), (2, 5, 11), (4, 3, 2)):
        x = torch.randn(*size, 8)
        torch.testing.assert_close(program(x), module(x), rtol=1e-5, atol=1e-6)


def test_one_compilation_serves_all_sizes():
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(query, key, value, rpb):
        return na2d(query * 2, key, value, (3, 3), (1, 2), rpb).square().sum()

    for size in ((6, 7), (9, 8), (12, 21)):  # none is a number that the bias has, which torch would take for the same
        tensors = dataclasses.replace(CASE, size=size, batch=2).tensors()
        leaves = [tensors[name] for name in NAMES]
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = torch.autograd.grad(step(*leaves), leaves)
        query, *others = leaves
        wanted = torch.autograd.grad(na2d(query * 2, *others[:2], (3, 3), (1, 2), others[2]).square().sum(), leaves)
        for gradient, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, expected)
