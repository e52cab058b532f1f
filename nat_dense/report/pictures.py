"""Predictions beside ground truth, for MMDetection's instances and MMSegmentation's maps alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

SCORE_THRESHOLD = 0.5
IGNORED_COLOUR = (1.0, 1.0, 1.0)
OPACITY = 0.55
TOP = 0.08
"""Boxes that begin higher than this part of a picture have their names inside: above them there is no room."""


@dataclass(frozen=True)
class Region:
    """One coloured area of a picture.

    Attributes:
        mask: [H, W], bool.
        category: Index of the class; -1 for what evaluation ignores.
        box: x0, y0, x1, y1 in pixels; None in segmentation maps.
        score: 0 to 1; None for ground truth.
    """

    mask: np.ndarray
    category: int
    box: tuple[float, ...] | None = None
    score: float | None = None


@dataclass(frozen=True)
class Example:
    """A picture [H, W, 3] (uint8, RGB), what is in it and what a model found."""

    image: np.ndarray
    truth: list[Region]
    found: list[Region]


def predict_examples(model: Any, dataset: Any, indices: Iterable[int]) -> list[Example]:
    """Runs a model on pictures of its data set.

    Args:
        model: A detector of MMDetection with masks or a segmentor of MMSegmentation.
        dataset: Its validation set, whose pipeline loads the annotations.
        indices: Which pictures.

    Returns:
        One example per index.
    """
    model.eval()
    examples = []
    for index in indices:
        data = dataset[index]
        with torch.no_grad():
            (sample,) = model.test_step({"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]})
        image = data["inputs"].permute(1, 2, 0).numpy()[..., ::-1]  # BGR, CHW -> RGB, HWC
        if "pred_instances" in sample:
            truth = _instances(data["data_samples"].gt_instances)
            ignored = data["data_samples"].get("ignored_instances")
            truth += [Region(region.mask, -1, region.box) for region in _instances(ignored)]
            found = _instances(sample.pred_instances)
        else:
            truth = _segments(data["data_samples"].gt_sem_seg, len(dataset.metainfo["classes"]))
            found = _segments(sample.pred_sem_seg, len(dataset.metainfo["classes"]))
        examples.append(Example(np.ascontiguousarray(image), truth, found))
    return examples


def draw_examples(
    examples: Sequence[Example], classes: Sequence[str], palette: Sequence[Sequence[int]], path: Path
) -> None:
    """Draws picture, ground truth and prediction side by side, two examples per row. Boxes show the names of
    their classes; those of segmentation maps are listed below.

    Args:
        examples: What to show.
        classes: Names of the categories.
        palette: Their colours, 0 .. 255.
        path: Picture to write; the suffix sets the format.
    """
    rows = -(-len(examples) // 2)
    figure = Figure(figsize=(13, 2.3 * rows), layout="constrained")
    grid = np.atleast_2d(figure.subplots(rows, 6))
    for axes in grid.flat:
        axes.set_axis_off()
    titles = ("picture", "ground truth", "prediction")
    for index, example in enumerate(examples):
        row, first = index // 2, index % 2 * 3
        for offset, regions in enumerate(([], example.truth, example.found)):
            axes = grid[row, first + offset]
            _draw(axes, example.image, regions, classes, palette)
            if row == 0:
                axes.set_title(titles[offset], fontsize=9)
    regions = [region for example in examples for region in (*example.truth, *example.found)]
    mapped = sorted({region.category for region in regions if region.box is None})
    if mapped:
        names = {category: classes[category] if category >= 0 else "ignored" for category in mapped}
        patches = [Patch(facecolor=_colour(c, palette), edgecolor="grey", label=name) for c, name in names.items()]
        entry = 0.55 + 0.065 * max(map(len, names.values()))  # inches that the longest takes
        columns = max(1, min(len(names), int(figure.get_figwidth() / entry)))
        figure.set_figheight(figure.get_figheight() + 0.15 * -(-len(names) // columns))
        figure.legend(handles=patches, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)


def _draw(axes: Axes, image: np.ndarray, regions: list[Region], classes: Sequence[str], palette: Sequence) -> None:
    canvas = image.astype(np.float32) / 255
    for region in regions:
        colour = np.array(_colour(region.category, palette))
        canvas[region.mask] = (1 - OPACITY) * canvas[region.mask] + OPACITY * colour
    axes.imshow(canvas, interpolation="nearest")
    for region in regions:
        if region.box is not None and region.category >= 0:
            x0, y0, x1, y1 = region.box
            edge = _colour(region.category, palette)
            axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=1))
            text = classes[region.category] + ("" if region.score is None else f" {100 * region.score:.0f}")
            box = {"facecolor": edge, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
            inside = y0 < TOP * len(image)
            y, side = (max(0, y0) + 1, "top") if inside else (y0 - 1, "bottom")
            axes.text(x0, y, text, fontsize=5, color="white", va=side, bbox=box, clip_on=True)


def _colour(category: int, palette: Sequence) -> tuple[float, float, float]:
    if category < 0:
        return IGNORED_COLOUR
    red, green, blue = (value / 255 for value in palette[category])
    return red, green, blue


def _instances(instances: Any) -> list[Region]:
    """The instances of a data sample; of predictions, only the likely ones, the least likely first."""
    if instances is None or len(instances) == 0:
        return []
    boxes = instances.bboxes
    boxes = boxes.tensor if hasattr(boxes, "tensor") else boxes
    masks = instances.masks
    masks = masks.cpu().numpy() if isinstance(masks, torch.Tensor) else masks.to_ndarray()
    scores = instances.scores.tolist() if "scores" in instances else [None] * len(instances)
    fields = zip(masks.astype(bool), instances.labels.tolist(), boxes.tolist(), scores, strict=True)
    regions = [Region(mask, label, tuple(box), score) for mask, label, box, score in fields]
    kept = [region for region in regions if region.score is None or region.score >= SCORE_THRESHOLD]
    return sorted(kept, key=lambda region: region.score or 0.0)


def _segments(pixels: Any, classes: int) -> list[Region]:
    labels = pixels.data.squeeze(0).cpu().numpy()
    regions = [Region(labels == category, category) for category in range(classes) if (labels == category).any()]
    ignored = labels >= classes
    return [*regions, Region(ignored, -1)] if ignored.any() else regions
