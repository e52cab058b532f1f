"""The native CPU kernels against the reference in float64: every instruction set that this processor has."""

import functools
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from nat_dense.ops import backend_report, cpu, na2d
from nat_dense.ops.functional import na2d_rows
from nat_dense.ops.problem import Problem
from tests import golden
from tests.ops.cases import CASES, Case, assert_close, expected, run

REASON = cpu.why_not(Problem((9, 9), (3, 3), (1, 1), 8, torch.float32, "cpu", True), "")
needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))
VARIANTS = [] if REASON else torch.ops.nat_dense_cpu.instruction_sets()
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""The last two are the rounding of the outputs: what is between them and the inputs is float32."""

# What the layout in lanes must get right beyond the shared table: several segments of columns, windows that reach
# further than two registers, ends of rows in every place of a vector.
LAYOUTS = (
    Case("two segments", (8, 300), dim=40, heads=1),
    Case("segments that cut groups", (9, 330), dilation=(1, 5), dim=32, heads=1),
    Case("k 13 across groups", (13, 66), (13, 13), (1, 5), dim=8, heads=1),
    Case("k 11 across groups", (11, 47), (11, 11), (1, 4), dim=8),
    Case("k 9, wide", (20, 40), (9, 9), dim=16),
    Case("a full vector of columns", (10, 16), dim=16),
    Case("one column more", (10, 17), dim=17),
    Case("one column less", (10, 15), dim=15),
    Case("columns of one window", (9, 7), dim=16),
    Case("k 13, columns of one window", (14, 13), (13, 13), dim=16, heads=1),
    Case("a last segment of one column", (8, 33), dim=512, heads=1),
    Case("padded rows, whole columns", (5, 20), (7, 7), padded=True, dim=16),
    Case("tokens that are asked for ahead", (40, 70), dim=64, heads=4),
    Case("tokens asked for ahead, dilated", (40, 70), dilation=(2, 3), dim=64, heads=4),
    # Kernels of other sides, heads that fill no vector, padded maps and several segments, from 1 MiB of queries on.
    Case("asked for ahead, a wide window", (40, 53), (3, 13), dim=40, heads=4, strided=True),
    Case("asked for ahead, a high window", (33, 64), (13, 5), dim=40, heads=4),
    Case("asked for ahead, padded", (13, 11), (5, 7), (2, 2), padded=True, dim=48, heads=4, batch=10),
    Case("asked for ahead, segments, dilated", (12, 700), (3, 7), (2, 3), dim=40, heads=1),
    Case("dilation of detection", (25, 38), dilation=(3, 3), heads=1),
    Case("padded columns of two lengths", (9, 45), (7, 7), (1, 8), padded=True, dim=16),
    Case("padded rows of two lengths", (11, 20), (5, 5), (3, 2), padded=True, dim=16, batch=2),
)
ALL = (*CASES, *LAYOUTS)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_equals_reference_in_float64(case, variant):
    assert_close(run(case, torch.float64, f"cpu:{variant}"), expected(case), TOLERANCE[torch.float64])


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_equals_reference_in_float32(case, variant):
    assert_close(run(case, torch.float32, f"cpu:{variant}"), expected(case, torch.float32), TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ALL[::3], ids=lambda case: case.name)
def test_equals_reference_in_low_precision(case, dtype, variant):
    found = run(case, dtype, f"cpu:{variant}")
    assert {t.dtype for t in found.values()} == {dtype}
    assert_close(found, expected(case, dtype), TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", sorted(path.stem for path in golden.DATA.glob("op_*.npz")))
def test_equals_the_original_kernels(name, variant):
    for output, error in golden.operator_errors(name, f"cpu:{variant}").items():
        assert error < 1e-12, output


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("case", ALL[::4], ids=lambda case: case.name)
def test_same_bits_for_the_same_number_of_threads(case, count, threads):
    threads(count)
    first, second = run(case, torch.float32, "cpu"), run(case, torch.float32, "cpu")
    assert_close(first, expected(case, torch.float32), TOLERANCE[torch.float32])
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dilation", [(1, 1), (3, 2)])
def test_rows_of_a_map_that_is_asked_for_ahead(dilation, variant):
    case = Case("rows of a map that is asked for ahead", (40, 53), (5, 7), dilation, dim=40, heads=4)
    names = ("query", "key", "value", "rpb")
    tensors = {name: t.detach() for name, t in case.tensors(torch.float32).items() if name in names}
    settings = dict(kernel_size=case.kernel_size, dilation=dilation, backend=f"cpu:{variant}")
    whole = na2d(**tensors, **settings)
    for rows in ((0, 40), (0, 2), (39, 40), (13, 20), (5, 38)):
        assert torch.equal(na2d_rows(**tensors, **settings, scale=40**-0.5, rows=rows), whole[:, slice(*rows)])


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_of_rows_meet(variant, threads):
    """One head and many threads: the rows of one map are cut into runs, whose windows overlap."""
    threads(4)
    case = Case("long", (61, 9), heads=1, dim=8)
    assert_close(run(case, torch.float32, f"cpu:{variant}"), expected(case, torch.float32), TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ALL[1::3], ids=lambda case: case.name)
def test_every_element_of_every_output_is_written(case, variant):
    """Fresh memory, the kernels' own scratch included, is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        found = run(case, torch.float32, f"cpu:{variant}")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, expected(case, torch.float32), TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["wide", "ragged groups", "padded, dilated", "k 11 across groups"])
def test_a_nan_reaches_its_own_neighborhood_only(name, variant):
    case = next(c for c in ALL if c.name == name)
    for poisoned in ("query", "key", "value", "grad_out"):
        results = []
        for backend in ("reference", f"cpu:{variant}"):
            tensors = case.tensors(torch.float32)
            with torch.no_grad():
                tensors[poisoned][0, case.size[0] // 2, 2] = float("nan")
            grad_out = tensors.pop("grad_out")
            leaves = {n: t for n, t in tensors.items() if t is not None}
            out = na2d(kernel_size=case.kernel_size, dilation=case.dilation, backend=backend, **tensors)
            gradients = torch.autograd.grad(out, leaves.values(), grad_out)
            results.append({"out": out.isnan()} | {n: g.isnan() for n, g in zip(leaves, gradients, strict=True)})
        for output, wanted in results[0].items():
            assert torch.equal(results[1][output], wanted), f"NaN in {poisoned}: {output}"


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_any_size(variant):
    """Softmax neither overflows nor underflows, and a bias of -inf hides its keys."""
    case = Case("large", (9, 20), dim=16)
    tensors = {n: None if t is None else t.detach() for n, t in case.tensors(torch.float32).items()}
    tensors.pop("grad_out")
    tensors["query"] *= 100
    tensors["rpb"][:, :, 8:] = -torch.inf
    found = na2d(kernel_size=7, backend=f"cpu:{variant}", **tensors)
    exact = na2d(kernel_size=7, backend="reference", **{n: t if t is None else t.double() for n, t in tensors.items()})
    assert_close({"out": found}, {"out": exact}, 1e-4)


@needs_kernels
def test_float32_bias_with_bfloat16_tokens():
    case = Case("mixed", (9, 20), dim=16)
    tensors = {n: None if t is None else t.detach() for n, t in case.tensors(torch.bfloat16).items()}
    grad_out = tensors.pop("grad_out")
    rpb = torch.randn(2, 13, 13, requires_grad=True)
    out = na2d(kernel_size=7, backend="cpu", **(tensors | {"rpb": rpb}))
    out.backward(grad_out)
    wide = {n: t if t is None else t.double() for n, t in tensors.items()}
    exact_rpb = rpb.detach().double().requires_grad_()
    exact = na2d(kernel_size=7, backend="reference", **(wide | {"rpb": exact_rpb}))
    exact.backward(grad_out.double())
    assert rpb.grad.dtype == torch.float32
    assert_close(
        {"out": out, "rpb": rpb.grad}, {"out": exact.detach(), "rpb": exact_rpb.grad}, TOLERANCE[torch.bfloat16]
    )
    assert_close({"rpb": rpb.grad}, {"rpb": exact_rpb.grad}, 1e-4)  # sums in float32, of exact products


@needs_kernels
def test_outputs_share_no_memory():
    tensors = {n: None if t is None else t.detach() for n, t in Case("plain", (9, 9)).tensors(torch.float32).items()}
    grad_out = tensors.pop("grad_out")
    arguments = (*tensors.values(), (7, 7), (1, 1), 1.0)
    out, lse = cpu.forward(*arguments)
    gradients = cpu.backward(grad_out, *tensors.values(), out, lse, *arguments[6:])
    everything = [t for t in (*tensors.values(), grad_out, out, lse, *gradients) if t is not None]
    assert len({t.data_ptr() for t in everything}) == len(everything)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_results_that_pass_by_the_caches(variant, dtype):
    case = Case("beyond 8 MiB, two segments", (260, 264), (3, 3), heads=1)
    assert_close(run(case, dtype, f"cpu:{variant}"), expected(case, dtype), TOLERANCE[dtype])


@needs_kernels
def test_kernels_beyond_the_largest_are_refused():
    tokens = torch.randn(3, 1, 20, 20, 1, 8)
    with pytest.raises(RuntimeError, match="a kernel of more than 13"):
        cpu.forward(*tokens, None, None, None, (3, 15), (1, 1), 1.0)


LARGE = Case("beyond 32 MiB", (520, 512), (3, 3), heads=1, rpb=False)


@needs_kernels
def test_memory_of_large_results_is_used_again():
    tokens = [t.detach() for t in LARGE.tensors(torch.float32).values() if t is not None][:3]
    first, second = (na2d(*tokens, kernel_size=3, backend="cpu") for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)
    address, wanted = second.data_ptr(), first.clone()
    del second
    tokens[0] = tokens[0] + 1
    third = na2d(*tokens, kernel_size=3, backend="cpu")
    assert third.data_ptr() == address
    assert torch.equal(first, wanted)
    assert not torch.equal(third, wanted)
    for elements in (2 * wanted.numel(), 1000, 1_000_000):  # an ordinary tensor
        third.untyped_storage().resize_(4 * elements)
        third.resize_(elements).fill_(1)
        assert third.sum() == elements


@needs_kernels
def test_every_element_of_a_large_result_is_written():
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):  # the second time on the memory of the first
            assert not any(t.isnan().any() for t in run(LARGE, torch.float32, "cpu").values())
    finally:
        torch.use_deterministic_algorithms(False)


@needs_kernels
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux alone says how much memory is in use")
def test_memory_that_is_kept_has_a_limit():
    def megabytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

    tokens = [t.detach() for t in LARGE.tensors(torch.float32).values() if t is not None][:3]
    before = megabytes()
    results = [na2d(*tokens, kernel_size=3, backend="cpu") for _ in range(16)]
    held = megabytes()
    assert held - before > 16 * 32 - 256 - 16  # of which some may have been kept
    del results
    assert held - megabytes() > 16 * 32 - 256 - 16


@needs_kernels
def test_two_threads_of_python_at_once():
    wanted = {case: run(case, torch.float32, "cpu") for case in ALL[:6]}
    failures = []

    def work():
        for case in (*wanted, *wanted):
            found = run(case, torch.float32, "cpu")
            failures.extend((case.name, name) for name in found if not torch.equal(found[name], wanted[case][name]))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


@needs_kernels
def test_auto_takes_the_native_kernels():
    assert backend_report(Problem((9, 9), (3, 3), (1, 1), 8, torch.float32, "cpu", True))["cpu"] is None


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem((9, 9), (3, 3), (1, 1), 8, torch.float32, "cuda", True), "on cuda, not on the CPU"),
        (Problem((19, 19), (15, 3), (1, 1), 8, torch.float32, "cpu", True), r"kernel_size \(15, 3\) is larger than 13"),
    ],
)
def test_says_why_not(problem, reason):
    assert re.search(reason, cpu.why_not(problem, ""))


def test_missing_kernels_are_explained(monkeypatch, tmp_path):
    problem = Problem((9, 9), (3, 3), (1, 1), 8, torch.float32, "cpu", True)
    monkeypatch.setattr(cpu, "_FOLDER", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpu, "_load", cpu._load.__wrapped__)
    reason = cpu.why_not(problem, "")
    assert "not built (no C++ compiler was found among no-such-compiler)" in reason
    assert "pip install -e . --no-build-isolation" in reason
    (tmp_path / "_cpu_build_failure.txt").write_text("CompileError: out of memory\n")
    assert "the build failed: CompileError: out of memory" in cpu.why_not(problem, "")


@needs_kernels
def test_small_tensors_of_another_size_are_not_read_past_their_end():
    """By the operator itself: exported programs call it without the checks of `na2d`."""
    tokens = torch.randn(1, 5, 5, 2, 8)
    attend = functools.partial(torch.ops.nat_dense.na2d, tokens, tokens, tokens)
    settings = ([7, 7], [1, 1], 1.0, "cpu", False)
    with pytest.raises(RuntimeError, match="expected 338 biases, found 25"):
        attend(torch.zeros(1, 5, 5), torch.zeros(2, 8), torch.zeros(2, 8), *settings)
    with pytest.raises(RuntimeError, match=r"expected pad_key and pad_value of shape \[heads, head_dim\]"):
        attend(torch.zeros(2, 13, 13), torch.zeros(8), torch.zeros(2, 8), *settings)


@needs_kernels
def test_an_instruction_set_that_is_missing_is_named():
    """ATEN_CPU_CAPABILITY makes an older processor of this one."""
    program = (
        "import torch; from nat_dense.ops import cpu; from nat_dense.ops.problem import Problem;"
        "p = Problem((9, 9), (3, 3), (1, 1), 8, torch.float32, 'cpu', True);"
        "print(cpu.why_not(p, 'avx512'), '|', cpu.why_not(p, ''))"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert "has no avx512, only portable" in printed.stdout
    assert printed.stdout.rstrip().endswith("| None")
