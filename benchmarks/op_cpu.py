"""The operator and the attention module on a CPU, beside everything that does the same, from one run.

python benchmarks/op_cpu.py                          all sections (about ten minutes on two cores)
python benchmarks/op_cpu.py --sections operator module --rounds 21

NATTEN and compiled flex_attention take part where they are installed and compile; a line says so where they don't.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO

import torch
from measure import Timing, interleaved, machine, machine_flops, machine_rates, peak_memory, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nat_dense.models.attention import NeighborhoodAttention2D
from nat_dense.ops import flops, na2d, reference

KERNEL, HEAD_DIM = 7, 32
STAGES = (((200, 304), 2), ((100, 152), 4), ((50, 76), 8), ((25, 38), 16))  # of NAT-Tiny at 800 x 1216
DILATIONS = (28, 14, 7, 3)  # of DiNAT for detection
PADDED = ((((32, 40), 2), 28), (((16, 20), 4), 14), (((8, 10), 8), 7), (((4, 5), 16), 3))  # the same at 128 x 160
FLEX_STAGE = ((50, 76), 8)
Run = Callable[[], object]


class Operator:
    """Inputs of one call, and its contestants."""

    def __init__(self, stage, dilation: int = 1, dtype: torch.dtype = torch.float32):
        (height, width), heads = stage
        self.kernel, self.dilation = (KERNEL, KERNEL), (dilation, dilation)
        qkv = torch.randn(1, height, width, 3, heads, HEAD_DIM, dtype=dtype, requires_grad=True)
        self.query, self.key, self.value = qkv.unbind(3)
        self.rpb = torch.randn(heads, 2 * KERNEL - 1, 2 * KERNEL - 1, requires_grad=True)
        pads = torch.randn(2, heads, HEAD_DIM, dtype=dtype).unbind(0)
        self.pads = pads if min(height, width) < KERNEL * dilation else (None, None)
        self.grad_out = torch.randn(1, height, width, heads, HEAD_DIM, dtype=dtype)
        self.tokens = height * width * heads
        self.forward_flops = 2 * 2 * flops.product_macs(self.query.shape, self.kernel)
        self.step_flops = 7 * self.forward_flops // 2

    def attend(self) -> Tensor:
        pad_key, pad_value = self.pads
        arguments = self.query, self.key, self.value, self.kernel, self.dilation, self.rpb
        return na2d(*arguments, pad_key=pad_key, pad_value=pad_value, backend="cpu")

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.attend()

    def step(self) -> None:
        torch.autograd.grad(self.attend(), (self.query, self.key, self.value, self.rpb), self.grad_out)

    @torch.no_grad()
    def reference(self) -> Tensor:
        tensors = self.query, self.key, self.value, self.rpb, *self.pads
        return reference.forward(*tensors, self.kernel, self.dilation, HEAD_DIM**-0.5)[0]

    def natten(self) -> Run:
        """NATTEN's only CPU path; it has no bias."""
        import natten.functional

        tensors = [t.detach().contiguous() for t in (self.query, self.key, self.value)]
        return lambda: natten.functional.na2d(*tensors, kernel_size=KERNEL, dilation=self.dilation, backend="flex-fna")

    def flex(self) -> Run:
        """Compiled flex_attention with the same mask and bias, checked against the reference."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        _, height, width, _, _ = self.query.shape
        query, key, value = (
            t.detach().flatten(1, 2).transpose(1, 2).contiguous() for t in (self.query, self.key, self.value)
        )
        rpb = self.rpb.detach()

        def start(token: Tensor, length: int) -> Tensor:
            return (token - KERNEL // 2).clamp(0, length - KERNEL)

        def seen(b, h, q, k):
            row, column = k // width - start(q // width, height), k % width - start(q % width, width)
            return (row >= 0) & (row < KERNEL) & (column >= 0) & (column < KERNEL)

        def biased(score, b, h, q, k):
            row = (k // width - q // width + KERNEL - 1).clamp(0, 2 * KERNEL - 2)
            column = (k % width - q % width + KERNEL - 1).clamp(0, 2 * KERNEL - 2)
            return score + rpb[h, row, column]

        mask = create_block_mask(seen, None, None, height * width, height * width, device="cpu")
        compiled = torch.compile(flex_attention)

        @torch.no_grad()
        def run() -> Tensor:
            return compiled(query, key, value, score_mod=biased, block_mask=mask)

        found = run().transpose(1, 2).unflatten(1, (height, width))
        torch.testing.assert_close(found, self.reference(), rtol=1e-4, atol=1e-4)
        return run


def machine_rate(times: dict[str, Timing]) -> float:
    """FLOP/s of the fastest matrix product."""
    return max(machine_flops() / times[name].median for name in machine_rates())


def operator_section(rounds: int, dtype: torch.dtype) -> list[dict]:
    cases = {f"{h} x {w}, {n} heads": Operator(((h, w), n), dtype=dtype) for (h, w), n in STAGES}
    for stage, dilation in zip(STAGES, DILATIONS, strict=True):
        (height, width), heads = stage
        cases[f"{height} x {width}, {heads} heads, dilation {dilation}"] = Operator(stage, dilation, dtype)
    for stage, dilation in PADDED:
        (height, width), heads = stage
        cases[f"{height} x {width}, {heads} heads, dilation {dilation}, padded"] = Operator(stage, dilation, dtype)
    runs = {f"{name}: {kind}": getattr(case, kind) for name, case in cases.items() for kind in ("forward", "step")}
    times = interleaved(runs | machine_rates(), rounds)
    rate = machine_rate(times)
    rows = []
    for name, case in cases.items():
        forward, step = times[f"{name}: forward"], times[f"{name}: step"]
        rows.append(
            {
                "map": name,
                "forward ms": forward.median * 1e3,
                "spread": forward.spread,
                "GFLOP/s": case.forward_flops / forward.median / 1e9,
                "share of machine": case.forward_flops / forward.median / rate,
                "forward+backward ms": step.median * 1e3,
                "its spread": step.spread,
                "its share": case.step_flops / step.median / rate,
                "ns per token and head": forward.median / case.tokens * 1e9,
            }
        )
    return [*rows, {"map": "machine rate, GFLOP/s", "GFLOP/s": rate / 1e9}]


def others_section(rounds: int) -> list[dict]:
    case = Operator(FLEX_STAGE)
    runs: dict[str, Run] = {"nat_dense cpu": case.forward, "nat_dense reference": case.reference}
    for name, build in (("NATTEN flex, eager, no bias", case.natten), ("flex_attention, compiled", case.flex)):
        try:
            runs[name] = build()
        except ImportError as error:
            print(f"{name}: not measured, {error}")
    times = interleaved(runs, rounds)
    ours = times["nat_dense cpu"].median
    return [
        {"50 x 76, 8 heads, forward": name, "ms": t.median * 1e3, "spread": t.spread, "times ours": t.median / ours}
        for name, t in times.items()
    ]


def modules(stage) -> dict[str, tuple[nn.Module, tuple]]:
    """Attention of the same tokens, heads and channels: ours, and Swin's with shifted 7 x 7 windows; with inputs."""
    with redirect_stdout(StringIO()):
        from mmdet.models.backbones.swin import ShiftWindowMSA
    (height, width), heads = stage
    channels = heads * HEAD_DIM
    ours = NeighborhoodAttention2D(channels, heads, KERNEL)
    swin = ShiftWindowMSA(channels, heads, window_size=KERNEL, shift_size=KERNEL // 2)
    tokens = torch.randn(1, height, width, channels)
    return {"nat_dense": (ours, (tokens,)), "Swin": (swin, (tokens.flatten(1, 2), (height, width)))}


def module_run(module: nn.Module, inputs: tuple, backward: bool) -> Run:
    tokens, *shape = inputs

    def forward():
        with torch.inference_mode():
            return module(tokens, *shape)

    def step():
        leaf = tokens.detach().requires_grad_()
        out = module(leaf, *shape)
        return torch.autograd.grad(out, (leaf, *module.parameters()), torch.ones_like(out))

    return step if backward else forward


def module_section(rounds: int) -> list[dict]:
    rows = []
    for i, stage in enumerate(STAGES):
        row = {"map": f"{stage[0][0]} x {stage[0][1]}, {stage[1]} heads"}
        for backward in (False, True):
            runs = {name: module_run(*pair, backward) for name, pair in modules(stage).items()}
            times = interleaved(runs, rounds)
            label = "forward+backward" if backward else "forward"
            row |= {
                f"{label} ms": times["nat_dense"].median * 1e3,
                "spread" + "'" * backward: times["nat_dense"].spread,
            }
            row[f"/ Swin{' ' * backward}"] = times["nat_dense"].median / times["Swin"].median
        memory = {name: measured_memory(i, name) for name in ("nat_dense", "Swin")}
        row |= {"peak MiB": memory["nat_dense"] / 2**20, "peak / Swin": memory["nat_dense"] / max(memory["Swin"], 1)}
        rows.append(row)
    return rows


def measured_memory(stage: int, name: str) -> int:
    """Peak growth in bytes of a forward pass in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, str(stage), "--threads", str(torch.get_num_threads())]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def linearity_section(rounds: int) -> list[dict]:
    """The first stage's map at four image sizes: the time per token should not depend on it."""
    sizes = {"224x224": (56, 56), "512x512": (128, 128), "800x1216": (200, 304), "1536x2048": (384, 512)}
    cases = {name: Operator((size, 2)) for name, size in sizes.items()}
    times = interleaved({name: case.forward for name, case in cases.items()}, rounds)
    per_token = {name: times[name].median / case.tokens for name, case in cases.items()}
    return [
        {
            "image": name,
            "ns per token and head": t * 1e9,
            "spread": times[name].spread,
            "/ 512x512": t / per_token["512x512"],
        }
        for name, t in per_token.items()
    ]


def show(console: Console, title: str, rows: list[dict]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        cells = (row.get(column, "") for column in rows[0])
        table.add_row(
            *(cell if isinstance(cell, str) else f"{cell:.3g}" if cell < 100 else f"{cell:.0f}" for cell in cells)
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("operator", "bfloat16", "others", "module", "linearity")
    parser.add_argument("--sections", nargs="+", choices=names, default=list(names))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory_of:
        name, stage = args.memory_of
        module_run(*modules(((14, 14), 2))[name], backward=False)()  # what is allocated once
        print(peak_memory(module_run(*modules(STAGES[int(stage)])[name], backward=False)))
        return
    console = Console(width=180)
    console.print(machine())
    sections = {
        "operator": ("operator, float32", lambda: operator_section(args.rounds, torch.float32)),
        "bfloat16": (
            "operator, bfloat16 against the float32 machine rate",
            lambda: operator_section(args.rounds, torch.bfloat16),
        ),
        "others": ("beside other implementations", lambda: others_section(args.rounds)),
        "module": ("attention module beside Swin's", lambda: module_section(args.rounds)),
        "linearity": ("time per token", lambda: linearity_section(args.rounds)),
    }
    results = {}
    for name in args.sections:
        title, measure = sections[name]
        results[name] = measure()
        show(console, title, results[name])
    save(args.json, results)


if __name__ == "__main__":
    main()
