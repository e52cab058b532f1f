"""The operator on a GPU, beside everything that does the same, from one run.

python benchmarks/op_gpu.py                      all stages, with and without dilation
python benchmarks/op_gpu.py --sections tiles     the Triton kernels with other tiles, blocks, stages and registers

Needs torch and triton alone; where nat_dense is not installed, PYTHONPATH=. in front. A contestant that doesn't run
here, or would not end before --seconds, is named with the reason. Floor: the larger of the least bytes over the card's
copy rate and the useful FLOPs over its matrix rate.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

import torch
from measure import save
from measure_gpu import Run, card_rates, gpu, input_sets, peak_memory, require_gpu, show, timed, told
from swin_windows import SwinWindows
from torch import Tensor

from nat_dense.ops import flops, na2d_qkv, reference, triton_na2d

KERNEL, HEAD_DIM = 7, 32
STAGES = (((200, 304), 2), ((100, 152), 4), ((50, 76), 8), ((25, 38), 16))  # of NAT-Tiny at 800 x 1216
DILATIONS = (28, 14, 7, 3)  # of DiNAT for detection
OURS = "nat_dense triton"
REFERENCE_TOKENS = 8 * 50 * 76
"""Larger maps take the reference too long."""

Attend = Callable[[Tensor, Tensor], Tensor]
"""From qkv [B, H, W, 3, heads, head_dim] and the bias to [B, H, W, heads, head_dim]."""


class Stage:
    """The inputs of one stage, several sets of them, and what its contestants are measured against."""

    def __init__(self, size: tuple[int, int], heads: int, batch: int, dtype: torch.dtype, dilation: int = 1):
        self.size, self.heads, self.batch, self.dtype, self.dilation = size, heads, batch, dtype, dilation
        shape = (batch, *size, 3, heads, HEAD_DIM)
        one = torch.empty(shape, dtype=dtype, device="meta").nbytes
        self.token_bytes = one // 3
        self.inputs = [torch.randn(shape, dtype=dtype, device="cuda") for _ in range(input_sets(one))]
        self.grad_out = torch.randn(batch, *size, heads, HEAD_DIM, dtype=dtype, device="cuda")
        self.rpb = torch.randn(heads, 2 * KERNEL - 1, 2 * KERNEL - 1, device="cuda")
        self.forward_flops = 4 * flops.product_macs(self.grad_out.shape, (KERNEL, KERNEL))

    @property
    def title(self) -> str:
        (height, width), dtype = self.size, str(self.dtype).removeprefix("torch.")
        return f"{self.batch} x {height} x {width}, {self.heads} heads, dilation {self.dilation}, {dtype}"

    def floor(self, rates: tuple[float, float], backward: bool) -> float:
        """Seconds: each tensor moved once (forward 4, backward 8 more), each useful FLOP done once."""
        bandwidth, rate = rates
        moved, done = (12, 7 * self.forward_flops / 2) if backward else (4, self.forward_flops)
        return max(moved * self.token_bytes / bandwidth, done / rate)

    def ours(self, backend: str, with_bias: bool = True) -> Attend:
        def attend(qkv: Tensor, rpb: Tensor) -> Tensor:
            return na2d_qkv(qkv, KERNEL, self.dilation, rpb if with_bias else None, backend=backend)

        return attend

    def plain(self, qkv: Tensor, rpb: Tensor) -> Tensor:
        window = (KERNEL, KERNEL), (self.dilation, self.dilation)
        return reference.forward(*qkv.unbind(3), rpb, None, None, *window, HEAD_DIM**-0.5)[0]

    def flex(self) -> Attend:
        """Compiled flex_attention with the same mask and bias, tokens in the order of rows."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        (height, width), dilation = self.size, self.dilation

        def start(place: Tensor, group: Tensor, length: int) -> Tensor:
            members = (length - group + dilation - 1) // dilation
            return torch.minimum((place - KERNEL // 2).clamp_min(0), members - KERNEL)

        def inside(query: Tensor, key: Tensor, length: int) -> Tensor:
            group = query % dilation
            offset = key // dilation - start(query // dilation, group, length)
            return (key % dilation == group) & (offset >= 0) & (offset < KERNEL)

        def seen(b, h, q, k):
            return inside(q // width, k // width, height) & inside(q % width, k % width, width)

        mask = create_block_mask(seen, None, None, height * width, height * width, device="cuda", _compile=True)
        compiled = torch.compile(flex_attention, dynamic=False)

        def entry(query: Tensor, key: Tensor) -> Tensor:
            return (key // dilation - query // dilation + KERNEL - 1).clamp(0, 2 * KERNEL - 2)

        def attend(qkv: Tensor, rpb: Tensor) -> Tensor:
            def biased(score, b, h, q, k):
                return score + rpb[h, entry(q // width, k // width), entry(q % width, k % width)]

            query, key, value = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4)
            out = compiled(query, key, value, score_mod=biased, block_mask=mask)
            return out.transpose(1, 2).unflatten(1, self.size)

        return attend

    def swin(self, fused: bool, compiled: bool = False) -> Attend:
        windows = SwinWindows(self.size, window=KERNEL, shift=KERNEL // 2, fused=fused, device="cuda")
        return torch.compile(windows.__call__, dynamic=False) if compiled else windows

    def natten(self, fused: bool) -> Attend:
        """NATTEN, which has no bias: its fused kernels, or its path through compiled flex_attention."""
        import natten

        settings: dict = {"kernel_size": KERNEL, "dilation": self.dilation}
        if not fused:
            natten.allow_flex_compile(True, True)  # forward and backward
            settings |= {"backend": "flex-fna", "torch_compile": True}
        elif not natten.HAS_LIBNATTEN:
            raise RuntimeError("this NATTEN was built without its CUDA kernels")
        return lambda qkv, rpb: natten.na2d(*qkv.unbind(3), **settings)

    def runs(self, attend: Attend, backward: bool) -> list[Run]:
        return [self._step(attend, qkv) if backward else self._forward(attend, qkv) for qkv in self.inputs]

    def _forward(self, attend: Attend, qkv: Tensor) -> Run:
        def run() -> None:
            with torch.no_grad():
                attend(qkv, self.rpb)

        return run

    def _step(self, attend: Attend, qkv: Tensor) -> Run:
        leaves = qkv.detach().requires_grad_(), self.rpb.detach().requires_grad_()

        def run() -> None:
            torch.autograd.grad(attend(*leaves), leaves, self.grad_out, allow_unused=True)

        return run


def contestants(stage: Stage) -> dict[str, Callable[[], Attend]]:
    """What attends to each stage, built only when its turn comes; the first is what others are divided by."""
    builders = {
        OURS: lambda: stage.ours("triton"),
        "the same without bias": lambda: stage.ours("triton", with_bias=False),
        "flex_attention, compiled": stage.flex,
        "Swin windows, SDPA": lambda: stage.swin(fused=True),
        "Swin windows, SDPA, compiled": lambda: stage.swin(fused=True, compiled=True),
        "Swin windows, unfused": lambda: stage.swin(fused=False),
        "NATTEN fused, no bias": lambda: stage.natten(fused=True),
        "NATTEN flex compiled, no bias": lambda: stage.natten(fused=False),
    }
    if stage.batch * stage.size[0] * stage.size[1] <= REFERENCE_TOKENS:
        builders["nat_dense reference"] = lambda: stage.plain
    if stage.dilation > 1:  # windows have no dilation
        builders = {name: build for name, build in builders.items() if "Swin" not in name}
    return builders


def check(stage: Stage, attend: Attend) -> float:
    """Largest difference from the reference, on the first map: a whole batch is what the contestant is compiled for."""
    qkv = stage.inputs[0]
    with torch.no_grad():
        return (attend(qkv, stage.rpb)[:1].float() - stage.plain(qkv[:1].float(), stage.rpb)).abs().max().item()


def compare(stage: Stage, rounds: int, rates: tuple[float, float], deadline: float) -> list[dict]:
    torch.compiler.reset()  # each stage is a recompilation, and after a few torch runs the rest uncompiled
    rows: dict[str, dict] = {}
    forwards, steps = {}, {}
    for name, build in contestants(stage).items():
        if time.monotonic() > deadline:
            print(f"{stage.title}, {name}: left out, the time is up")
            continue
        try:
            attend = build()
            forwards[name], steps[name] = (stage.runs(attend, backward) for backward in (False, True))
            rows[name] = {
                "attention": name,
                "forward peak MiB": peak_memory(forwards[name][0]) / 2**20,
                "peak MiB": peak_memory(steps[name][0]) / 2**20,
                "error": check(stage, attend) if name in (OURS, "flex_attention, compiled") else "",
            }
        except Exception as error:  # whatever a contestant's compiler raises, the others are measured
            print(f"{stage.title}, {name}: not measured, {told(error)}", flush=True)
            rows.pop(name, None), forwards.pop(name, None), steps.pop(name, None)
    for label, runs, backward in (("forward", forwards, False), ("forward+backward", steps, True)):
        times = timed(runs, rounds)
        for name, t in times.items():
            rows[name] |= {
                f"{label} ms": t.median * 1e3,
                f"{label} spread": t.spread,
                f"{label} / ours": t.median / times[OURS].median if OURS in times else "",
                f"{label} / floor": t.median / stage.floor(rates, backward),
            }
    return list(rows.values())


def settings() -> list[tuple[str, triton_na2d.Tile]]:
    """What the kernels are tried with; some don't compile, and are left out where they are run."""
    tiles = (*triton_na2d.TILES.values(), ((8, 8), (2, 8)), ((8, 8), (4, 8)))
    choices = itertools.product(tiles, ((1, 16), (2, 16), (4, 16)), (1, 2, 3), (None, 128, 168))
    return [
        (kernel, triton_na2d.Tile(*tile, block, stages, registers))
        for tile, block, stages, registers in choices
        for kernel in triton_na2d.KERNELS
    ]


def seconds_with(stage: Stage, kernel: str, tile: triton_na2d.Tile, calls: int) -> float:
    """Median time of one kernel with one setting; those of the others are the launcher's own."""
    choose = triton_na2d.choose_tile
    attend = stage.ours("triton")
    runs = stage.runs(attend, backward=kernel != "forward")
    triton_na2d._launch.cache_clear()
    triton_na2d.choose_tile = lambda name, *problem: tile if name == kernel else choose(name, *problem)
    try:
        runs[0]()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for run in itertools.islice(itertools.cycle(runs), calls):
                run()
            torch.cuda.synchronize()
    finally:
        triton_na2d.choose_tile = choose
        triton_na2d._launch.cache_clear()
    return statistics.median(event.device_time for event in profile.events() if event.name == f"{kernel}_kernel") / 1e6


def compile_every(first: int, step: int, dtype: torch.dtype) -> None:
    """Fills Triton's cache, from several processes at once: one would take a quarter of an hour."""
    stage = Stage(*STAGES[-1], batch=1, dtype=dtype)
    for kernel, tile in settings()[first::step]:
        with suppress(Exception):  # what doesn't compile is counted when it is timed
            seconds_with(stage, kernel, tile, calls=1)


def tiles(stage: Stage, rounds: int) -> list[dict]:
    """The fastest settings of each kernel at one stage, and the launcher's own choice."""
    found: dict[str, list[tuple[float, str]]] = {kernel: [] for kernel in triton_na2d.KERNELS}
    failed = 0
    for kernel, tile in settings():
        try:
            found[kernel].append((seconds_with(stage, kernel, tile, rounds), str(tile)))
        except Exception:  # whatever the compiler raises
            failed += 1
    print(f"{stage.title}: {failed} settings don't compile or run")
    size, token = stage.grad_out.shape[1:3], (HEAD_DIM * stage.dtype.itemsize, stage.dtype.itemsize)
    rows = []
    for kernel, times in found.items():
        own = triton_na2d.choose_tile(kernel, tuple(size), (KERNEL, KERNEL), *token)
        own_seconds = seconds_with(stage, kernel, own, rounds)
        rows.append({"kernel": kernel, "us": own_seconds * 1e6, "setting": f"own: {own}"})
        rows += [{"kernel": kernel, "us": seconds * 1e6, "setting": tile} for seconds, tile in sorted(times)[:5]]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("stages", "tiles", "dilated")
    parser.add_argument("--sections", nargs="+", choices=names, default=["stages", "dilated"])
    parser.add_argument("--stages", nargs="+", type=int, choices=range(len(STAGES)), default=list(range(len(STAGES))))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=360, help="nothing new is started after this time")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    require_gpu()
    deadline = time.monotonic() + args.seconds
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    rates = card_rates(dtype)
    print(f"{gpu()}\ncopy {rates[0] / 1e12:.2f} TB/s, {args.dtype} products {rates[1] / 1e12:.0f} TFLOP/s")
    results = {}
    if "tiles" in args.sections:
        step = os.cpu_count() or 1
        with ProcessPoolExecutor(step, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_every, range(step), [step] * step, [dtype] * step))
    for section in args.sections:
        for (size, heads), largest in ((STAGES[i], DILATIONS[i]) for i in args.stages):
            if time.monotonic() > deadline:
                print(f"{section}, {size[0]} x {size[1]}: left out, the time is up")
                continue
            stage = Stage(size, heads, args.batch, dtype, largest if section == "dilated" else 1)
            try:
                rows = tiles(stage, args.rounds) if section == "tiles" else compare(stage, args.rounds, rates, deadline)
            except Exception as error:
                print(f"{section}: {stage.title}: not measured, {told(error)}", flush=True)
                continue
            results[f"{section}: {stage.title}"] = rows
            show(f"{section}: {stage.title}", rows)
            save(args.json, {"gpu": gpu(), "copy": rates[0], "product": rates[1], **results})  # what there is so far


if __name__ == "__main__":
    main()
