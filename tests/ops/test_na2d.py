"""The operator as users meet it: validation, back-end choice, dtypes, autocast, gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nat_dense.models import attention
from nat_dense.models.attention import attend
from nat_dense.ops import backend_report, backends, na2d, na2d_qkv, reference
from nat_dense.ops.functional import na2d_rows
from nat_dense.ops.problem import Problem
from tests.ops.cases import BACKENDS, CASE, CASES, PADDED, Case, OperatorsSeen

UNBIASED = replace(CASE, name="no bias", rpb=False)


def call(case=CASE, dtype=torch.float32, grad=True, backend="auto", **changes):
    tensors = case.tensors(dtype) | changes
    tensors.pop("grad_out")
    if not grad:
        tensors = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}
    settings = {"kernel_size": case.kernel_size, "dilation": case.dilation, "backend": backend}
    return na2d(**(settings | tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": 4}, r"kernel_size=\(4, 4\): expected odd numbers >= 3"),
        ({"kernel_size": 1}, r"kernel_size=\(1, 1\): expected odd numbers >= 3"),
        ({"kernel_size": (3, 3, 3)}, "expected an int or a pair of ints"),
        ({"kernel_size": 3.0}, "kernel_size=3.0: expected an int or a pair of ints"),
        ({"dilation": 0}, r"dilation=\(0, 0\): expected numbers >= 1"),
        ({"dilation": 3}, "map of 9 x 11 tokens is smaller than kernel_size . dilation = 15 x 9"),
        ({"key": torch.zeros(1, 9, 11, 2, 8)}, r"key \(1, 9, 11, 2, 8\).* expected three tensors of one shape"),
        ({"value": torch.zeros(1, 9, 11, 2, 16).half()}, "value torch.float16: expected one dtype"),
        ({"rpb": torch.zeros(2, 5, 9)}, r"rpb has shape \(2, 5, 9\); expected \(2, 9, 5\)"),
        ({"rpb": torch.zeros(2, 9, 5).half()}, r"rpb is torch.float16; expected torch.float32 \(the query's\)$"),
        ({"query": np.zeros((1, 9, 11, 2, 16), np.float32)}, "query is a ndarray; expected a torch.Tensor"),
        ({"rpb": [0.0]}, "rpb is a list; expected a torch.Tensor"),
        ({"pad_key": torch.zeros(2, 16)}, "pad_key and pad_value go together"),
        ({"backend": "cuda"}, "backend='cuda' is not known; expected 'auto' or one of"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_empty_map_is_refused():
    with pytest.raises(ValueError, match="only the batch may be empty"):
        na2d(*torch.zeros(3, 1, 0, 9, 2, 8), 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    case = Case("empty", (9, 11), (5, 3), (1, 2), dim=16, batch=0)
    tensors = case.tensors(torch.float32)
    tensors.pop("grad_out")
    out = na2d(kernel_size=(5, 3), dilation=(1, 2), backend=backend, **tensors)
    assert out.shape == (0, 9, 11, 2, 16)
    out.sum().backward()
    assert not tensors["rpb"].grad.any()
    assert tensors["query"].grad.shape == out.shape


def test_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(
        backends, "TABLE", (backends.Backend("cpu", lambda *_: "it is Monday", None, None), *backends.TABLE[1:])
    )
    with pytest.raises(RuntimeError, match=r"backend='cpu' can't run .*: it is Monday. Use backend='auto'"):
        call(backend="cpu")
    assert call().shape == (1, 9, 11, 2, 16)


def test_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv(backends.FORCE_VARIABLE, "nonsense")
    with pytest.raises(ValueError, match="backend='nonsense' is not known"):
        call()
    monkeypatch.setenv(backends.FORCE_VARIABLE, "reference")
    torch.testing.assert_close(call(), call(backend="reference"), rtol=0, atol=0)
    monkeypatch.setenv(backends.FORCE_VARIABLE, "")  # as `NAT_DENSE_BACKEND= python ...` does
    torch.testing.assert_close(call(), call(backend="auto"), rtol=0, atol=0)


def test_report_lists_the_table_in_order():
    report = backend_report(Problem((9, 11), (5, 3), (1, 2), 16, torch.float32, "cpu", has_rpb=True))
    assert list(report) == [row.name for row in backends.TABLE]
    assert report["reference"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_sums_in_float32(dtype, backend):
    """Off by the rounding of inputs and outputs alone: one part in 128 for bfloat16."""
    out = call(dtype=dtype, backend=backend)
    assert out.dtype == dtype
    rounded = {n: t.detach().to(dtype).double() for n, t in CASE.tensors().items() if t is not None and n != "grad_out"}
    exact = na2d(kernel_size=CASE.kernel_size, dilation=CASE.dilation, backend="reference", **rounded)
    assert (out.double() - exact).abs().max() < 2**-8 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_the_tokens_and_keeps_the_bias(dtype):
    tensors = CASE.tensors(torch.float32)
    grad_out = tensors.pop("grad_out")
    with torch.autocast("cpu", dtype=dtype):
        out = na2d(kernel_size=CASE.kernel_size, dilation=CASE.dilation, **tensors)
    assert out.dtype == dtype
    out.backward(grad_out.to(dtype))
    assert all(tensors[name].grad.dtype == torch.float32 for name in ("query", "key", "value", "rpb"))
    torch.testing.assert_close(out.float(), call(), rtol=0.02, atol=0.02)


def test_autocast_leaves_float64_alone():
    tensors = PADDED.tensors(torch.float64)
    tensors.pop("grad_out")
    settings = dict(kernel_size=PADDED.kernel_size, dilation=PADDED.dilation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = na2d(**tensors, **settings)
    assert torch.equal(found, na2d(**tensors, **settings))


def test_attention_dropout_is_exact_under_autocast(monkeypatch):
    """It runs the reference's own operations, which autocast would take for products in two bytes."""
    packed = CASE.packed(torch.bfloat16)
    arguments = (packed["qkv"], 3, 1, torch.randn(2, 5, 5), 0.25)
    monkeypatch.setattr(attention, "_warned", False)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="attention dropout"):
        found = attend(*arguments, projections=(), dropout=1e-9)
    assert torch.equal(found, attend(*arguments, projections=(), backend="reference"))


def test_a_reference_for_weights_is_exact_under_autocast():
    query, key, value = (t.bfloat16() for t in CASE.packed(torch.float32)["qkv"].detach().unbind(3))
    weights = reference.attention_weights(query, key, None, (3, 3), (1, 1), 0.25)
    out = reference.apply_weights(weights, value, (3, 3), (1, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.attention_weights(query, key, None, (3, 3), (1, 1), 0.25), weights)
        assert torch.equal(reference.apply_weights(weights, value, (3, 3), (1, 1)), out)


def test_head_dim_without_unit_stride_is_accepted():
    query, key, value = torch.randn(3, 1, 16, 9, 11, 2).permute(0, 1, 3, 4, 5, 2)
    expected = na2d(query.contiguous(), key.contiguous(), value.contiguous(), 3)
    torch.testing.assert_close(na2d(query, key, value, 3), expected)
    query, key, value = torch.randn(3, 1, 9, 11, 1, 2).transpose(-1, -2)  # a stride of 2 in a dimension of size 1
    expected = na2d(query, key, value, 3, backend="reference")
    torch.testing.assert_close(na2d(query, key, value, 3), expected)


def test_whole_numbers_of_numpy():
    tensors = torch.randn(3, 1, 9, 11, 2, 8)
    assert torch.equal(na2d(*tensors, np.int64(3), (np.int32(2), 1)), na2d(*tensors, 3, (2, 1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    case = Case("tiny", (4, 5), (3, 3), (1, 2), dim=3, padded=True)
    tensors = case.tensors()
    tensors.pop("grad_out")

    def operator(*leaves):
        return na2d(**dict(zip(tensors, leaves, strict=True)), kernel_size=3, dilation=(1, 2), backend=backend)

    assert torch.autograd.gradcheck(operator, tuple(tensors.values()))


def test_second_derivatives_are_refused():
    tensors = CASE.tensors()
    tensors.pop("grad_out")
    query = tensors["query"]
    out = na2d(kernel_size=CASE.kernel_size, dilation=CASE.dilation, **tensors)
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


# --- tokens in one tensor ---------------------------------------------------------------------------------------------


def of_parts(qkv, *arguments, **keywords):
    """What `na2d_qkv` must equal."""
    return na2d(*qkv.unbind(3), *arguments, **keywords)


def differentiated(function, case=CASE, dtype=torch.float32, backend="auto"):
    """Output and gradients by name."""
    tensors = case.packed(dtype)
    grad_out = tensors.pop("grad_out")
    leaves = {name: t for name, t in tensors.items() if t is not None}
    out = function(kernel_size=case.kernel_size, dilation=case.dilation, backend=backend, **tensors)
    gradients = torch.autograd.grad(out, leaves.values(), grad_out.to(out.dtype))
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASE, UNBIASED, PADDED], ids=lambda case: case.name)
def test_packed_tokens_give_the_bits_of_their_parts(case, dtype, backend):
    found, wanted = (differentiated(function, case, dtype, backend) for function in (na2d_qkv, of_parts))
    if backend == "reference":  # which adds in an order that threads decide
        torch.testing.assert_close(found, wanted)
    else:
        assert_same_bits(found, wanted)
    assert all(gradient.any() for gradient in found["qkv"].unbind(3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_gradient_is_what_the_backend_wrote(dtype, backend, monkeypatch):
    written = []

    def watched(row):
        def backward(*arguments, **keywords):
            gradients = row.backward(*arguments, **keywords)
            written.append(gradients[0])
            return gradients

        return replace(row, backward=backward)

    monkeypatch.setattr(backends, "TABLE", tuple(map(watched, backends.TABLE)))
    gradient = differentiated(na2d_qkv, dtype=dtype, backend=backend)["qkv"]
    assert gradient.is_contiguous()
    assert [gradient.data_ptr()] == [t.data_ptr() for t in written]


def test_packed_head_dim_without_unit_stride_is_accepted():
    qkv = torch.randn(1, 3, 16, 9, 11, 2).permute(0, 3, 4, 1, 5, 2)
    found, wanted = qkv.clone().requires_grad_(), qkv.contiguous().requires_grad_()
    assert found.stride(-1) != 1
    for leaf in (found, wanted):
        na2d_qkv(leaf, 3).square().sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)


@pytest.mark.parametrize(
    "shape", [(1, 9, 11, 2, 2, 16), (1, 3, 9, 11, 2, 16), (9, 11, 3, 2, 16), (1, 9, 11, 96), (1, 1, 9, 11, 3, 2, 16)]
)
@pytest.mark.parametrize("grad", [True, False])
def test_tokens_that_are_not_packed_are_refused(shape, grad):
    message = rf"qkv has shape \({', '.join(map(str, shape))}\); expected \[B, H, W, 3, heads, head_dim\]"
    with pytest.raises(ValueError, match=message):
        na2d_qkv(torch.zeros(shape, requires_grad=grad), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": 4}, r"kernel_size=\(4, 4\): expected odd numbers >= 3"),
        ({"dilation": 4}, "map of 9 x 11 tokens is smaller than kernel_size . dilation = 12 x 12"),
        ({"qkv": torch.zeros(1, 0, 9, 3, 2, 16)}, "only the batch may be empty"),
        ({"rpb": torch.zeros(2, 5, 9)}, r"rpb has shape \(2, 5, 9\); expected \(2, 5, 5\)"),
        ({"pad_key": torch.zeros(2, 16)}, "pad_key and pad_value go together"),
        ({"backend": "cuda"}, "backend='cuda' is not known; expected 'auto' or one of"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_arguments_beside_packed_tokens_are_named(changes, message, grad):
    arguments = {"qkv": torch.zeros(1, 9, 11, 3, 2, 16), "kernel_size": 3} | changes
    arguments["qkv"] = arguments["qkv"].clone().requires_grad_(grad)
    with pytest.raises(ValueError, match=message):
        na2d_qkv(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_of_packed_tokens(backend):
    found = differentiated(na2d_qkv, replace(CASE, batch=0), backend=backend)
    assert found["out"].shape == (0, 9, 11, 2, 16)
    assert found["qkv"].shape == (0, 9, 11, 3, 2, 16)
    assert not found["rpb"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_packed_tokens(dtype):
    with torch.autocast("cpu", dtype=dtype), OperatorsSeen() as seen:
        found = differentiated(na2d_qkv)
    with torch.autocast("cpu", dtype=dtype):
        wanted = differentiated(of_parts)
    assert seen.names == ["na2d_qkv", "na2d_backward"]
    assert (found["out"].dtype, found["qkv"].dtype, found["rpb"].dtype) == (dtype, torch.float32, torch.float32)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, rtol=eps, atol=eps)


def test_autocast_leaves_the_backward_pass_alone():
    """Products of the reference would be lowered once more."""

    def gradient(under_autocast: bool) -> torch.Tensor:
        tensors = CASE.packed(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = na2d_qkv(tensors["qkv"], CASE.kernel_size, CASE.dilation, tensors["rpb"], backend="reference")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under_autocast):
            return torch.autograd.grad(out, tensors["rpb"], tensors["grad_out"].to(out.dtype))[0]

    torch.testing.assert_close(gradient(True), gradient(False))


def test_second_derivatives_of_packed_tokens_are_refused():
    tensors = CASE.packed()
    out = na2d_qkv(tensors["qkv"], CASE.kernel_size, CASE.dilation, tensors["rpb"])
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors["qkv"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [case for case in CASES if not case.padded], ids=lambda case: case.name)
def test_rows_are_those_of_the_whole(case, backend):
    tensors = {name: t if t is None else t.detach() for name, t in case.tensors(torch.float32).items()}
    query, key, value, rpb = (tensors[name] for name in ("query", "key", "value", "rpb"))
    settings = case.kernel_size, case.dilation, rpb, 0.3
    whole = na2d(query, key, value, *settings, backend=backend)
    height = case.size[0]
    for rows in ((0, height), (0, 1), (height - 1, height), (height // 3, height // 3 + 2), (1, height - 1)):
        found = na2d_rows(query, key, value, *settings, rows, backend=backend)
        torch.testing.assert_close(found, whole[:, slice(*rows)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [(-1, 3), (4, 4), (5, 4), (3, 10)])
def test_rows_outside_the_map_are_refused(rows):
    with pytest.raises(ValueError, match="expected first < last in a map of 9 rows"):
        na2d_rows(*torch.zeros(3, 1, 9, 9, 2, 8), 3, 1, None, 1.0, rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_an_empty_batch(backend):
    assert na2d_rows(*torch.zeros(3, 0, 9, 9, 2, 8), 3, 1, None, 1.0, (2, 6), backend=backend).shape == (0, 4, 9, 2, 8)


def test_rows_would_lose_gradients():
    maps = torch.zeros(3, 1, 9, 9, 2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="na2d_rows has no gradient"):
        na2d_rows(*maps, 3, 1, None, 1.0, (0, 4))
    with torch.no_grad():
        assert na2d_rows(*maps, 3, 1, None, 1.0, (0, 4)).shape == (1, 4, 9, 2, 8)
