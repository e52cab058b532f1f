"""Whole backbones on a CPU: NAT and DiNAT beside mmdet's Swin-Tiny and ResNet-50, time and peak memory, from one run.

python benchmarks/backbone_cpu.py                         everything (about half an hour on two cores)
python benchmarks/backbone_cpu.py --sizes 512x512 --no-backward
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from io import StringIO

import torch
from measure import interleaved, machine, machine_flops, machine_rates, peak_memory, save
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nat_dense.models import NAT, DiNAT

SIZES = ("224x224", "512x512", "800x1216", "1536x2048")
BACKWARD_SIZES = ("224x224", "512x512", "800x1216")


def contestants() -> dict[str, Callable[[], nn.Module]]:
    with redirect_stdout(StringIO()):
        from mmdet.models.backbones import ResNet, SwinTransformer
    return {
        "NAT-Tiny": lambda: NAT(arch="tiny"),
        "NAT-Tiny with_cp": lambda: NAT(arch="tiny", with_cp=True),
        "DiNAT-Tiny detection": lambda: DiNAT(arch="tiny", dilations="detection"),
        "Swin-Tiny": lambda: SwinTransformer(),
        "ResNet-50": lambda: ResNet(depth=50, norm_eval=False),
    }


def step(model: nn.Module, image: torch.Tensor, backward: bool, dtype: torch.dtype | None) -> Callable[[], object]:
    """A forward pass in eval mode, or a forward and backward pass in training mode."""
    autocast = nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)

    def forward():
        with torch.inference_mode(), autocast:
            return model(image)

    def train():
        model.zero_grad(set_to_none=True)
        with autocast:
            maps = model(image)
        sum(m.float().mean() for m in maps).backward()

    model.train(backward)
    return train if backward else forward


def image_of(size: str) -> torch.Tensor:
    height, width = (int(n) for n in size.split("x"))
    return torch.randn(1, 3, height, width)


def measure_memory(name: str, size: str, backward: bool, dtype: str | None) -> int:
    """Peak growth in bytes of one call in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        name,
        "--sizes",
        size,
        "--threads",
        str(torch.get_num_threads()),
    ]
    command += ["--bf16"] if dtype else []
    command += [] if backward else ["--no-backward"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def gflops(model: nn.Module, image: torch.Tensor) -> float:
    """Of the maps as a whole: in inference NAT computes rows that bands share twice, which is no useful work."""
    model = copy.deepcopy(model).requires_grad_(False)
    model.eval()  # not chained: mmdet's Swin returns None from it
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        model(image)
    return counter.get_total_flops() / 1e9


def report(size: str, backward: bool, bf16: bool, rounds: int, memory: bool, console: Console) -> dict:
    image = image_of(size)
    models = {name: build() for name, build in contestants().items() if backward or "with_cp" not in name}
    if bf16:
        models = {name: model for name, model in models.items() if name in ("NAT-Tiny", "Swin-Tiny")}
    dtype = torch.bfloat16 if bf16 else None
    runs = {name: step(model, image, backward, dtype) for name, model in models.items()}
    if bf16:
        runs["NAT-Tiny float32"] = step(NAT(arch="tiny"), image, backward, None)
    times = interleaved(runs | machine_rates(), rounds)
    rate = max(machine_flops() / times[name].median for name in machine_rates()) / 1e9
    rows = {}
    for name in runs:
        model_name = name.removesuffix(" float32")
        row = {"seconds": times[name].median, "spread": times[name].spread}
        row["ratio to Swin-Tiny"] = row["seconds"] / times["Swin-Tiny"].median
        if not backward:
            row["share of machine rate"] = gflops(models[model_name], image) / row["seconds"] / rate
        if memory:
            row["peak MiB"] = (
                measure_memory(model_name, size, backward, "bf16" if bf16 and name == model_name else None) / 2**20
            )
        rows[name] = row
    title = f"{size}, {'forward + backward' if backward else 'forward'}, {'bfloat16 autocast' if bf16 else 'float32'}"
    table = Table("backbone", *next(iter(rows.values())), title=f"{title}; machine rate {rate:.0f} GFLOP/s")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.3f}" if value < 10 else f"{value:.0f}" for value in row.values()))
    console.print(table)
    return {"machine rate GFLOP/s": rate, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-backward", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory_of:
        model, dtype = contestants()[args.memory_of](), torch.bfloat16 if args.bf16 else None
        step(model, torch.randn(1, 3, 64, 64), not args.no_backward, dtype)()  # what is allocated once
        print(peak_memory(step(model, image_of(args.sizes[0]), not args.no_backward, dtype)))
        return
    console = Console(width=140)
    console.print(machine())
    results = {}
    for size in args.sizes:
        for backward in (False, True):
            if backward and (args.no_backward or size not in BACKWARD_SIZES):
                continue
            key = f"{size} {'forward+backward' if backward else 'forward'}"
            results[key] = report(size, backward, args.bf16, args.rounds, not args.no_memory, console)
    save(args.json, results)


if __name__ == "__main__":
    main()
