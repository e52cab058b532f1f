"""A residual sum with its norm against float64: kernels on a GPU or in Triton's interpreter, else torch's operations.

The interpreter has to be chosen before anything imports triton: `TRITON_INTERPRET=1 python -m pytest`, as `make test`
does.
"""

import pytest
import torch
from torch.nn import functional as F

from nat_dense.models import add_norm as module
from nat_dense.models.add_norm import add_norm, formula, norm
from tests.kernels import DEVICE, HAS_GPU, REASON, count_launches, needs_gpu, needs_kernel

NAMES = ("x", "branch", "bias", "scale", "factor", "weight", "norm_bias")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of a value: a unit in the last place of two bytes, since the interpreter rounds bfloat16 toward zero."""

DTYPES = (  # of x and of what the norm returns; of the branch
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
)
SHAPES = (
    (1, 1, 16),
    (2, 35, 64),
    (3, 5, 7, 20),  # programs with tokens of several samples, and channels that are no power of two
    (5, 600),
    (4, 3, 1024),  # one or two tokens of a program
    (2, 700, 64),  # programs of several blocks of tokens, the last one of few
)
FULL = ((8, 200, 304, 64), (8, 25, 38, 512), (3, 33_001, 96))
"""NAT-Tiny's widest and narrowest stage at 800 x 1216 in batches of 8, and a map that nothing divides."""

EXTRAS = ((), ("bias", "factor"), ("scale",), ("bias", "scale", "factor"))


def operands(shape, dtypes, extras=("bias", "scale", "factor")) -> tuple[torch.Tensor | None, ...]:
    """Parameters have the dtype of x, the factor float32 or more; a sample in three is dropped."""
    dtype, of_branch = dtypes
    generator = torch.Generator().manual_seed(0)
    samples, channels = shape[0], shape[-1]
    tensors = {
        "x": torch.randn(shape, generator=generator) * 2 + 1,
        "branch": torch.randn(shape, generator=generator),
        "bias": torch.randn(channels, generator=generator),
        "scale": torch.randn(channels, generator=generator),
        "factor": (torch.arange(samples) % 3 != 1) * 1.25,
        "weight": torch.randn(channels, generator=generator),
        "norm_bias": torch.randn(channels, generator=generator),
    }
    kinds = dict.fromkeys(NAMES, dtype) | {"branch": of_branch, "factor": torch.promote_types(dtype, torch.float32)}
    absent = {"bias", "scale", "factor"} - set(extras)
    return tuple(None if name in absent else t.to(DEVICE, kinds[name]) for name, t in tensors.items())


def wide(tensors) -> list[torch.Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def gradients(outputs, tensors, grads) -> dict[str, torch.Tensor]:
    given = {name: t for name, t in zip(NAMES, tensors, strict=True) if t is not None and name != "factor"}
    return dict(zip(given, torch.autograd.grad(outputs, list(given.values()), grads), strict=True))


def close(found, exact, rtol, name) -> None:
    """In units of the largest value."""
    atol = rtol * exact.abs().max().item()
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


def assert_right(shape, dtypes, extras=("bias", "scale", "factor")) -> None:
    """Results and gradients to a unit of their dtype, sums over tokens to float32's."""
    dtype, of_branch = dtypes
    leaves = [None if t is None else t.requires_grad_() for t in operands(shape, dtypes, extras)]
    total, normed, stats = torch.ops.nat_dense.add_norm(*leaves, 1e-5, of_branch)
    assert (total.dtype, normed.dtype) == (dtype, of_branch)
    assert total.is_contiguous()
    assert normed.is_contiguous()
    assert stats.shape == (*shape[:-1], 2)
    exact = wide(leaves)
    exact_total, _ = formula(*exact, 1e-5)
    close(total, exact_total, TOLERANCE[dtype], "total")
    # The norm is that of the rounded sum, as is its gradient.
    through = exact_total + (total.double() - exact_total).detach()
    exact_normed = F.layer_norm(through, through.shape[-1:], exact[5], exact[6], 1e-5)
    close(normed, exact_normed, TOLERANCE[of_branch], "normed")
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator).to(DEVICE, t.dtype) for t in (total, normed)]
    found = gradients((total, normed), leaves, grads)
    expected = gradients((through, exact_normed), exact, [grad.double() for grad in grads])
    for name, gradient in found.items():
        assert gradient.dtype == (of_branch if name == "branch" else dtype)
        close(gradient, expected[name], max(TOLERANCE[gradient.dtype], 1e-5 * (dtype != torch.float64)), name)


@pytest.fixture
def launches(monkeypatch) -> list:
    return count_launches(monkeypatch, module)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, dtypes, launches):
    assert_right(shape, dtypes)
    assert len(launches) == 2 * (REASON is None and dtypes[0] != torch.float64)


@pytest.mark.parametrize("extras", EXTRAS, ids=" ".join)
@pytest.mark.parametrize("shape", [(3, 5, 7, 20), (2, 35, 64)], ids=str)
def test_what_may_be_missing(shape, extras):
    assert_right(shape, (torch.float32, torch.bfloat16), extras)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7, 20), (2, 700, 64), (0, 16), (2, 3, 600)], ids=str)
def test_a_norm_alone(shape, dtypes, launches):
    dtype, of_norm = dtypes
    x, *_, weight, norm_bias = operands(shape, (dtype, dtype))
    leaves = [t.requires_grad_() for t in (x, weight, norm_bias)]
    total, normed, _ = torch.ops.nat_dense.add_norm(x, *[None] * 4, weight, norm_bias, 1e-5, of_norm)
    assert total.shape == (0,)
    assert normed.dtype == of_norm
    exact = wide(leaves)
    exact_normed = F.layer_norm(exact[0], shape[-1:], *exact[1:], 1e-5)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, of_norm)
    found = normed, *torch.autograd.grad(normed, leaves, grad)
    expected = exact_normed, *torch.autograd.grad(exact_normed, exact, grad.double())
    for name, a, b in zip(("normed", "x", "weight", "norm_bias"), found, expected, strict=True):
        if b.numel():
            close(a, b, max(TOLERANCE[a.dtype], 1e-5 * (dtype != torch.float64)), name)
    assert len(launches) == 2 * (REASON is None and dtype != torch.float64 and x.numel() > 0)


def test_a_scale_without_a_branch_is_refused():
    x, _, _, scale, _, weight, norm_bias = operands((2, 3, 8), (torch.float32,) * 2)
    with pytest.raises(ValueError, match="x, scale, weight, norm_bias without a branch: expected x, weight, norm_bias"):
        torch.ops.nat_dense.add_norm(x, None, None, scale, None, weight, norm_bias, 1e-5, torch.float32)


@needs_kernel
def test_a_program_takes_several_blocks():
    """What the case of 1400 tokens is for."""
    if not HAS_GPU:
        assert module.BACKWARD["elements"] // 64 * module.PROGRAMS < 1400
    assert_right((8, 40_000 if HAS_GPU else 350, 64), (torch.float32, torch.bfloat16))


@needs_kernel
def test_more_channels_than_registers_hold(launches):
    assert_right((2, 3, module.LARGEST + 1), (torch.float32, torch.bfloat16))
    assert not launches


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 3, 16)], ids=str)
def test_empty_maps_have_gradients_of_zero(shape):
    leaves = [t.requires_grad_() for t in operands(shape, (torch.float32, torch.bfloat16))]
    total, normed, _ = torch.ops.nat_dense.add_norm(*leaves, 1e-5, torch.bfloat16)
    assert total.shape == normed.shape == shape
    found = gradients((total, normed), leaves, [torch.zeros_like(total), torch.zeros_like(normed)])
    assert all((gradient == 0).all() for gradient in found.values())


def test_views_are_laid_out_anew():
    """All operands and gradients."""
    x, branch, *others = operands((20, 9, 60), (torch.float32,) * 2)
    others = [t if name == "factor" else t[::2] for name, t in zip(NAMES[2:], others, strict=True)]
    others[2] = (torch.rand(18, device=DEVICE) + 0.5)[::2]
    leaves = [x.transpose(0, 1)[:, ::2, ::2], branch.transpose(0, 1)[:, ::2, ::2], *others]
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert not leaf.is_contiguous(), name
        leaf.requires_grad_(name != "factor")
    results = torch.ops.nat_dense.add_norm(*leaves, 1e-5, torch.float32)[:2]
    exact_leaves = wide(leaves)
    exact = formula(*exact_leaves, 1e-5)
    grads = [torch.randn(30, 10, 9, device=DEVICE).permute(2, 1, 0) for _ in results]
    found = gradients(results, leaves, grads)
    expected = gradients(exact, exact_leaves, [grad.double() for grad in grads])
    for a, b in zip((*results, *found.values()), (*exact, *expected.values()), strict=True):
        close(a, b, 1e-5, "result or gradient")


@needs_kernel
def test_every_number_is_written():
    """Fresh memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        leaves = [t.requires_grad_() for t in operands((3, 35, 20), (torch.float32, torch.bfloat16))]
        results = torch.ops.nat_dense.add_norm(*leaves, 1e-5, torch.bfloat16)
        found = gradients(results[:2], leaves, [torch.ones_like(t) for t in results[:2]])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(result).all() for result in (*results, *found.values()))


def test_the_same_bits_in_every_run():
    def run():
        leaves = [t.requires_grad_() for t in operands((2, 700, 64), (torch.float32, torch.bfloat16))]
        results = torch.ops.nat_dense.add_norm(*leaves, 1e-5, torch.bfloat16)[:2]
        return (*results, *gradients(results, leaves, results).values())

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
@pytest.mark.parametrize("extras", [(), ("bias", "scale", "factor")], ids=" ".join)
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(dtypes, extras, strided):
    leaves = operands((2, 5, 24), dtypes, extras)
    leaves = [t if t is None or name == "factor" else t.requires_grad_() for name, t in zip(NAMES, leaves, strict=True)]
    if strided:
        leaves[:2] = (t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in leaves[:2])
    torch.library.opcheck(torch.ops.nat_dense.add_norm.default, (*leaves, 1e-5, dtypes[1]))
    x, branch, bias, scale, factor, weight, norm_bias = (None if t is None else t.detach() for t in leaves)
    total, normed, stats = torch.ops.nat_dense.add_norm(*leaves, 1e-5, dtypes[1])
    results = torch.randn_like(total), torch.randn_like(normed), total.detach(), stats
    torch.library.opcheck(
        torch.ops.nat_dense.add_norm_backward.default, (*results, branch, bias, scale, factor, weight)
    )
    alone = x, *[None] * 4, weight, norm_bias
    torch.library.opcheck(torch.ops.nat_dense.add_norm.default, (*alone, 1e-5, dtypes[1]))
    results = None, results[1], x, torch.ops.nat_dense.add_norm(*alone, 1e-5, dtypes[1])[2]
    torch.library.opcheck(torch.ops.nat_dense.add_norm_backward.default, (*results, *[None] * 4, weight))


@pytest.mark.parametrize(
    ("name", "shape"), [("branch", (2, 4, 8)), ("bias", (4,)), ("factor", (3,)), ("norm_bias", (1, 8))]
)
def test_operands_that_do_not_fit_are_refused(name, shape):
    given = dict(zip(NAMES, operands((2, 3, 8), (torch.float32,) * 2), strict=True))
    given[name] = torch.ones(shape, device=DEVICE)
    with pytest.raises(ValueError, match=rf"x \(2, 3, 8\), .*{name} .*: expected one shape \[B, ..., C\]"):
        torch.ops.nat_dense.add_norm(*given.values(), 1e-5, torch.float32)


def test_has_no_second_derivative():
    leaves = [t.requires_grad_() for t in operands((2, 3, 8), (torch.float32,) * 2)]
    total, normed, _ = torch.ops.nat_dense.add_norm(*leaves, 1e-5, torch.float32)
    (grad,) = torch.autograd.grad((total * normed).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="add_norm has no second derivative"):
        grad.sum().backward()


def run_compiled(function, *args) -> tuple[list[str], tuple]:
    """The operators of the project that torch.compile finds in a function, and its results."""
    found = []

    def backend(graph, _inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if "nat_dense" in str(node.target))
        return graph.forward

    torch.compiler.reset()
    results = torch.compile(function, backend=backend, fullgraph=True)(*args)
    return found, results


@pytest.fixture
def as_on_gpu(monkeypatch) -> None:
    monkeypatch.setattr(module, "on_gpu", lambda x: True)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_function_compiles_into_the_operator(dtype, as_on_gpu):
    """With what autocast makes of the norm."""
    leaves = operands((2, 5, 24), (torch.float32, dtype or torch.float32))
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        expected = formula(*leaves, 1e-5)
        found, (total, normed) = run_compiled(lambda *tensors: add_norm(*tensors, 1e-5), *leaves)
        assert found == ["nat_dense.add_norm"]
        assert (total.dtype, normed.dtype) == (torch.float32, dtype or torch.float32)
        for result, exact in zip((total, normed), expected, strict=True):
            close(result, exact.double(), TOLERANCE[normed.dtype], "result")
        x, *_, weight, norm_bias = leaves
        found, normed = run_compiled(lambda *tensors: norm(*tensors, 1e-5), x, weight, norm_bias)
        assert found == ["nat_dense.add_norm"]
        assert normed.dtype == (dtype or torch.float32)
        close(normed, F.layer_norm(x, (24,), weight, norm_bias).double(), TOLERANCE[normed.dtype], "norm")


WHY = ("not compiled", "no gradients", "on a CPU", "float64", "many channels", "a factor with a gradient")
WIDER = ("a branch in more bytes", "a scale in more bytes")


@pytest.mark.parametrize("why", [*WHY, *WIDER])
def test_the_formula_runs_elsewhere(why, as_on_gpu, monkeypatch):
    channels = module.LARGEST + 1 if why == "many channels" else 24
    leaves = operands((2, 5, channels), (torch.float32,) * 2)
    if why == "on a CPU":
        monkeypatch.setattr(module, "on_gpu", lambda x: False)
    elif why == "float64":
        leaves = tuple(t.double() for t in leaves)
    elif why == "a branch in more bytes":
        leaves = leaves[0].bfloat16(), *leaves[1:3], None, *leaves[4:]
    elif why == "a scale in more bytes":
        leaves = leaves[0].bfloat16(), leaves[1].bfloat16(), *leaves[2:]
    elif why == "a factor with a gradient":
        leaves[4].requires_grad_()
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=why in WIDER)
    with autocast, torch.set_grad_enabled(why != "no gradients"):
        expected = formula(*leaves, 1e-5)
        if why == "not compiled":
            monkeypatch.setattr(torch.ops.nat_dense, "add_norm", None)
            results = add_norm(*leaves, 1e-5)
        else:
            found, results = run_compiled(lambda *tensors: add_norm(*tensors, 1e-5), *leaves)
            assert not found
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == exact.dtype
        torch.testing.assert_close(result, exact)


@needs_gpu
@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_at_full_size(shape, dtypes):
    assert_right(shape, dtypes)


@needs_gpu
@pytest.mark.skipif(HAS_GPU and torch.cuda.mem_get_info()[0] < 40 << 30, reason="less than 40 GiB of GPU memory")
def test_offsets_beyond_two_to_the_31():
    """The last tokens of a map of more than 2**31 numbers equal the same tokens alone."""
    tokens = 2**31 // 64 + 100
    x, *others = operands((1, 1, 64), (torch.bfloat16,) * 2)
    x = torch.randn(1, tokens, 64, dtype=torch.bfloat16, device="cuda")
    grads = torch.randn(1, 70, 64, dtype=torch.bfloat16, device="cuda")

    def run(x):
        leaf, grad = x.requires_grad_(), F.pad(grads, (0, 0, x.shape[1] - 70, 0))
        total, normed, _ = torch.ops.nat_dense.add_norm(leaf, x.detach(), *others[1:], 1e-5, torch.bfloat16)
        return total[:, -70:], normed[:, -70:], torch.autograd.grad((total, normed), leaf, (grad, grad))[0][:, -70:]

    few = run(x[:, -70:].clone())
    assert all(torch.equal(a, b) for a, b in zip(run(x), few, strict=True))
