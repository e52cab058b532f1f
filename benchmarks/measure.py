"""What the benchmarks share: interleaved timing, the machine's own rate, peak memory, the machine's name."""

from __future__ import annotations

import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant, over the rounds of one run."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


TURN = 0.05
"""Seconds that a contestant's turn lasts at least: short calls are repeated."""


def interleaved(contestants: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, Timing]:
    """Times the contestants in turns, after a warm-up, so that a noisy minute hits all alike.

    What takes less than `TURN` runs once untimed at the start of each turn and is then repeated: its first call pays
    for what the contestant before left in the caches, a matrix product of 100 ms hardly does.
    """
    repeats = {}
    for name, run in contestants.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = math.ceil(TURN / (time.perf_counter() - start))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(max(2, rounds)):
        for name, run in contestants.items():
            if repeats[name] > 1:
                run()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def machine_rates(side: int = 2048) -> dict[str, Callable[[], object]]:
    """Contestants that multiply square matrices: torch.mm, a linear layer, a channels-last 1x1 convolution.

    The best of them is the machine's rate, `machine_flops(side) / seconds`.
    """
    a, b = torch.randn(2, side, side)
    image = a.view(1, side, 1, side).permute(0, 3, 1, 2)
    return {
        "torch.mm": lambda: torch.mm(a, b),
        "linear": lambda: F.linear(a, b),
        "1x1 convolution": lambda: F.conv2d(image, b[:, :, None, None]),
    }


def machine_flops(side: int = 2048) -> int:
    return 2 * side**3


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which the process grows at its peak during a call (Linux; 0 elsewhere)."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not refs.exists():
        return 0
    gc.collect()
    refs.write_text("5", encoding="utf-8")  # resets the high-water mark
    before = _kib(status, "VmRSS")
    run()
    return max(0, _kib(status, "VmHWM") - before) * 1024


def _kib(status: Path, field: str) -> int:
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(field))
    return int(line.split()[1])


def machine() -> str:
    """The machine in one line: processor, threads, versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.open(encoding="utf-8") if line.startswith("model name")]
        model = names[0] if names else model
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{model} ({capability}), {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.platform()}"
    )


def save(path: str | None, results: dict) -> None:
    """Writes results as JSON, with the machine's line, where a path is given."""
    if path:
        Path(path).write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n", encoding="utf-8")
