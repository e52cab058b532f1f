"""The page that benchmarks/swap_sweep.py writes about its counts."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OUTCOMES = ("built", "refused", "original", "failed")
DISTRIBUTIONS = ("onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation")
LIBRARIES = {"mmdet": "MMDetection", "mmseg": "MMSegmentation"}

MARKER = "<!-- Below this line: written by benchmarks/swap_sweep.py. -->"
"""What stands above it in the page is kept."""


def write_page(file: Path, configs: Mapping[str, dict], runs: Mapping[str, dict], backbone: str, seed: int) -> None:
    """Writes the counts below the marker of a page.

    Args:
        file: The page, in Markdown; what stands above `MARKER` in it is kept.
        configs: By name, what became of each config: `outcome`, one of `OUTCOMES`, and `reason`.
        runs: By name, of some of the built ones: `runs`, `backbone` and `swap_seconds` or `reason`.
        backbone: The one that all configs were swapped to.
        seed: Of the choice of the runs.
    """
    prose = file.read_text(encoding="utf-8").partition(MARKER)[0] if file.exists() else ""
    lines = [
        MARKER,
        "",
        *_conditions(configs, backbone),
        "",
        *_families(configs, runs),
        "",
        *_reasons(configs),
        "",
        *_runs(runs, seed),
    ]
    file.write_text(prose + "\n".join(lines) + "\n", encoding="utf-8")


def _conditions(configs: Mapping[str, dict], backbone: str) -> Iterator[str]:
    counts = Counter(result["outcome"] for result in configs.values())
    yield "## Counts"
    yield ""
    yield (
        f"{len(configs)} configs, swapped to `{backbone}`: **{counts['built']} swapped and built, {counts['refused']} "
        f"refused with a reason, {counts['original']} whose original neither parses nor builds here, "
        f"{counts['failed']} failed.**"
    )
    yield ""
    yield f"Measured with {', '.join(_versions())} on {platform.machine()}, {os.cpu_count()} cores."


def _versions() -> Iterator[str]:
    yield f"Python {platform.python_version()}"
    for name in ("torch", *DISTRIBUTIONS):
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue


def _families(configs: Mapping[str, dict], runs: Mapping[str, dict]) -> Iterator[str]:
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for name, result in configs.items():
        counts[_family(name)][result["outcome"]] += 1
    for name, result in runs.items():
        counts[_family(name)]["ran"] += 1
        counts[_family(name)]["runs"] += result["runs"]
    yield "## By family"
    yield ""
    yield "Families are the folders of the two libraries' configs; the last column counts losses forward and backward."
    for scope, library in LIBRARIES.items():
        rows = {family: row for (of, family), row in sorted(counts.items()) if of == scope}
        yield from ("", f"### {library}", "")
        yield "| family | configs | swapped and built | refused | original fails | failed | ran |"
        yield "|---|---:|---:|---:|---:|---:|---:|"
        for family, row in rows.items():
            yield _row(family, row)
        yield _row("**all**", sum(rows.values(), Counter()))


def _row(title: str, row: Counter[str]) -> str:
    cells = [str(row[outcome] or "") for outcome in OUTCOMES]
    total = sum(row[outcome] for outcome in OUTCOMES)
    ran = f"{row['runs']} of {row['ran']}" if row["ran"] else ""
    return f"| {title} | {total} | {' | '.join(cells)} | {ran} |"


def _family(name: str) -> tuple[str, str]:
    scope, _, path = name.partition("::")
    return scope, path.partition("/")[0]


def _reasons(configs: Mapping[str, dict]) -> Iterator[str]:
    titles = {
        "refused": "Refused",
        "original": "The original neither parses nor builds here",
        "failed": "Failed",
    }
    for outcome, title in titles.items():
        reasons = Counter(_one_line(r["reason"]) for r in configs.values() if r["outcome"] == outcome)
        if reasons:
            yield from ("", f"## {title}", "", "| configs | reason |", "|---:|---|")
            for reason, count in reasons.most_common():
                yield f"| {count} | {reason} |"


def _runs(runs: Mapping[str, dict], seed: int) -> Iterator[str]:
    times = [result["swap_seconds"] for result in runs.values() if result["runs"]]
    good = sum(result["runs"] for result in runs.values())
    yield "## Loss forward and backward"
    yield ""
    yield (
        f"Of {len(runs)} of the built ones, chosen with seed {seed}, **{good} run**: two random pictures of 64 x 64 "
        "pixels, a finite loss, and a gradient for every parameter of the backbone up to the last stage "
        "that is read. Their swaps took "
        f"{statistics.median(times):.2f} s of one core at the median and {max(times):.2f} s at most."
    )
    yield ""
    yield from ("| config | backbone | runs |", "|---|---|---|")
    for name, result in sorted(runs.items()):
        outcome = "yes" if result["runs"] else f"no: {_one_line(result['reason'])}"
        yield f"| {name} | {result['backbone']} | {outcome} |"


def _one_line(reason: str) -> str:
    """The reason without what differs between machines, fit for a table's cell."""
    text = " ".join(reason.split()).replace("|", "\\|").partition(", the current sys.path is")[0]
    return re.sub(r"/[^ '\"]*/site-packages/", "", text)
