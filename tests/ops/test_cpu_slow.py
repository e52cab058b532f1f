"""Long runs of the native CPU kernels: random cases, many calls, offsets beyond 32 bits."""

import random
import resource

import pytest
import torch

from nat_dense.ops import cpu, na2d
from tests.ops.cases import NAMES, Case, assert_close, errors, run
from tests.ops.test_cpu import TOLERANCE, VARIANTS, needs_kernels

pytestmark = [needs_kernels, pytest.mark.slow]


def random_case(seed: int) -> tuple[Case, torch.dtype, str]:
    """Small maps of every kind: bordered, ragged, padded or not."""
    pick = random.Random(seed)
    kernel = tuple(pick.choice((3, 3, 5, 5, 7, 7, 9, 11, 13)) for _ in range(2))
    dilation = tuple(pick.choice((1, 1, 2, pick.randint(1, 30 // k))) for k in kernel)
    padded = pick.random() < 0.4
    least = (1, 1) if padded else tuple(k * d for k, d in zip(kernel, dilation, strict=True))
    size = tuple(n + pick.choice((pick.randint(0, 3), pick.randint(0, 20))) for n in least)
    case = Case(
        f"seed {seed}",
        size,
        kernel,
        dilation,
        batch=pick.randint(1, 2),
        heads=pick.randint(1, 3),
        dim=pick.choice((1, 3, 8, 16, 17, 32, pick.randint(1, 70))),
        rpb=pick.random() < 0.8,
        padded=padded,
        strided=pick.random() < 0.5,
    )
    dtype = pick.choice(list(TOLERANCE))
    return case, dtype, pick.choice(VARIANTS)


@pytest.mark.parametrize("first", range(0, 5000, 500))
def test_random_cases(first):
    """Within the tolerance or, where a sum cancels, no further off than the reference in the same dtype."""
    for seed in range(first, first + 500):
        case, dtype, variant = random_case(seed)
        wanted = run(case, torch.float64, "reference", rounded=dtype, seed=seed)
        found = errors(run(case, dtype, f"cpu:{variant}", seed=seed), wanted)
        allowed = dict.fromkeys(found, TOLERANCE[dtype])
        if not all(found[name] < allowed[name] for name in found):
            of_reference = errors(run(case, dtype, "reference", seed=seed), wanted)
            allowed = {name: max(allowed[name], of_reference[name]) for name in found}
        for name, error in found.items():
            assert error <= allowed[name], f"{case}, {dtype}, {variant}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_does_not_grow(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    tensors = Case("small", (14, 15), dim=16).tensors(torch.float32)
    grad_out = tensors.pop("grad_out")

    def call(times: int) -> int:
        for _ in range(times):
            out = na2d(kernel_size=7, backend="cpu", **tensors)
            torch.autograd.grad(out, [t for t in tensors.values() if t is not None], grad_out)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes

    try:
        after_few, after_all = call(1000), call(9000)
    finally:
        torch.set_num_threads(before)
    assert after_all - after_few < 1024


def test_offsets_beyond_32_bits():
    """Two maps that lie 2**31 elements apart; what is between them is never touched."""
    case = Case("far apart", (7, 8), dim=8, heads=1)
    near = {n: t.detach() for n, t in case.tensors(torch.bfloat16).items() if t is not None}
    storage = torch.empty(2**31 + 10_000, dtype=torch.bfloat16)
    far = {}
    for i, name in enumerate(NAMES[:3]):
        start = i * near[name].numel()
        far[name] = storage.as_strided((2, 7, 8, 1, 8), (2**31, 64, 8, 8, 1), start)
        far[name].copy_(near[name].expand(2, -1, -1, -1, -1))
    arguments = (near["rpb"], None, None, (7, 7), (1, 1), 0.5)
    out, lse = cpu.forward(*far.values(), *arguments)
    assert torch.equal(out[0], out[1])
    grad_out = near["grad_out"].expand(2, -1, -1, -1, -1)
    gradients = cpu.backward(grad_out, *far.values(), *arguments[:3], out, lse, *arguments[3:])
    grad_qkv = gradients[0]
    assert torch.equal(grad_qkv[0], grad_qkv[1])
    expected, _ = cpu.forward(*(near[name] for name in NAMES[:3]), *arguments)
    assert_close({"out": out[:1]}, {"out": expected.double()}, TOLERANCE[torch.bfloat16])
