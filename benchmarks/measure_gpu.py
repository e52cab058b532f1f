"""What the GPU benchmarks share: device events, rotated inputs, the card's own rates, peak memory, tables."""

from __future__ import annotations

import itertools
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from measure import Timing

Run = Callable[[], object]
SLEEP = 20_000_000
"""Cycles for which the card is kept busy before a burst, so that launching it costs no time of its own."""

TURN = 0.1
"""Seconds from which on a burst gets shorter, down to one call: slow contestants don't use up the time of all."""


def require_gpu() -> None:
    """Ends the program with one line where there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a GPU, and torch sees none.")


def gpu() -> str:
    """The card and the versions in one line."""
    import triton

    card = torch.cuda.get_device_properties(0)
    return (
        f"{card.name}, {card.multi_processor_count} multiprocessors, torch {torch.__version__}, "
        f"triton {triton.__version__}, Python {platform.python_version()}"
    )


def input_sets(bytes_of_one: int) -> int:
    """How many sets of inputs are taken in turn so that the second-level cache holds none when its turn comes."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(16, 1 + -(-2 * cache // bytes_of_one)))


def timed(contestants: Mapping[str, Sequence[Run]], rounds: int = 11, burst: int = 8) -> dict[str, Timing]:
    """Seconds a call, contestants interleaved; each is a list of the same call on different inputs, taken in turn."""
    bursts = {name: min(burst, _calls(runs)) for name, runs in contestants.items()}
    turns = {name: itertools.cycle(runs) for name, runs in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(max(2, rounds)):
        for name, calls in bursts.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP)
            start.record()
            for run in itertools.islice(turns[name], calls):
                run()
            end.record()
            torch.cuda.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / calls)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _calls(runs: Sequence[Run]) -> int:
    """How many calls take `TURN`, after a first call of each."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    runs[0]()
    torch.cuda.synchronize()
    return max(1, int(TURN / (time.perf_counter() - start)))


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def peak_memory(run: Run) -> int:
    """Bytes that a call allocates at its peak."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def card_rates(dtype: torch.dtype, side: int = 8192) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), FLOP a second of a matrix product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, dtype=dtype, device="cuda")
    times = timed({"copy": [lambda: target.copy_(source)], "product": [lambda: a @ b]}, rounds=5)
    return 2 * source.nbytes / times["copy"].median, 2 * side**3 / times["product"].median


def show(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Prints rows as a table of plain text, with the columns of all."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
