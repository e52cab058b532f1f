"""The cases that every back end is tested on, one table, and what their results are compared with."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nat_dense.ops import cpu, na2d
from nat_dense.ops.problem import completed_size

NAMES = ("query", "key", "value", "rpb", "pad_key", "pad_value")


@dataclass(frozen=True)
class Case:
    """Inputs of one call; `padded` gives it a pad key and value."""

    name: str
    size: tuple[int, int]
    kernel_size: tuple[int, int] = (7, 7)
    dilation: tuple[int, int] = (1, 1)
    batch: int = 1
    heads: int = 2
    dim: int = 32
    rpb: bool = True
    padded: bool = False
    strided: bool = False

    def tensors(self, dtype=torch.float64, seed: int = 0, device="cpu") -> dict[str, torch.Tensor | None]:
        """Leaves with gradients, by the operator's argument names (and `grad_out`, without)."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

        shape = (self.batch, *self.size, self.heads, self.dim)
        if self.strided:
            packed = draw(self.batch, *self.size, 3, self.heads, self.dim)
            leaves = dict(zip(("query", "key", "value"), packed.unbind(3), strict=True))
        else:
            leaves = {name: draw(*shape) for name in ("query", "key", "value")}
        bias = (self.heads, *(2 * k - 1 for k in self.kernel_size))
        leaves["rpb"] = draw(*bias) if self.rpb else None
        for name in ("pad_key", "pad_value"):
            leaves[name] = draw(self.heads, self.dim) if self.padded else None
        leaves["grad_out"] = draw(*shape).detach()
        return leaves

    def packed(self, dtype=torch.float64, **options) -> dict[str, torch.Tensor | None]:
        """As `tensors`, with one leaf `qkv` [B, H, W, 3, heads, head_dim] for query, key and value."""
        tensors = self.tensors(dtype, **options)
        tokens = [tensors.pop(name).detach() for name in ("query", "key", "value")]
        return {"qkv": torch.stack(tokens, dim=3).requires_grad_()} | tensors

    def __post_init__(self):
        fits = completed_size(self.size, self.kernel_size, self.dilation) == self.size
        assert fits or self.padded, self.name


CASES = (
    Case("wide", (9, 23)),
    Case("tall, k 3", (31, 8), (3, 3), dim=16),
    Case("map equals window", (7, 7), heads=3),
    Case("map equals dilated window", (14, 21), dilation=(2, 3)),
    Case("ragged groups", (25, 41), (3, 3), (8, 3), heads=1, dim=8),
    Case("ragged groups, k 5", (19, 15), (5, 5), (2, 2), batch=2),
    Case("kernel pair", (13, 16), (3, 7), (2, 1), dim=24),
    Case("k 13, no bias", (27, 29), (13, 13), (2, 2), heads=1, dim=8, rpb=False),
    Case("k 11", (11, 12), (11, 11), dim=24),
    Case("odd head_dim", (10, 12), (5, 5), dim=19),
    Case("head_dim 1", (10, 9), (3, 5), dim=1),
    Case("head_dim 64, k 9", (12, 10), (9, 9), dim=64, rpb=False),
    Case("views of a fused qkv", (12, 17), dilation=(1, 2), batch=2, strided=True),
    Case("one token", (1, 1), padded=True),
    Case("padded rows", (5, 18), padded=True, batch=2),
    Case("padded columns, strided", (17, 4), padded=True, strided=True),
    Case("padded, dilated", (10, 12), dilation=(3, 4), padded=True),
    Case("padded, dilation beyond the map", (6, 9), (3, 3), (28, 5), padded=True, dim=16, rpb=False),
    Case("pad given but not needed", (9, 10), padded=True, dim=8),
    Case("many columns", (8, 70), dim=16, heads=1),
)
CASE = Case("plain", (9, 11), (5, 3), (1, 2), dim=16)
PADDED = next(case for case in CASES if case.name == "padded, dilated")
BACKENDS = ("reference", *(["cpu"] if cpu.is_available() else []))
"""Those that run on every CPU, but for the kernels where they aren't built."""


@functools.cache
def expected(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Output and gradients of the reference in float64, on inputs rounded to `dtype`."""
    return run(case, torch.float64, "reference", rounded=dtype)


def run(
    case: Case, dtype: torch.dtype, backend: str, rounded: torch.dtype | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    tensors = {n: None if t is None else t.detach() for n, t in case.tensors(rounded or dtype, seed).items()}
    tensors = {n: None if t is None else t.to(dtype).requires_grad_(n in NAMES) for n, t in tensors.items()}
    grad_out = tensors.pop("grad_out")
    leaves = {name: t for name, t in tensors.items() if t is not None}
    out = na2d(kernel_size=case.kernel_size, dilation=case.dilation, backend=backend, **tensors)
    return {"out": out.detach()} | dict(zip(leaves, torch.autograd.grad(out, leaves.values(), grad_out), strict=True))


def errors(found: dict, wanted: dict) -> dict[str, float]:
    """Largest differences relative to the value plus the standard deviation (of few values: the largest)."""
    assert found.keys() == wanted.keys()
    largest = {}
    for name, exact in wanted.items():
        size = max(exact.std().item() if exact.numel() > 8 else exact.abs().max().item(), 1e-2)
        largest[name] = ((found[name].double() - exact).abs() / (size + exact.abs())).max().item()
    return largest


def assert_close(found: dict, wanted: dict, tolerance: float) -> None:
    for name, error in errors(found, wanted).items():
        assert error < tolerance, f"{name}: {error:.1e} (allowed {tolerance:.0e})"  # a NaN is not below either


class OperatorsSeen(TorchDispatchMode):
    """The names of this package's operators that run inside it, in their order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nat_dense":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
