"""The quickstart's trainings with three backbones and several seeds, side by side: the same heads, data and iterations.

python benchmarks/quickstart.py --seeds 0 1 2

prints a table, and writes it with every single number to quickstart.md and quickstart.json in the work-dir. What an
earlier run finished is used again. Run it on an idle machine: it reports seconds.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from nat_dense.datasets.shapes import ShapesOptions, generate
from nat_dense.quickstart import task_config, train
from nat_dense.report.quickstart import HEADLINES, LABELS, as_fraction

BACKBONES = {"NAT-Nano": "nat-nano", "ResNet-18, half width": "resnet18-w32", "Swin, nano": "swin-nano"}
CONFIGS = {"detection": "mask-rcnn_{}_fpn_1xb8_shapes.py", "segmentation": "{}_upernet_1xb8_shapes.py"}
COLUMNS = [LABELS[name] for name in HEADLINES]


def measure(name: str, seed: int, args: argparse.Namespace, console: Console) -> dict[str, float]:
    """Trains one backbone under both heads.

    Returns:
        Label -> metric from 0 to 1; "seconds" of both trainings with their evaluations, "parameters" of the backbone.
    """
    row: dict[str, float] = {"seconds": 0.0}
    for task, config in CONFIGS.items():
        cfg = task_config(config.format(BACKBONES[name]), args.data, seed, args.budget)
        folder = args.work_dir / f"{BACKBONES[name]}-{task}-seed{seed}"
        result = train(cfg, folder, f"{name}, {task}, seed {seed}: training", console)
        row["seconds"] += result["seconds"]
        row["parameters"] = result["backbone_parameters"]
        found = result["metrics"]
        row |= {LABELS[metric]: as_fraction(metric, found[metric]) for metric in HEADLINES if metric in found}
    return row


def table(rows: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    """Mean and sample standard deviation over the seeds, as Markdown."""
    columns = [*COLUMNS, "seconds"]
    lines = [
        f"Seeds {' '.join(map(str, args.seeds))}, budget {args.budget}, {torch.get_num_threads()} threads of "
        f"{platform.processor() or platform.machine()}, PyTorch {torch.__version__}.",
        "",
        f"| backbone | parameters (M) | {' | '.join(columns)} |",
        f"| --- | --- | {' | '.join('---' for _ in columns)} |",
    ]
    for name, runs in rows.items():
        cells = [name, f"{runs[0]['parameters'] / 1e6:.2f}"]
        for column in columns:
            values = [run[column] for run in runs]
            digits = 0 if column == "seconds" else 3
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

    console = Console()
    generate(args.data, ShapesOptions())
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for name in (name for name, short in BACKBONES.items() if short in args.backbones):
            rows.setdefault(name, []).append(measure(name, seed, args, console))
    text = table(rows, args)
    (args.work_dir / "quickstart.md").write_text(text)
    (args.work_dir / "quickstart.json").write_text(json.dumps(rows, indent=1))
    print(text)


if __name__ == "__main__":
    main()
