"""Adding up what programs left."""

# ruff: noqa: N803  (upper case marks what is known when a kernel is compiled)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "columns", "run", "runs"])
def sum_kernel(parts, totals, rows, columns, run, runs, BLOCK: tl.constexpr):
    """Sums of runs of rows, always in the same order. A program takes a run of a block of columns.

    All programs are on the first axis of the grid: the others end at 65,535, and there are more columns than that.

    Args:
        parts: float32 [rows, columns], contiguous.
        totals: Written; float32 [runs, columns].
        run, runs: Rows that a program adds up, and how many times that.
        BLOCK: Rows and columns taken at a time.
    """
    index = tl.program_id(0) % runs
    column = tl.program_id(0) // runs * BLOCK[1] + tl.arange(0, BLOCK[1])
    total = tl.full([BLOCK[0], BLOCK[1]], 0.0, tl.float32)
    end = tl.minimum((index + 1) * run, rows)
    for first in range(index * run, end, BLOCK[0]):
        row = (first + tl.arange(0, BLOCK[0]))[:, None]
        entries = parts + row.to(tl.int64) * columns + column[None, :]
        total += tl.load(entries, mask=(row < end) & (column < columns)[None, :], other=0.0)
    tl.store(totals + index.to(tl.int64) * columns + column, tl.sum(total, 0), mask=column < columns)
