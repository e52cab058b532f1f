"""The quickstart's tables and page: numbers, curves and pictures of its trainings."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.table import Table

from nat_dense.datasets.shapes import ShapesOptions
from nat_dense.mm.resuming import latest_checkpoint
from nat_dense.progress import clock
from nat_dense.report.curves import draw_curves, read_scalars
from nat_dense.report.page import Section, write_page
from nat_dense.version import __version__

EXAMPLES = 8
"""Pictures shown: the first of the validation split, not the best."""

PICTURES = "predictions.png"
"""Where a training leaves them, in its work-dir."""

PERCENT = ("mIoU", "mAcc", "aAcc")
"""What MMSegmentation gives in percent."""

LABELS = {
    "coco/bbox_mAP": "box mAP",
    "coco/segm_mAP": "mask mAP",
    "coco/bbox_mAP_50": "box AP at IoU 0.5",
    "coco/segm_mAP_50": "mask AP at IoU 0.5",
    "coco/bbox_mAP_75": "box AP at IoU 0.75",
    "coco/segm_mAP_75": "mask AP at IoU 0.75",
    "mIoU": "mIoU",
    "mAcc": "mean class accuracy",
    "aAcc": "pixel accuracy",
}
HEADLINES = ("coco/bbox_mAP", "coco/segm_mAP", "mIoU")


@dataclass(frozen=True)
class Outcome:
    """A finished training.

    Attributes:
        title: For people.
        folder: Its work-dir.
        result: As `nat_dense.quickstart.train` returns.
        cfg: Its config.
    """

    title: str
    folder: Path
    result: dict[str, Any]
    cfg: Config

    def metrics(self) -> dict[str, float]:
        """Name -> number from 0 to 1, those of LABELS in their order."""
        found = self.result["metrics"]
        return {name: as_fraction(name, found[name]) for name in LABELS if name in found}


def as_fraction(name: str, value: float) -> float:
    """A metric from 0 to 1, whichever library computed it."""
    return value / 100 if name in PERCENT else value


def results_table(outcome: Outcome) -> Table:
    """The numbers of one training, for the terminal."""
    table = Table(title=f"{outcome.title} on unseen pictures", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in outcome.metrics().items():
        table.add_row(LABELS[name], f"{value:.3f}", style="bold" if name in HEADLINES else "")
    return table


def write_report(path: Path, outcomes: Sequence[Outcome], options: ShapesOptions) -> Path:
    """Draws the curves and writes the page.

    Args:
        path: HTML file to write.
        outcomes: The trainings, in the order of the page.
        options: The data that they were trained on.

    Returns:
        `path`.
    """
    headline = [
        (f"{outcome.title}: {LABELS[name]}", f"{value:.3f}")
        for outcome in outcomes
        for name, value in outcome.metrics().items()
        if name in HEADLINES
    ]
    seconds = max(outcome.result["seconds"] for outcome in outcomes)
    headline.append(("the longer training, including evaluations", f"{clock(seconds)} min"))
    introduction = (
        f"Two models with Neighborhood Attention backbones, trained from scratch on {options.train} generated pictures "
        f"of {options.size} x {options.size} pixels and evaluated on {options.val} others: things of six shapes, "
        "overlapping, on textured ground; colour and texture give away the class of most of them, but not of all."
    )
    write_page(
        path,
        title="nat_dense quickstart",
        introduction=introduction,
        headline=headline,
        sections=[*map(_section, outcomes), _how(outcomes)],
        footer=f"nat_dense {__version__}, PyTorch {torch.__version__}, {_machine()}",
    )
    return path


def _section(outcome: Outcome) -> Section:
    curves = outcome.folder / "curves.png"
    scalars = read_scalars(outcome.folder)
    for name in PERCENT:
        scalars[name] = {step: as_fraction(name, value) for step, value in scalars.get(name, {}).items()}
    draw_curves(scalars, {LABELS[name]: name for name in HEADLINES if name in outcome.result["metrics"]}, curves)
    result = outcome.result
    rows = [(LABELS[name], f"{value:.3f}") for name, value in outcome.metrics().items()]
    return Section(
        title=outcome.title,
        text=(
            f"{result['parameters'] / 1e6:.2f} million parameters, {result['backbone_parameters'] / 1e6:.2f} of them "
            f"in the backbone; {result['iterations']} iterations of {outcome.cfg.train_dataloader.batch_size} pictures "
            f"in {clock(result['seconds'])} minutes including evaluations"
            f"{' since the last start' if result['interrupted'] else ''}. Below: the curves, then the first {EXAMPLES} "
            "validation pictures, as they come. White: crowds, which are not evaluated."
        ),
        table=[("metric", "value"), *rows],
        pictures=[curves, outcome.folder / PICTURES],
    )


def _how(outcomes: Sequence[Outcome]) -> Section:
    commands = []
    for outcome in outcomes:
        config = shlex.quote(str(outcome.folder / Path(outcome.cfg.filename).name))
        again = shlex.quote(f"{outcome.folder}-again")
        checkpoint = shlex.quote(str(latest_checkpoint(outcome.folder)))
        fresh = " --cfg-options resume=False load_from=None" if outcome.result["interrupted"] else ""
        commands += [
            f"python tools/train.py {config} --work-dir {again}{fresh}",
            f"python tools/test.py {config} {checkpoint}",
        ]
    return Section(
        title="To run it again by hand",
        text="The same trainings and evaluations through the tools that serve every other config (those of "
        "configs/quickstart, with this run's data, seed and length):",
        commands="\n".join(commands),
    )


def _machine() -> str:
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
