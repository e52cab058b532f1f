"""The operator in compiled, recorded, exported and traced programs, and what it is told of gradients."""

import functools

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from nat_dense.ops import backends, na2d, na2d_qkv, reference
from nat_dense.ops.problem import Problem
from tests.ops.cases import BACKENDS, CASE, PADDED, OperatorsSeen


class Asked:
    """A row of the table that declines all that needs a gradient, as NATTEN's does, and keeps what it was asked."""

    def __init__(self, monkeypatch):
        self.needs_grad: list[bool] = []
        row = backends.Backend("natten", self.why_not, reference.forward, None)
        monkeypatch.setattr(backends, "TABLE", (row, *(row for row in backends.TABLE if row.name == "reference")))

    def why_not(self, problem: Problem, _variant: str) -> str | None:
        self.needs_grad.append(problem.needs_grad)
        return "a gradient is asked for" if problem.needs_grad else None


def doubled(query, key, value):
    """No argument of the operator is a leaf."""
    return na2d(query * 2, key * 2, value * 2, 3)


@pytest.mark.parametrize(
    "way",
    [
        doubled,
        torch.compile(doubled, backend="aot_eager", fullgraph=True),
        functools.partial(checkpoint, doubled, use_reentrant=False),
    ],
    ids=["eager", "compiled", "checkpoint"],
)
def test_back_ends_know_of_the_gradient_ahead(monkeypatch, way):
    """One without a backward pass may not make what another's backward pass goes on from."""
    asked = Asked(monkeypatch)
    leaves = torch.randn(3, 1, 9, 9, 2, 8).unbind(0)
    way(*(t.clone().requires_grad_() for t in leaves)).sum().backward()
    assert asked.needs_grad
    assert all(asked.needs_grad)
    asked.needs_grad.clear()
    with torch.no_grad():
        way(*(t.clone().requires_grad_() for t in leaves))
    assert asked.needs_grad == [False]


def test_a_recorded_program_is_trained():
    """make_fx doesn't say that it is under way."""
    leaves = torch.randn(3, 1, 9, 9, 2, 8).unbind(0)
    recorded = make_fx(doubled)(*leaves)
    found, wanted = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
    recorded(*found).sum().backward()
    doubled(*wanted).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(found, wanted, strict=True))


def test_a_compiler_that_misses_a_gradient():
    """Dynamo takes the buffer for one without a gradient: it is written through a view of it."""

    def write(values):
        buffer = torch.zeros(1, 9, 9, 2, 8)
        buffer.view(-1).add_(values)
        return na2d(buffer, buffer, buffer, 3)

    found, wanted = (torch.linspace(-1, 1, 9 * 9 * 2 * 8).requires_grad_() for _ in range(2))
    torch.compile(write, backend="aot_eager")(found).square().sum().backward()
    write(wanted).square().sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_that_is_trained_compiled(strict):
    """Nothing in its graph says that a gradient will be asked for."""
    tensors = CASE.tensors(torch.float32)
    grad_out, rpb = tensors["grad_out"], tensors["rpb"].detach()
    leaves = tuple(tensors[name] for name in ("query", "key", "value"))

    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return na2d(query, key, value, CASE.kernel_size, CASE.dilation, rpb)

    program = torch.export.export(Module(), tuple(t.detach() for t in leaves), strict=strict).module()
    wanted = torch.autograd.grad(Module()(*leaves), leaves, grad_out)
    for run in (program, torch.compile(program, backend="aot_eager")):
        torch.testing.assert_close(torch.autograd.grad(run(*leaves), leaves, grad_out), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [CASE, PADDED], ids=lambda case: case.name)
def test_log_sum_exps_that_nobody_wants(case, backend):
    """Where no gradient will be asked for, the result is the same and their tensor is empty."""
    tensors = {name: t if t is None else t.detach() for name, t in case.tensors(torch.float32).items()}
    tensors.pop("grad_out")
    settings = (list(case.kernel_size), list(case.dilation), 0.3, backend)
    out, lse = torch.ops.nat_dense.na2d(*tensors.values(), *settings, True)
    for needs_grad, wanted in ((None, lse), (False, lse.new_empty(0))):
        found, sums = torch.ops.nat_dense.na2d(*tensors.values(), *settings, needs_grad)
        assert torch.equal(found, out)
        assert torch.equal(sums, wanted)


@pytest.mark.parametrize("name", ["na2d", "na2d_qkv"])
def test_a_gradient_that_was_ruled_out_is_refused(name):
    tensors = CASE.tensors(torch.float32) if name == "na2d" else CASE.packed(torch.float32)
    tensors.pop("grad_out")
    settings = (list(CASE.kernel_size), list(CASE.dilation), 0.3, "auto")
    with pytest.raises(RuntimeError, match=r"needs_grad=False rules a gradient out, .* expected True or None"):
        getattr(torch.ops.nat_dense, name)(*tensors.values(), *settings, False)


@pytest.mark.parametrize("needs_grad", [True, False, None])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [CASE, PADDED], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["na2d", "na2d_qkv"])
def test_opcheck(name, case, backend, needs_grad):
    tensors = case.tensors(torch.float32) if name == "na2d" else case.packed(torch.float32)
    tensors.pop("grad_out")
    leaves = [t.detach() if t is not None and needs_grad is False else t for t in tensors.values()]
    arguments = (*leaves, list(case.kernel_size), list(case.dilation), case.dim**-0.5, backend, needs_grad)
    torch.library.opcheck(getattr(torch.ops.nat_dense, name).default, arguments)


def test_compiles_into_one_graph():
    def step(query, key, value, rpb):
        return na2d(query * 2, key, value, (5, 3), (1, 2), rpb).relu()

    tensors = CASE.tensors(torch.float32)
    leaves = [tensors[name] for name in ("query", "key", "value", "rpb")]
    grad_out = tensors["grad_out"]
    expected = step(*leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, expected)
    pairs = zip(
        torch.autograd.grad(compiled, leaves, grad_out), torch.autograd.grad(expected, leaves, grad_out), strict=True
    )
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict):
    class Module(torch.nn.Module):
        def forward(self, query, key, value, rpb):
            return na2d(query, key, value, (5, 3), (1, 2), rpb)

    inputs = tuple(CASE.tensors(torch.float32)[name].detach() for name in ("query", "key", "value", "rpb"))
    program = torch.export.export(Module(), inputs, strict=strict)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.nat_dense.na2d.default in targets
    torch.testing.assert_close(program.module()(*inputs), Module()(*inputs))


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")  # torch's own recorder
def test_packed_tokens_compile_into_one_graph_without_a_copy():
    def step(qkv, rpb):
        return na2d_qkv(qkv * 2, (5, 3), (1, 2), rpb).relu()

    tensors = CASE.packed(torch.float32)
    leaves, grad_out = [tensors["qkv"], tensors["rpb"]], tensors["grad_out"]
    graphs = AotEagerAndRecordGraphs()
    compiled = torch.compile(step, fullgraph=True, backend=graphs)(*leaves)
    found = torch.autograd.grad(compiled, leaves, grad_out)
    expected = step(*leaves)
    torch.testing.assert_close(compiled, expected)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, leaves, grad_out), strict=True):
        torch.testing.assert_close(gradient, wanted)
    ahead, behind = (
        {str(node.target) for node in graph.graph.nodes} for (graph,) in (graphs.fw_graphs, graphs.bw_graphs)
    )
    assert "nat_dense.na2d_qkv.default" in ahead
    assert "nat_dense.na2d_backward.default" in behind
    assert not behind & {"aten.stack.default", "aten.cat.default", "aten.clone.default"}


def test_a_gradient_of_packed_tokens_decides_the_operator():
    """Inference knows one operator; a bias alone that learns needs no gradient of the tokens."""
    tensors = CASE.packed(torch.float32)

    def names(qkv):
        with OperatorsSeen() as seen:
            na2d_qkv(qkv, CASE.kernel_size, CASE.dilation, tensors["rpb"])
        return seen.names

    assert names(tensors["qkv"]) == ["na2d_qkv"]
    assert names(tensors["qkv"].detach()) == ["na2d"]
    with torch.no_grad():
        assert names(tensors["qkv"]) == ["na2d"]


class PackedModule(torch.nn.Module):
    def forward(self, qkv, rpb):
        return na2d_qkv(qkv * 2, (5, 3), (1, 2), rpb)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_packed_tokens_are_in_parts(strict):
    tensors = CASE.packed(torch.float32)
    inputs = (tensors["qkv"], tensors["rpb"])
    program = torch.export.export(PackedModule(), inputs, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if "nat_dense" in str(node.target)]
    assert targets == ["nat_dense.na2d.default"]
    torch.testing.assert_close(program.module()(*inputs), PackedModule()(*inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_packed_tokens_are_in_parts():
    tensors = CASE.packed(torch.float32)
    traced = torch.jit.trace(PackedModule(), (tensors["qkv"], tensors["rpb"]))
    kinds = [node.kind() for node in traced.inlined_graph.nodes() if node.kind().startswith("nat_dense")]
    assert kinds == ["nat_dense::na2d"]
