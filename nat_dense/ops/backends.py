"""Which implementation of the operator runs: one ordered table, which explains itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from nat_dense.ops import cpu, natten_na2d, reference, triton_na2d
from nat_dense.ops.problem import Problem

FORCE_VARIABLE = "NAT_DENSE_BACKEND"
"""Environment variable that stands in for `backend="auto"`: the name of a back end, for debugging."""


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    Attributes:
        name: What users write.
        why_not: Why it can't run a problem, or None where it can. Called with the problem and the variant.
        forward, backward: As in `reference.py`, plus the keyword `variant` where `variants` is not empty. No backward
            where `why_not` declines every problem that needs a gradient.
        variants: What may follow the name and a colon: code paths of one back end, for tests and debugging.
        takes_rows: Whether `forward` has the keyword `rows` (first, last), which computes those rows alone.
        spares_lse: Whether `forward` has the keyword `needs_lse`: without, no log-sum-exp is computed.
    """

    name: str
    why_not: Callable[[Problem, str], str | None]
    forward: Callable
    backward: Callable | None
    variants: tuple[str, ...] = ()
    takes_rows: bool = False
    spares_lse: bool = False


TABLE = (
    Backend("cpu", cpu.why_not, cpu.forward, cpu.backward, cpu.VARIANTS, takes_rows=True, spares_lse=True),
    Backend("natten", natten_na2d.why_not, natten_na2d.forward, None, variants=natten_na2d.VARIANTS),
    Backend("triton", triton_na2d.why_not, triton_na2d.forward, triton_na2d.backward, variants=triton_na2d.VARIANTS),
    Backend("reference", lambda problem, variant: None, reference.forward, reference.backward),
)
"""`backend="auto"` takes the first row that has no reason not to run."""

NAMES = tuple(name for row in TABLE for name in (row.name, *(f"{row.name}:{variant}" for variant in row.variants)))


def check_name(name: str) -> None:
    """Raises ValueError for a back end that the table doesn't have."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend={name!r} is not known; expected 'auto' or one of {', '.join(NAMES)}")


def select(problem: Problem, name: str = "auto") -> tuple[Backend, str]:
    """The row that runs a problem, and its variant ("" for the row's own choice).

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The named back end can't run this problem; a named one never falls back.
    """
    if name == "auto":
        name = os.environ.get(FORCE_VARIABLE) or "auto"
    check_name(name)
    if name == "auto":
        return next((row, "") for row in TABLE if row.why_not(problem, "") is None)
    base, _, variant = name.partition(":")
    row = next(row for row in TABLE if row.name == base)
    reason = row.why_not(problem, variant)
    if reason is not None:
        raise RuntimeError(
            f"backend={name!r} can't run {problem}: {reason}. Use backend='auto' to let the table choose"
        )
    return row, variant


def backend_report(problem: Problem) -> dict[str, str | None]:
    """Why each back end would not run a problem (None: it would), in the table's order."""
    return {row.name: row.why_not(problem, "") for row in TABLE}
