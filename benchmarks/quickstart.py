"""The quickstart's trainings with four backbones and several seeds: the same heads, data and iterations.

python benchmarks/quickstart.py --seeds 0 1 2

prints a table, and writes it with every single number to quickstart.md and quickstart.json in the work-dir. What an
earlier run finished is used again. As many trainings run at once as there are cores, one thread each, until fewer are
left. Run it on an idle machine: it reports the seconds of a training beside others.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from nat_dense.datasets.shapes import ShapesOptions, generate
from nat_dense.quickstart import Training, task_config, train
from nat_dense.report.quickstart import HEADLINES, LABELS, as_fraction

BACKBONES = {
    "NAT-Nano": "nat-nano",
    "DiNAT-Nano": "dinat-nano",
    "Swin, nano": "swin-nano",
    "ResNet-18, half width": "resnet18-w32",
}
CONFIGS = {"detection": "mask-rcnn_{}_fpn_1xb4_shapes.py", "segmentation": "{}_upernet_1xb4_shapes.py"}
COLUMNS = [LABELS[name] for name in HEADLINES]


def trainings(args: argparse.Namespace) -> dict[tuple[str, int, str], Training]:
    """(backbone, seed, task) -> what to train: one seed of all backbones before the next."""
    jobs = {}
    for seed in args.seeds:
        for name in (name for name, short in BACKBONES.items() if short in args.backbones):
            for task, config in CONFIGS.items():
                cfg = task_config(config.format(BACKBONES[name]), args.data, seed, args.budget)
                folder = args.work_dir / f"{BACKBONES[name]}-{task}-seed{seed}"
                jobs[name, seed, task] = Training(f"{name}, {task}, seed {seed}", cfg, folder, ShapesOptions())
    return jobs


def rows_of(results: dict[tuple[str, int, str], dict]) -> dict[str, list[dict[str, float]]]:
    """Backbone -> for each seed: label -> metric from 0 to 1, "parameters" of the backbone, "TASK seconds"."""
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for (name, seed, task), result in results.items():
        row = runs.setdefault(name, {}).setdefault(seed, {"parameters": result["backbone_parameters"]})
        row[f"{task} seconds"] = result["seconds"]
        found = result["metrics"]
        row |= {LABELS[metric]: as_fraction(metric, found[metric]) for metric in HEADLINES if metric in found}
    return {name: list(seeds.values()) for name, seeds in runs.items()}


def table(rows: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    """Mean and sample standard deviation over the seeds, as Markdown."""
    columns = [*COLUMNS, *(f"{task} seconds" for task in CONFIGS)]
    lines = [
        f"Seeds {' '.join(map(str, args.seeds))}, budget {args.budget}, {os.cpu_count()} trainings at once on as many "
        f"cores of {platform.processor() or platform.machine()}, PyTorch {torch.__version__}.",
        "",
        f"| backbone | parameters (M) | {' | '.join(columns)} |",
        f"| --- | --- | {' | '.join('---' for _ in columns)} |",
    ]
    for name, runs in rows.items():
        cells = [name, f"{runs[0]['parameters'] / 1e6:.2f}"]
        for column in columns:
            values = [run[column] for run in runs]
            digits = 0 if column.endswith("seconds") else 3
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES.values(), default=list(BACKBONES.values()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=1.0, help="length of the trainings, relative to the configs")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/benchmark_quickstart"))
    parser.add_argument("--data", type=Path, default=Path("data/shapes"))
    args = parser.parse_args(argv)

    generate(args.data, ShapesOptions())
    jobs = trainings(args)
    rows = rows_of(dict(zip(jobs, train(list(jobs.values()), Console()), strict=True)))
    text = table(rows, args)
    (args.work_dir / "quickstart.md").write_text(text, encoding="utf-8")
    (args.work_dir / "quickstart.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
