"""The MLP as one function: results and gradients of the plain formula, what is kept, and where the formula runs itself.

Where there is no GPU, what GPUs run is tested on the CPU, with torch's operations in place of the kernel.
"""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from nat_dense.models import linear as linear_module
from nat_dense.models import mlp as module
from nat_dense.models.layers import Mlp
from nat_dense.models.mlp import mlp
from nat_dense.ops import cpu

ONEDNN = pytest.mark.skipif(not linear_module._HAS_ONEDNN, reason="this torch has no oneDNN")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DIM, HIDDEN = 16, 48
SHAPES = pytest.mark.parametrize("shape", [(7, DIM), (2, 5, 6, DIM), (2, 40, DIM), (90, DIM), (1, DIM), (3, 1, DIM)])
NAMES = ("x", "weight1", "bias1", "weight2", "bias2")


def plain(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def operands(*shape: int, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (shape, (HIDDEN, DIM), (HIDDEN,), (DIM, HIDDEN), (DIM,))
    return [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]


def assert_gradients_close(found, expected, leaves, rtol: float) -> None:
    """Of outputs and their gradients, in units of the largest value."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())
    grad = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(out, leaves, grad) for out in (found, expected)), strict=True)
    for name, (a, b) in zip(NAMES, pairs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * b.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def calls(monkeypatch) -> list:
    """Counts what goes through the function."""
    calls, apply = [], module._Mlp.apply
    monkeypatch.setattr(module._Mlp, "apply", lambda *tensors: calls.append(1) or apply(*tensors))
    return calls


@pytest.fixture
def as_on_gpu(monkeypatch) -> None:
    monkeypatch.setattr(module, "on_gpu", lambda x: True)


@pytest.fixture(params=[pytest.param("cpu", marks=ONEDNN), pytest.param("no kernels", marks=ONEDNN), "gpu"])
def path(request, monkeypatch) -> str:
    """All ways through the function, on the CPU."""
    if request.param == "gpu":
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    elif request.param == "no kernels":
        monkeypatch.setattr(cpu, "is_available", lambda: False)
    return request.param


@SHAPES
def test_result_and_gradients_are_those_of_torch(shape, path, calls):
    leaves = operands(*shape)
    assert_gradients_close(mlp(*leaves), plain(*leaves), leaves, 1e-6)
    assert calls == [1]


def test_without_the_second_bias(path, calls):
    """Which whoever calls adds."""
    *others, bias2 = leaves = operands(90, DIM)
    assert_gradients_close(mlp(*others, None) + bias2, plain(*leaves), leaves, 1e-6)
    assert calls == [1]


def test_without_the_first_bias_the_formula_runs(path, calls):
    x, weight1, _, weight2, bias2 = operands(90, DIM)
    assert torch.equal(mlp(x, weight1, None, weight2, bias2), plain(x, weight1, None, weight2, bias2))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, as_on_gpu, calls):
    leaves = operands(2, 5, 6, DIM, dtype=dtype)
    out = mlp(*leaves)
    assert out.dtype == dtype
    assert_gradients_close(out, plain(*leaves), leaves, 2 * torch.finfo(dtype).eps)
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_too", [False, True])
def test_autocast(dtype, backward_too, as_on_gpu, calls):
    """The map that is kept has autocast's dtype, and gradients are rounded as those of the plain formula are."""
    leaves = operands(2, 5, 6, DIM)
    kept = []
    with torch.autocast("cpu", dtype=dtype):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
            found = mlp(*leaves)
        expected = plain(*leaves)
        assert found.dtype == expected.dtype == dtype
        if backward_too:
            assert_gradients_close(found, expected, leaves, 2 * torch.finfo(dtype).eps)
    if not backward_too:
        assert_gradients_close(found, expected, leaves, 2 * torch.finfo(dtype).eps)
    assert set(kept) == {dtype}
    assert calls == [1]


def test_float64_under_autocast_stays(as_on_gpu, calls):
    leaves = operands(6, DIM, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp(*leaves).dtype == plain(*leaves).dtype
    assert not calls


@ONEDNN
def test_autocast_on_a_cpu_runs_the_formula(calls):
    leaves = operands(6, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mlp(*leaves), plain(*leaves))
    assert not calls


def test_backward_under_autocast_that_the_forward_pass_did_not_have(path):
    leaves = operands(90, DIM)
    found, expected = mlp(*leaves), plain(*leaves)
    wanted = torch.autograd.grad(expected, leaves, torch.ones_like(expected))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(found, leaves, torch.ones_like(found))
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * b.abs().max().item())


def test_second_derivatives_are_those_of_torch(path, calls):
    def penalty(function):
        leaves = operands(4, 5, DIM)
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    for a, b in zip(penalty(mlp), penalty(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    assert calls == [1]


def test_gradients_in_batches(path, calls):
    leaves = operands(4, 5, 6, DIM)
    grads = torch.randn(3, 4, 5, 6, DIM)
    found = torch.autograd.grad(mlp(*leaves), leaves, grads, is_grads_batched=True)
    expected = torch.autograd.grad(plain(*leaves), leaves, grads, is_grads_batched=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * b.abs().max().item())
    assert calls == [1]


@pytest.mark.parametrize(
    "needed", [("weight1", "weight2"), ("x", "weight1", "weight2"), ("weight1", "weight2", "bias2")]
)
def test_only_what_needs_a_gradient_gets_one(needed, path, calls):
    leaves = [t.detach().requires_grad_(name in needed) for name, t in zip(NAMES, operands(6, DIM), strict=True)]
    found, expected = (
        torch.autograd.grad(f(*leaves).sum(), [t for t in leaves if t.requires_grad]) for f in (mlp, plain)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert calls == [1]


def test_the_gelu_is_not_kept(path):
    kept = []
    leaves = operands(90, DIM)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp(*leaves)
    x, weight1, bias1, weight2, _ = leaves
    before = F.linear(x, weight1, bias1)
    (own,) = (t for t in kept if all(t is not leaf for leaf in leaves))
    torch.testing.assert_close(own, before)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, own, weight1, bias1, weight2)}


def test_the_gradient_of_the_output_is_left_alone(path):
    leaves = operands(90, DIM)
    grad = torch.randn(90, DIM)
    before = grad.clone()
    mlp(*leaves).backward(grad)
    assert torch.equal(grad, before)


@ONEDNN
@pytest.mark.skipif(not cpu.is_available(), reason="the kernels are not built")
def test_the_kernels_run(monkeypatch):
    taken = []
    for name in ("gelu_backward_", "linear_gradient"):
        function = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, n=name, f=function: taken.append(n) or f(*a))
    mlp(*operands(90, DIM)).sum().backward()
    assert taken == ["gelu_backward_", "linear_gradient", "linear_gradient"]


def test_the_operator_sums_the_gradient_of_the_first_bias(as_on_gpu, monkeypatch):
    """Else the widest gradient would be read once more."""
    asked, parameter_gradients = [], module.parameter_gradients
    monkeypatch.setattr(module, "parameter_gradients", lambda *a: asked.append(a[-1]) or parameter_gradients(*a))
    mlp(*operands(90, DIM)).sum().backward()
    assert asked == [True, False]


@pytest.mark.parametrize(
    "mode", ["no grad", "frozen", "one frozen", "float64", "mixed", "vmap", "grad", "forward", "jit", "export"]
)
def test_the_formula_runs_in_other_modes(mode, path, calls):
    leaves = operands(6, DIM)
    expected = plain(*leaves)
    layer = Mlp(DIM, HIDDEN)
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), leaves[1:], strict=True):
            parameter.copy_(value)
    if mode == "no grad":
        with torch.no_grad():
            torch.testing.assert_close(mlp(*leaves), expected)
    elif mode in ("frozen", "one frozen"):
        leaves = [leaves[0], *(t.detach() for t in leaves[1:])]
        if mode == "one frozen":
            leaves[1].requires_grad_()
        found, wanted = (torch.autograd.grad(f(*leaves).sum(), leaves[0])[0] for f in (mlp, plain))
        torch.testing.assert_close(found, wanted)
    elif mode == "float64":
        torch.testing.assert_close(mlp(*(t.double() for t in leaves)).float(), expected)
    elif mode == "mixed":
        with pytest.raises(RuntimeError, match="dtype"):
            mlp(leaves[0].bfloat16(), *leaves[1:])
    elif mode == "vmap":
        torch.testing.assert_close(torch.func.vmap(lambda row: mlp(row, *leaves[1:]))(leaves[0]), expected)
    elif mode == "grad":
        found, wanted = (
            torch.func.grad(lambda w, f=f: f(leaves[0], w, *leaves[2:]).sum())(leaves[1]) for f in (mlp, plain)
        )
        torch.testing.assert_close(found, wanted)
    elif mode == "forward":
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaves[0], torch.ones_like(leaves[0]))
            found, wanted = (forward_ad.unpack_dual(f(dual, *leaves[1:])).tangent for f in (mlp, plain))
        torch.testing.assert_close(found, wanted)
    elif mode == "jit":
        traced = torch.jit.trace(layer, leaves[0].detach(), check_trace=False)
        torch.testing.assert_close(traced(leaves[0]), expected)
    else:
        for strict in (False, True):
            program = torch.export.export(layer, (leaves[0].detach(),), strict=strict)
            torch.testing.assert_close(program.module()(leaves[0]), expected)
            assert "aten.gelu.default" in targets(program.graph)
    assert not calls


def graphs_of(function, leaves, autocast: bool) -> tuple[torch.Tensor, dict[str, torch.fx.Graph]]:
    """What a compiled function returns, and the graphs of its two passes by the partitioner that inductor takes."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = {}

    def keep(name):
        return lambda module, inputs: graphs.update({name: module.graph}) or make_boxed_func(module.forward)

    backend = aot_autograd(
        fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=min_cut_rematerialization_partition
    )
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = torch.compile(function, backend=backend, fullgraph=True)(*leaves)
        return out, graphs


def targets(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_into_a_forward_pass_that_returns_no_gelu(autocast, as_on_gpu):
    leaves = operands(2, 5, 6, DIM)
    found, graphs = graphs_of(mlp, leaves, autocast)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = plain(*leaves)
    assert_gradients_close(found, expected, leaves, 2**-7 if autocast else 1e-6)  # compiles the backward pass
    for name, operator in (("forward", "linear_gelu"), ("backward", "gelu_backward")):
        found = [target for target in targets(graphs[name]) if "gelu" in target]
        assert found == [f"nat_dense.{operator}.default"]
    assert wide(graphs["forward"]) == ["before"]


def test_of_its_own_torch_compiles_into_one_that_does():
    """Else the test before could not fail."""
    leaves = operands(2, 5, 6, DIM)
    found, graphs = graphs_of(plain, leaves, False)
    assert_gradients_close(found, plain(*leaves), leaves, 1e-6)
    assert sorted(wide(graphs["forward"])) == ["after", "before"]


def wide(graph) -> list[str]:
    """The maps [tokens, HIDDEN] among what a forward pass returns: "before" or "after" its GELU."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    layer = [node for node in graph.nodes if str(node.target) == "nat_dense.linear_gelu.default"]
    gelus = [node for node in graph.nodes if str(node.target) == "aten.gelu.default"] or [
        node for node in graph.nodes if node.args == (*layer, 0)
    ]
    (gelu,) = gelus

    def follows(node) -> bool:
        return node is gelu or any(follows(source) for source in node.all_input_nodes)

    maps = [n for n in output.all_input_nodes if n.meta["val"].numel() == 60 * HIDDEN]
    return ["after" if follows(node) else "before" for node in maps]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_layer_takes_the_function(compiled, path, calls, monkeypatch):
    layer = Mlp(DIM, HIDDEN)
    x = torch.randn(2, 5, 6, DIM, requires_grad=True)
    leaves = [x, *layer.parameters()]
    expected = plain(*leaves)
    if not compiled:
        assert_gradients_close(layer(x), expected, leaves, 1e-6)
        assert calls == [1]
        return
    monkeypatch.undo()
    if path == "gpu":
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    found, graphs = graphs_of(layer, [x], False)
    assert_gradients_close(found, expected, leaves, 1e-6)
    assert ("nat_dense.gelu_backward.default" in targets(graphs["backward"])) == (path == "gpu")


@pytest.mark.parametrize(
    "change",
    [
        "forward hook",
        "forward pre-hook",
        "backward hook",
        "backward pre-hook",
        "hook of all modules",
        "forward of its own",
        "adapter",
        "parametrization",
    ],
)
def test_a_layer_that_is_more_than_its_parameters_is_called(change, path, calls, request):
    """Adapters, hooks and parametrizations have their effect."""
    layer = Mlp(DIM, HIDDEN)
    x = torch.randn(90, DIM, requires_grad=True)
    before = layer(x)
    fired = []
    if change == "forward hook":
        layer.fc1.register_forward_hook(lambda *_: fired.append(1))
    elif change == "forward pre-hook":
        layer.fc2.register_forward_pre_hook(lambda *_: fired.append(1))
    elif change == "backward hook":
        layer.fc1.register_full_backward_hook(lambda *_: fired.append(1))
    elif change == "backward pre-hook":
        layer.fc2.register_full_backward_pre_hook(lambda *_: fired.append(1))
    elif change == "hook of all modules":
        hook = nn.modules.module.register_module_forward_hook(
            lambda called, *_: fired.append(1) if called is layer.fc2 else None
        )
        request.addfinalizer(hook.remove)
    elif change == "forward of its own":  # as accelerate's offloading puts there
        forward = layer.fc1.forward
        layer.fc1.forward = lambda x: fired.append(1) or forward(x)
    elif change == "adapter":
        layer.fc1 = nn.Sequential(copy.deepcopy(layer.fc1), nn.ReLU())
    else:
        parametrize.register_parametrization(layer.fc2, "weight", nn.Hardtanh(-0.01, 0.01))
    after = layer(x)
    after.sum().backward()
    assert calls == [1]
    changes_values = change in ("adapter", "parametrization")
    assert len(fired) == (not changes_values)
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-6) == (not changes_values)


def test_dropout_between_the_layers(path, calls):
    layer = Mlp(DIM, HIDDEN, drop=0.5)
    x = torch.randn(90, DIM, requires_grad=True)
    assert (layer(x) == 0).any()
    assert not calls
    assert torch.equal(layer.eval()(x), mlp(x, *layer.parameters()))
    assert calls == [1, 1]


@pytest.mark.parametrize("gradients", [False, True])
def test_dropout_that_alone_is_in_training(gradients, path, calls):
    """As Monte Carlo dropout sets it."""
    layer = Mlp(DIM, HIDDEN, drop=0.5).eval()
    layer.drop.train()
    widths = []
    layer.drop.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[-1]))
    with torch.set_grad_enabled(gradients):
        layer(torch.randn(90, DIM))
    assert widths == [HIDDEN, DIM]
    assert not calls


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_inference_on_a_gpu_takes_the_operator(dtype, inference, as_on_gpu, monkeypatch):
    """Alone, with what autocast makes of the operands, and without the map before the GELU."""
    leaves = operands(2, 5, 6, DIM)
    operator, taken = torch.ops.nat_dense.linear_gelu, []
    monkeypatch.setattr(
        torch.ops.nat_dense, "linear_gelu", lambda *args: taken.append((args[0].dtype, args[3])) or operator(*args)
    )
    with inference(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        torch.testing.assert_close(mlp(*leaves), plain(*leaves))
        assert taken == [(dtype or torch.float32, False)]
        torch.jit.trace(Mlp(DIM, HIDDEN), leaves[0].detach(), check_trace=False)
        with forward_ad.dual_level():
            mlp(forward_ad.make_dual(leaves[0], torch.ones_like(leaves[0])), *leaves[1:])
    assert len(taken) == 1


def test_inference_on_a_gpu_compiles_into_the_operator(as_on_gpu):
    with torch.no_grad():
        leaves = operands(2, 5, 6, DIM)
        found, graphs = graphs_of(mlp, leaves, False)
        torch.testing.assert_close(found, plain(*leaves))
        assert targets(graphs["forward"]).count("nat_dense.linear_gelu.default") == 1
        assert "aten.gelu.default" not in targets(graphs["forward"])


def test_its_operations_are_counted(path):
    leaves = operands(90, DIM)
    with FlopCounterMode(display=False) as counter:
        mlp(*leaves).sum().backward()
    assert counter.get_total_flops() == 2 * 3 * 2 * 90 * DIM * HIDDEN


def test_the_same_bits_every_time(path):
    leaves = operands(900, DIM)
    first, second = (torch.autograd.grad(mlp(*leaves).sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_under_autocast(dtype, compiled):
    """Output and gradients as the plain formula's, and a forward pass that leaves less by the map after the GELU."""
    torch.compiler.reset()  # what torch 2.11 compiled under autocast to one dtype it also takes under another
    leaves = operands(2, 100, 152, DIM, device="cuda")

    def left(function) -> tuple[torch.Tensor, int]:
        function = torch.compile(function, fullgraph=True) if compiled else function
        tokens = leaves[0] * 1.0  # autocast keeps what it makes of a leaf for the next call
        function(tokens, *leaves[1:])  # what compilers, autocast and cuBLAS keep for later calls
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = function(tokens, *leaves[1:])
        return out, torch.cuda.memory_allocated() - before

    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32):
        (expected, theirs), (found, ours) = left(plain), left(mlp)
    assert theirs - ours >= 0.9 * 2 * 100 * 152 * HIDDEN * dtype.itemsize
    assert_gradients_close(found, expected, leaves, 3e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps)
