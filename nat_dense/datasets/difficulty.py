"""How hard a generated shapes set is, measured from its files: sizes, occlusion, contrast, crowding, class balance.

    python -m nat_dense.datasets.difficulty DATA

prints one Markdown table with a column per split.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from nat_dense.datasets.scene import CLASSES, lab
from nat_dense.datasets.shapes import FIRST_THING, GROUND, SPLITS

SMALL, LARGE = 32**2, 96**2  # pixels: COCO's limits of small and large
RIM = 3  # pixels on either side of an outline that its contrast is measured on
PERCENTILES = (10, 50, 90)


def measure(root: str | Path, split: str) -> dict[str, float]:
    """Measures one split.

    Args:
        root: A folder that `shapes.generate` wrote.
        split: "training" or "validation".

    Returns:
        Name -> number; the unit is in the name. Sizes, occlusion and contrast leave crowds out. Contrast is the
        distance in CIELAB between the mean colours of the 3 pixels inside and outside a thing's outline.

    Raises:
        FileNotFoundError: `root` holds no such split.
    """
    root = Path(root)
    coco = json.loads((root / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
    things = [a for a in coco["annotations"] if not a["iscrowd"]]
    side = np.sqrt([a["area"] for a in things])
    extent = np.array([max(a["bbox"][2:]) for a in things])
    occlusion = np.array([a["occlusion"] for a in things])
    area = np.array([a["area"] for a in things])
    contrast = _contrasts(root, split)
    classes = Counter(a["category_id"] for a in things)
    files = sorted((root / "annotations" / split).glob("*.png"))
    labels = [_read(path, cv2.IMREAD_GRAYSCALE) for path in files]
    result: dict[str, float] = {
        "pictures": len(coco["images"]),
        "things per picture": len(things) / len(coco["images"]),
        "crowds per picture": (len(coco["annotations"]) - len(things)) / len(coco["images"]),
        "% of things smaller than 32 x 32 px": 100 * float(np.mean(area < SMALL)),
        "% of things larger than 96 x 96 px": 100 * float(np.mean(area > LARGE)),
    }
    for name, values in (
        ("longer side of the box, px", extent),
        ("square root of the area, px", side),
        ("hidden share, %", 100 * occlusion),
        ("contrast at the outline, CIELAB", contrast),
    ):
        for percentile in PERCENTILES:
            result[f"{name}: {percentile} % have less than"] = float(np.percentile(values, percentile))
    result["% of things whose class the mean colour tells"] = 100 * _colour_accuracy(root, split)
    result["% of things hidden by more than a tenth"] = 100 * float(np.mean(occlusion > 0.1))
    result["% of things hidden by more than a third"] = 100 * float(np.mean(occlusion > 1 / 3))
    result["% of pixels that are ground"] = 100 * float(np.mean([np.mean(m == GROUND) for m in labels]))
    result["% of pixels that are things"] = 100 * float(np.mean([np.mean(m >= FIRST_THING) for m in labels]))
    for number, name in enumerate(CLASSES, start=1):
        result[f"% of things that are a {name}"] = 100 * classes[number] / len(things)
    return result


def _colour_accuracy(root: Path, split: str) -> float:
    """Share of things whose mean colour in CIELAB is nearest to the median colour of its own class in training."""
    colours, categories = _mean_colours(root, SPLITS[0])
    medians = np.stack([np.median(colours[categories == number], axis=0) for number in range(1, len(CLASSES) + 1)])
    colours, categories = _mean_colours(root, split)
    nearest = 1 + np.linalg.norm(colours[:, None] - medians, axis=2).argmin(axis=1)
    return float(np.mean(nearest == categories))


def _mean_colours(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """[things, 3] mean colours in CIELAB and [things] category ids."""
    colours, categories = [], []
    for image, things in _pictures(root, split):
        for annotation, mask in things:
            colours.append(image[mask].mean(axis=0))
            categories.append(annotation["category_id"])
    return lab(np.array(colours)), np.array(categories)


def _pictures(root: Path, split: str) -> Iterator[tuple[np.ndarray, list[tuple[dict, np.ndarray]]]]:
    """Each picture [H, W, 3] (BGR, 0..1), and its things except crowds, with their masks [H, W] (bool)."""
    coco = json.loads((root / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
    grouped = defaultdict(list)
    for annotation in coco["annotations"]:
        if not annotation["iscrowd"]:
            grouped[annotation["image_id"]].append(annotation)
    for entry in coco["images"]:
        image = _read(root / "images" / split / entry["file_name"], cv2.IMREAD_COLOR).astype(np.float32) / 255
        things = []
        for annotation in grouped[entry["id"]]:
            runs = coco_mask.frPyObjects(annotation["segmentation"], *image.shape[:2])
            things.append((annotation, coco_mask.decode(coco_mask.merge(runs)).astype(bool)))
        yield image, things


def _read(path: Path, flags: int) -> np.ndarray:
    image = cv2.imread(str(path), flags)
    if image is None:
        raise FileNotFoundError(f"{path} is missing or not a picture")
    return image


def _contrasts(root: Path, split: str) -> np.ndarray:
    """[things]: how unlike a thing's rim its surroundings are, in CIELAB."""
    kernel = np.ones((2 * RIM + 1, 2 * RIM + 1), np.uint8)
    result = []
    for image, things in _pictures(root, split):
        for _, mask in things:
            solid = mask.astype(np.uint8)
            inside = mask & (cv2.erode(solid, kernel, borderValue=1) == 0)
            outside = ~mask & (cv2.dilate(solid, kernel) > 0)
            if inside.any() and outside.any():
                means = np.stack([image[inside].mean(axis=0), image[outside].mean(axis=0)])
                result.append(float(np.linalg.norm(np.subtract(*lab(means)))))
    return np.array(result)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nat_dense.datasets.difficulty", description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder that nat_dense.datasets.shapes wrote")
    args = parser.parse_args(arguments)
    try:
        columns = [measure(args.data, split) for split in SPLITS]
    except FileNotFoundError as error:
        parser.error(f"{error}: expected a folder that nat_dense.datasets.shapes wrote")
    print(f"| | {' | '.join(SPLITS)} |\n|---|{'---|' * len(SPLITS)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(f'{column[name]:.4g}' for column in columns)} |")


if __name__ == "__main__":
    main()
