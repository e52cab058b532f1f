"""Losses and metrics over the iterations of a run, from what MMEngine's local visualizer backend wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

Scalars = dict[str, dict[int, float]]
COLOURS = ("#2563eb", "#db2777", "#059669", "#d97706", "#7c3aed", "#0891b2")


def read_scalars(work_dir: str | Path) -> Scalars:
    """Reads every scalar that was logged in a work-dir.

    Args:
        work_dir: A Runner's work-dir; if a run was resumed, the later parts win.

    Returns:
        Name -> iteration -> value.

    Raises:
        FileNotFoundError: Nothing was logged there.
    """
    files = sorted(Path(work_dir).glob("*/vis_data/scalars.json"))
    if not files:
        raise FileNotFoundError(f"{work_dir} holds no logged scalars (*/vis_data/scalars.json): expected a work-dir")
    scalars: Scalars = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            for name, value in entry.items():
                if isinstance(value, (int, float)):
                    scalars.setdefault(name, {})[int(entry["step"])] = float(value)
    return scalars


def draw_curves(scalars: Scalars, metrics: Mapping[str, str], path: Path) -> None:
    """Draws the losses on the left and the metrics on the right.

    Args:
        scalars: As `read_scalars` returns.
        metrics: Label -> name of a scalar, for the right half.
        path: Picture to write; the suffix sets the format.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    loss_axes, metric_axes = figure.subplots(1, 2)
    losses = [name for name in scalars if "loss" in name]
    for name in losses:
        total = name == "loss"
        _plot(loss_axes, scalars[name], name, 2.2 if total else 1.0, marker=None, alpha=1.0 if total else 0.75)
    for label, name in metrics.items():
        _plot(metric_axes, scalars.get(name, {}), label, 2.2, marker="o", alpha=1.0)
    loss_axes.set_ylim(bottom=0)
    metric_axes.set_ylim(0, 1)
    loss_axes.set_title("training loss")
    metric_axes.set_title("validation metric")
    for axes in (loss_axes, metric_axes):
        axes.set_xlabel("iteration")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _plot(axes, points: dict[int, float], label: str, width: float, marker: str | None, alpha: float) -> None:
    steps = sorted(points)
    colour = COLOURS[len(axes.lines) % len(COLOURS)]
    values = [points[step] for step in steps]
    axes.plot(steps, values, label=label, linewidth=width, marker=marker, color=colour, alpha=alpha)
