"""The operator on a GPU at full size: stage shapes, precisions, limits of indices, graphs and compilation."""

import pytest
import torch
from torch.nn import functional as F

from nat_dense.ops import backend_report, na2d, reference, triton_na2d
from nat_dense.ops.problem import Problem
from nat_dense.ops.reference import window_indices
from tests.ops.cases import Case, assert_close, errors
from tests.ops.test_triton import named

REASON = (
    triton_na2d.why_not(Problem((9, 9), (3, 3), (1, 1), 32, torch.bfloat16, "cuda", True), "")
    if torch.cuda.is_available()
    else "there is no GPU"
)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# NAT-Tiny at 800 x 1216, without dilation and with detection's, and one map that its window doesn't fit into.
STAGES = tuple(
    Case(f"{height} x {width}, dilation {d}", (height, width), dilation=(d, d), heads=heads)
    for height, width, heads, largest in ((200, 304, 2, 28), (100, 152, 4, 14), (50, 76, 8, 7), (25, 38, 16, 3))
    for d in (1, largest)
)
FULL = (
    *STAGES,
    Case("padded", (64, 80), dilation=(28, 28), heads=2, padded=True),
    Case("largest window and head", (40, 70), (13, 13), (1, 2), heads=2, dim=128),
    Case("smallest window, odd head", (65, 67), (3, 3), (2, 3), heads=3, dim=40, strided=True),
)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}
"""Of the largest of millions of values. Weights and gradients of logits are rounded to the tokens' dtype, which alone
makes 0.021 in bfloat16 and 0.0029 in float16 on the largest map."""


def run(case: Case, dtype: torch.dtype, backend: str, rounded: torch.dtype) -> dict[str, torch.Tensor]:
    """Output and gradients in `dtype`, on inputs rounded to `rounded`."""
    tensors = {n: None if t is None else t.detach().to(dtype) for n, t in case.tensors(rounded, device="cuda").items()}
    grad_out = tensors.pop("grad_out")
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if t is not None}
    out = na2d(kernel_size=case.kernel_size, dilation=case.dilation, backend=backend, **tensors)
    gradients = torch.autograd.grad(out, leaves.values(), grad_out)
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


def expected(case: Case, dtype: torch.dtype, out: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output of the reference in float64 and its gradients where the output was rounded to `out`, as gradients go on
    from what the forward pass left."""
    leaves = {n: t if t is None else t.detach().double() for n, t in case.tensors(dtype, device=out.device).items()}
    grad_out = leaves.pop("grad_out")
    settings = case.kernel_size, case.dilation, case.dim**-0.5
    exact, lse = reference.forward(*leaves.values(), *settings)
    grad_qkv, *extras = reference.backward(grad_out, *leaves.values(), out.double(), lse, *settings)
    gradients = (*grad_qkv.unbind(3), *extras)
    return {"out": exact} | {n: g for n, g in zip(leaves, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_equals_reference_in_float64(case, dtype):
    found = run(case, dtype, "auto", dtype)
    wanted = expected(case, dtype, found["out"])
    if case.padded and dtype is not torch.float32:  # gradients of logits cancel where most keys are the padded one
        found, wanted = ({name: each[name] for name in ("out", "value", "pad_value")} for each in (found, wanted))
    assert_close(found, wanted, TOLERANCE[dtype])


def through_torch(case: Case, dtype: torch.dtype, device: str = "cuda") -> dict[str, torch.Tensor]:
    """Output and gradients of torch's fused attention, with window and bias in its mask."""
    tensors = {n: None if t is None else t.detach() for n, t in case.tensors(dtype, device=device).items()}
    windows = (
        window_indices(n, k, d, device) for n, k, d in zip(case.size, case.kernel_size, case.dilation, strict=True)
    )
    (rows, row_bias), (columns, column_bias) = windows
    (height, width), heads = case.size, case.heads
    mask = torch.full((heads, height * width, height * width), -torch.inf, dtype=dtype, device=device)
    keys = rows[:, None, :, None] * width + columns[None, :, None, :]  # [H, W, kernel rows, kernel columns]
    biases = tensors["rpb"][:, row_bias[:, None, :, None], column_bias[None, :, None, :]]
    mask.scatter_(
        2, keys.reshape(1, height * width, -1).expand(heads, -1, -1), biases.reshape(heads, height * width, -1)
    )
    leaves = {name: tensors[name].requires_grad_() for name in ("query", "key", "value")}
    query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in leaves.values())
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None])
    out = out.transpose(1, 2).unflatten(1, case.size)
    gradients = torch.autograd.grad(out, leaves.values(), tensors["grad_out"])
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [STAGES[4], STAGES[6]], ids=lambda case: case.name)
def test_as_exact_as_torch(case, dtype):
    exact, found = run(case, torch.float64, "reference", dtype), run(case, dtype, "triton", dtype)
    fused = through_torch(case, dtype)
    wanted = {name: exact[name] for name in fused}
    ours, theirs = errors({name: found[name] for name in fused}, wanted), errors(fused, wanted)
    assert all(ours[name] < 1.25 * theirs[name] for name in fused), (ours, theirs)


def test_tf32_is_used_only_where_torch_may_use_it():
    case = STAGES[4]
    exact = run(case, torch.float64, "reference", torch.float32)["out"]

    def error() -> float:
        return (run(case, torch.float32, "triton", torch.float32)["out"] - exact).abs().max().item()

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        full = error()
        torch.set_float32_matmul_precision("high")
        short = error()
    finally:
        torch.set_float32_matmul_precision(before)
    assert full < 1e-5 < 1e-4 < short


def test_auto_takes_triton():
    assert backend_report(Problem((9, 9), (3, 3), (1, 1), 32, torch.bfloat16, "cuda", True))["triton"] is None


@pytest.mark.parametrize("case", [STAGES[0], STAGES[1], FULL[-3]], ids=lambda case: case.name)
def test_same_bits_in_every_run(case):
    first, second = (run(case, torch.bfloat16, "triton", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_more_programs_than_a_launch_axis_has():
    """70,000 maps and heads: each must equal the first, whose data it repeats."""
    case = Case("many", (8, 8), (3, 3), heads=1, dim=16)
    tensors = {n: None if t is None else t.detach() for n, t in case.tensors(torch.bfloat16, device="cuda").items()}
    tensors.pop("grad_out")
    one = na2d(kernel_size=3, backend="triton", **tensors)
    many = {n: t if n == "rpb" or t is None else t.expand(70_000, -1, -1, -1, -1) for n, t in tensors.items()}
    assert torch.equal(na2d(kernel_size=3, backend="triton", **many), one.expand(70_000, -1, -1, -1, -1))


def test_more_heads_than_a_launch_axis_has():
    """70,000 heads: each must equal the first, whose data it repeats, and so must its gradients."""
    case = Case("many heads", (8, 8), (3, 3), heads=1, dim=16)

    def step(heads: int) -> tuple[torch.Tensor, ...]:
        tensors = case.tensors(torch.bfloat16, device="cuda")
        leaves = [
            tensors[name].detach().expand(-1, -1, -1, heads, -1) for name in ("query", "key", "value", "grad_out")
        ]
        query, key, value = (t.requires_grad_() for t in leaves[:3])
        rpb = tensors["rpb"].detach().expand(heads, -1, -1).requires_grad_()
        out = na2d(query, key, value, 3, 1, rpb, backend="triton")
        gradients = torch.autograd.grad(out, (query, key, value), leaves[3], retain_graph=True)
        return out.detach(), *gradients, *(t[None, None, None] for t in torch.autograd.grad(out, rpb, leaves[3]))

    for found, wanted in zip(step(70_000), step(1), strict=True):
        assert torch.equal(found, wanted.expand_as(found))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 24 << 30, reason="less than 24 GiB of GPU memory"
)
def test_offsets_beyond_two_to_the_31():
    """The last map of a batch of more than 2**31 numbers equals the same map alone, with its gradients."""
    qkv = torch.randn(6, 512, 512, 3, 4, 128, dtype=torch.bfloat16, device="cuda")
    assert qkv.numel() > 2**31
    rpb = torch.randn(4, 5, 5, device="cuda")

    def last(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = (t.detach().requires_grad_() for t in tokens.unbind(3))
        out = na2d(query, key, value, 3, 2, rpb, backend="triton")
        gradients = torch.autograd.grad(out, (query, key, value), torch.ones_like(out[:1]).expand_as(out))
        return tuple(t[-1].clone() for t in (out, *gradients))

    for found, wanted in zip(last(qkv), last(qkv[-1:]), strict=True):
        assert torch.equal(found, wanted)


def test_nothing_of_window_size_is_kept():
    """A forward and backward pass adds less memory than three times the tokens' own."""
    case = STAGES[0]
    tensors = case.tensors(torch.bfloat16, device="cuda")
    grad_out = tensors.pop("grad_out")
    leaves = [t for t in tensors.values() if t is not None]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = na2d(kernel_size=7, backend="triton", **tensors)
    gradients = torch.autograd.grad(out, leaves, grad_out)
    grown = torch.cuda.max_memory_allocated() - before
    assert len(gradients) == 4
    assert grown < 3 * sum(tensors[name].nbytes for name in ("query", "key", "value"))


def test_cuda_graph():
    """With gradients, on a stream of its own."""
    case = named("one tile")
    tensors = case.tensors(torch.bfloat16, device="cuda")
    grad_out = tensors.pop("grad_out")
    leaves = [t for t in tensors.values() if t is not None]

    def step() -> tuple[torch.Tensor, ...]:
        out = na2d(kernel_size=case.kernel_size, backend="triton", **tensors)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        tensors["query"].normal_()
    graph.replay()
    torch.cuda.synchronize()
    for found, wanted in zip(captured, step(), strict=True):
        assert torch.equal(found, wanted)


def test_compiles_into_one_graph():
    case = Case("compiled", (20, 30), dim=32)
    tensors = case.tensors(torch.bfloat16, device="cuda")
    grad_out = tensors.pop("grad_out")
    leaves = [tensors[name] for name in ("query", "key", "value", "rpb")]

    def step(query, key, value, rpb):
        return na2d(query * 2, key, value, 7, 1, rpb)

    expected, found = step(*leaves), torch.compile(step, fullgraph=True)(*leaves)
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(out, leaves, grad_out) for out in (found, expected)), strict=True)
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted)


def test_autocast():
    case = named("one tile")
    tensors = {n: None if t is None else t.detach() for n, t in case.tensors(torch.float32, device="cuda").items()}
    tensors.pop("grad_out")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = na2d(kernel_size=case.kernel_size, **tensors)
    assert out.dtype == torch.bfloat16
    exact = na2d(kernel_size=case.kernel_size, backend="reference", **tensors)
    assert_close({"out": out}, {"out": exact.double()}, 2**-6)
