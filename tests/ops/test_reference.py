"""The reference itself, against a brute-force loop, full attention and the original kernels."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from nat_dense.ops import na2d, reference
from tests import golden
from tests.ops.cases import CASES, Case

SMALL = [case for case in CASES if math.prod(case.size) <= 200 and case.dim <= 24 and case.kernel_size[0] <= 7]


def brute_force(case: Case, query, key, value, rpb, pad_key, pad_value, **_):
    """One query and one axis at a time, by the words of the definition."""

    def window(i, n, k, d):
        n = max(n, k * d)
        group = list(range(i % d, n, d))
        place = group.index(i)
        start = min(max(place - k // 2, 0), len(group) - k)
        return [(group[start + a], start + a - place + k - 1) for a in range(k)]

    out = torch.zeros_like(query)
    (height, width), (kh, kw), (dh, dw) = case.size, case.kernel_size, case.dilation
    for b, i, j, h in itertools.product(range(case.batch), range(height), range(width), range(case.heads)):
        logits, values = [], []
        for (y, oy), (x, ox) in itertools.product(window(i, height, kh, dh), window(j, width, kw, dw)):
            inside = y < height and x < width
            k, v = (key[b, y, x, h], value[b, y, x, h]) if inside else (pad_key[h], pad_value[h])
            bias = rpb[h, oy, ox] if rpb is not None else 0.0
            logits.append(query[b, i, j, h] @ k * case.dim**-0.5 + bias)
            values.append(v)
        out[b, i, j, h] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_reference_equals_brute_force(case):
    tensors = {name: None if t is None else t.detach() for name, t in case.tensors().items()}
    expected = brute_force(case, **tensors)
    grad_out = tensors.pop("grad_out")
    found = na2d(kernel_size=case.kernel_size, dilation=case.dilation, backend="reference", **tensors)
    assert found.shape == grad_out.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e5, -1e8])
def test_weights_of_large_logits_add_up_to_one(size):
    query, key = torch.randn(2, 1, 5, 6, 2, 4)
    out = na2d(query, key, torch.ones_like(query), 3, rpb=torch.full((2, 5, 5), size), backend="reference")
    torch.testing.assert_close(out, torch.ones_like(out))


def test_window_over_the_whole_map_is_full_attention():
    query, key, value = torch.randn(3, 2, 7, 7, 3, 16, dtype=torch.float64)
    found = na2d(query, key, value, 7, backend="reference")
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, (7, 7))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_equal_those_of_autograd(case):
    """`reference.backward` is written out; autograd through `reference.forward` must agree."""
    tensors = case.tensors()
    grad_out = tensors.pop("grad_out")
    leaves = [t for t in tensors.values() if t is not None]
    out = na2d(kernel_size=case.kernel_size, dilation=case.dilation, backend="reference", **tensors)
    found = torch.autograd.grad(out, leaves, grad_out)
    scale = case.dim**-0.5
    traced, _ = reference.forward(*tensors.values(), case.kernel_size, case.dilation, scale)
    expected = torch.autograd.grad(traced, leaves, grad_out, materialize_grads=True)
    for name, a, b in zip((n for n, t in tensors.items() if t is not None), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["op_a3", "op_a9"])
def test_reference_equals_the_original_kernels(name):
    for output, error in golden.operator_errors(name, "reference").items():
        assert error < 1e-12, output


def test_chunks_bound_the_memory(monkeypatch):
    """Rows are taken in chunks, and the chunks don't change the result."""
    case = Case("chunked", (24, 20))
    tensors = case.tensors()
    grad_out = tensors.pop("grad_out")
    leaves = [t for t in tensors.values() if t is not None]

    def run():
        out = na2d(kernel_size=7, backend="reference", **tensors)
        return out, *torch.autograd.grad(out, leaves, grad_out)

    whole = run()
    counts = []
    chunks = reference._chunks
    monkeypatch.setattr(reference, "_chunks", lambda *args: counts.append(len(found := list(chunks(*args)))) or found)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 3 * 20 * 2 * 32 * 49 * 8)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert counts == [8, 8]
