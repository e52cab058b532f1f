"""The shapes data set, generated: no download, exact labels.

    python -m nat_dense.datasets.shapes OUT --train 6400 --val 200 --size 128 --seed 0

writes one folder that serves detection (COCO JSON) and segmentation (ADE20K folders) from the same pictures:

    OUT/images/{training,validation}/*.jpg
    OUT/annotations/{training,validation}/*.png    0 = void (crowds), 1 = ground, 2.. = CLASSES: reduce_zero_label=True
    OUT/annotations/instances_{training,validation}.json
    OUT/dataset.json                               what it was made with; written last

Every picture has a random stream of its own, seeded by (seed, split, index): the same seed gives the same bytes, the
splits never share a picture, and a longer set begins with the shorter one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from nat_dense.datasets.outlines import mask_to_box, mask_to_polygons, mask_to_rle
from nat_dense.datasets.scene import CLASSES, Scene, Thing, draw_scene
from nat_dense.progress import progress

VERSION = 1  # raised whenever the same options give different bytes
SPLITS = ("training", "validation")
MIN_SIZE = 48  # pixels: below it the smallest things have fewer than 6
SEMANTIC_CLASSES = ("ground", *CLASSES)
PALETTE = ((60, 60, 60), (230, 75, 60), (60, 120, 220), (245, 190, 40), (150, 90, 200), (50, 170, 110), (240, 130, 180))
VOID, GROUND, FIRST_THING = 0, 1, 2  # values of the index PNGs
JPEG_QUALITY = 92


@dataclass(frozen=True)
class ShapesOptions:
    """What a generated set depends on.

    Attributes:
        train, val: Pictures in the two splits.
        size: Side of the square pictures in pixels.
        seed: Start of the random streams.
        version: Of the generator.
    """

    train: int = 6400
    val: int = 200
    size: int = 128
    seed: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        for name, least in (("train", 1), ("val", 1), ("size", MIN_SIZE), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")


def generate(out: str | Path, options: ShapesOptions | None = None) -> bool:
    """Makes sure that `out` holds the set made with these options.

    The set is written beside `out` under a temporary name and renamed when it is complete, so a folder named `out` is
    either a whole set or not one at all.

    Args:
        out: Folder to make. One that holds the very same set is left as it is.
        options: What to draw.

    Returns:
        Whether anything was written.

    Raises:
        FileExistsError: `out` holds something else, or a set with other options or missing files.
    """
    out, options = Path(out), options or ShapesOptions()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        check_complete(out, options)
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-unfinished-", dir=out.parent))
    try:
        for split, count in zip(SPLITS, (options.train, options.val), strict=True):
            _write_split(unfinished, split, count, options)
        _write_json(unfinished / "dataset.json", asdict(options))
        unfinished.chmod(0o755)  # mkdtemp keeps it private
        os.replace(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return True


def check_complete(out: Path, options: ShapesOptions) -> None:
    """Raises FileExistsError unless `out` holds exactly the set that these options make."""
    remedy = "choose another folder or remove this one yourself"
    if not (out / "dataset.json").is_file():
        raise FileExistsError(f"{out} exists and is not a generated shapes set (no dataset.json): {remedy}")
    found = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    if found != asdict(options):
        raise FileExistsError(f"{out} holds a shapes set made with {found}, not with {asdict(options)}: {remedy}")
    for split, count in zip(SPLITS, (options.train, options.val), strict=True):
        for folder, suffix in (("images", ".jpg"), ("annotations", ".png")):
            present = len(list((out / folder / split).glob(f"*{suffix}")))
            if present != count:
                raise FileExistsError(f"{out / folder / split} has {present} {suffix} files, not {count}: {remedy}")


def semantic_map(scene: Scene) -> np.ndarray:
    """The scene's labels as an ADE20K index map: [H, W], uint8, VOID where a crowd is."""
    labels = np.full(scene.image.shape[:2], GROUND, np.uint8)
    for thing in scene.things:
        labels[thing.mask] = VOID if thing.crowd else FIRST_THING + thing.category
    return labels


def coco_annotation(thing: Thing, number: int, image: int) -> dict:
    """A thing as a COCO annotation with ids `number` and `image`; `occlusion` is ours: the hidden share of its area."""
    return {
        "id": number,
        "image_id": image,
        "category_id": thing.category + 1,
        "bbox": mask_to_box(thing.mask),
        "area": int(thing.mask.sum()),
        "iscrowd": int(thing.crowd),
        "segmentation": mask_to_rle(thing.mask) if thing.crowd else mask_to_polygons(thing.mask),
        "occlusion": round(thing.occlusion, 4),
    }


def _write_split(root: Path, split: str, count: int, options: ShapesOptions) -> None:
    images, labels = root / "images" / split, root / "annotations" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    coco: dict = {
        "info": {"description": f"nat_dense shapes, {split}", **asdict(options)},
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)],
        "images": [],
        "annotations": [],
    }
    for index in progress(range(count), f"Drawing {split} pictures", count):
        rng = np.random.default_rng([options.seed, SPLITS.index(split), index])
        scene = draw_scene(rng, options.size)
        name = f"{split}_{index:05d}"
        _write_image(images / f"{name}.jpg", scene.image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        _write_image(labels / f"{name}.png", semantic_map(scene), [])
        coco["images"].append(
            {"id": index + 1, "file_name": f"{name}.jpg", "width": options.size, "height": options.size}
        )
        for thing in scene.things:
            coco["annotations"].append(coco_annotation(thing, len(coco["annotations"]) + 1, index + 1))
    _write_json(root / "annotations" / f"instances_{split}.json", coco)


def _write_image(path: Path, image: np.ndarray, flags: list[int]) -> None:
    ok, data = cv2.imencode(path.suffix, image, flags)
    if not ok:
        raise OSError(f"{path}: OpenCV could not encode the picture")
    path.write_bytes(data.tobytes())


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The command line; bad options and folders end it with a message."""
    defaults = ShapesOptions()
    parser = argparse.ArgumentParser(prog="python -m nat_dense.datasets.shapes", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--train", type=int, default=defaults.train, help="training pictures")
    parser.add_argument("--val", type=int, default=defaults.val, help="validation pictures")
    parser.add_argument("--size", type=int, default=defaults.size, help="side of a picture in pixels")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="the same seed gives the same bytes")
    args = parser.parse_args(arguments)
    try:
        options = ShapesOptions(args.train, args.val, args.size, args.seed)
        written = generate(args.out, options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}: {'written' if written else 'already complete'}, {options.train} + {options.val} pictures")


if __name__ == "__main__":
    main()
