"""The NATTEN back end: why it declines, and its scale, layout and log-sum-exp through NATTEN's own CPU path."""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from nat_dense.ops import backend_report, backends, na2d, natten_na2d, reference
from nat_dense.ops.problem import Problem
from tests.ops.cases import CASES

INSTALLED = natten_na2d._why_not_usable() is None
PROBLEM = Problem((9, 11), (5, 3), (1, 2), 16, torch.float32, "cuda", has_rpb=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"has_rpb": True}, "NATTEN has no relative position bias"),
        ({"size": (4, 11)}, r"no map smaller than kernel_size \* dilation, and this one counts as \(5, 11\)"),
        ({"needs_grad": True}, "a gradient is asked for"),
        ({"device": "cpu"}, "the tensors are on cpu, and NATTEN's fused kernels run on CUDA devices only"),
    ],
)
def test_the_row_says_why_not(changes, reason):
    problem = dataclasses.replace(PROBLEM, **changes)
    with pytest.raises(RuntimeError, match=reason):
        backends.select(problem, "natten")


def test_the_report_has_its_reason():
    problem = dataclasses.replace(PROBLEM, device="cpu")
    assert backend_report(problem)["natten"] == (
        "the tensors are on cpu, and NATTEN's fused kernels run on CUDA devices only"
    )


def test_an_old_natten_is_known_by_its_arguments(monkeypatch):
    def na2d_of_old(query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None):
        raise AssertionError("not to be called")

    monkeypatch.setattr(natten_na2d.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(natten_na2d, "_load", lambda: SimpleNamespace(na2d=na2d_of_old, HAS_LIBNATTEN=True))
    reason = natten_na2d._why_not_usable.__wrapped__()
    assert reason == "the installed NATTEN is too old: its na2d lacks backend, return_lse"


def test_a_natten_that_does_not_say_what_it_can_run_is_not_asked(monkeypatch):
    def na2d_of_another(query, key, value, kernel_size, dilation=1, scale=None, backend=None, return_lse=False):
        raise AssertionError("not to be called")

    monkeypatch.setattr(natten_na2d.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(natten_na2d, "_load", lambda: SimpleNamespace(na2d=na2d_of_another, HAS_LIBNATTEN=True))
    monkeypatch.setitem(sys.modules, "natten.backends", ModuleType("natten.backends"))
    reason = natten_na2d._why_not_usable.__wrapped__()
    assert reason.startswith("the installed NATTEN doesn't say what it can run (cannot import name")


def test_absence_names_the_command(monkeypatch):
    monkeypatch.setattr(natten_na2d.importlib.util, "find_spec", lambda name: None)
    assert natten_na2d._why_not_usable.__wrapped__() == (
        "NATTEN is not installed: `pip install natten --no-build-isolation`"
    )


@pytest.mark.skipif(not INSTALLED, reason=natten_na2d._why_not_usable() or "")
def test_a_build_without_kernels_says_so():
    if natten_na2d._load().HAS_LIBNATTEN:
        pytest.skip("this NATTEN has its CUDA kernels")
    assert natten_na2d.why_not(PROBLEM, "") == (
        "the installed NATTEN was built without its CUDA kernels (HAS_LIBNATTEN is False)"
    )


@pytest.mark.skipif(not INSTALLED, reason=natten_na2d._why_not_usable() or "")
def test_natten_says_which_heads_it_takes():
    problem = dataclasses.replace(PROBLEM, device="cpu", head_dim=24)
    assert natten_na2d.why_not(problem, "flex") == "NATTEN's flex path takes no torch.float32 with head_dim 24"


@pytest.mark.skipif(not INSTALLED, reason=natten_na2d._why_not_usable() or "")
@pytest.mark.parametrize("scale", [0.3, 0.0])
@pytest.mark.parametrize(
    "name",
    ["wide", "map equals window", "map equals dilated window", "ragged groups", "kernel pair", "head_dim 64, k 9"],
)
def test_flex_equals_the_reference(name, scale):
    case = next(case for case in CASES if case.name == name)
    case = dataclasses.replace(case, dim=16 if case.dim == 24 else case.dim)
    query, key, value = (case.tensors(torch.float32)[t].detach() for t in ("query", "key", "value"))
    arguments = (query, key, value, None, None, None, case.kernel_size, case.dilation, scale)
    out, lse = natten_na2d.forward(*arguments, variant="flex")
    wanted, wanted_lse = reference.forward(*arguments)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-4, atol=1e-5)
    found = na2d(query, key, value, case.kernel_size, case.dilation, scale=scale, backend="natten:flex")
    torch.testing.assert_close(found, out)


@pytest.mark.skipif(
    natten_na2d.why_not(PROBLEM, "") is not None or not torch.cuda.is_available(),
    reason="needs a CUDA device and a NATTEN with its kernels",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_kernels_equal_the_reference(dtype):
    tensors = torch.randn(3, 2, 33, 40, 4, 32, device="cuda", dtype=dtype).unbind(0)
    found = na2d(*tensors, 7, 2, backend="natten")
    wanted = na2d(*(t.double() for t in tensors), 7, 2, backend="reference")
    assert (found.double() - wanted).abs().max() < 2**-6 * wanted.abs().max()
