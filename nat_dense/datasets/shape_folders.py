"""Ten classes of shapes for classification, generated: one folder per class, as in image-folder data sets.

    python -m nat_dense.datasets.shape_folders OUT --train 200 --val 40 --size 64 --seed 0

writes OUT/{train,validation}/<class>/*.png, that many pictures per class, of one thing each. Textures, light and noise
are those of the shapes set. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from nat_dense.datasets.scene import CLASSES, CLUTTER, draw_single

NAMES = (*CLASSES, *CLUTTER[:4])


def generate(out: str | Path, train: int = 200, val: int = 40, size: int = 64, seed: int = 0) -> None:
    """Writes the set.

    Args:
        out: A folder that doesn't exist yet.
        train, val: Pictures per class.
        size: Side of a picture in pixels.

    Raises:
        FileExistsError: `out` exists.
        ValueError: A number is too small.
    """
    if train < 1 or val < 1 or size < 16:
        raise ValueError(f"train={train}, val={val}, size={size}: expected at least 1, 1 and 16")
    Path(out).mkdir(parents=True)
    for split, (name, count) in enumerate((("train", train), ("validation", val))):
        for number, outline in enumerate(NAMES):
            folder = Path(out) / name / outline.replace(" ", "_")
            folder.mkdir(parents=True)
            for index in range(count):
                rng = np.random.default_rng([seed, split, number, index])
                path = folder / f"{index:05d}.png"
                if not cv2.imwrite(str(path), draw_single(rng, size, outline)):
                    raise OSError(f"{path}: OpenCV could not write the picture")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    for name, default, what in (
        ("train", 200, "training pictures per class"),
        ("val", 40, "validation pictures per class"),
        ("size", 64, "side of a picture in pixels"),
        ("seed", 0, "the same seed gives the same bytes"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    options = parser.parse_args(arguments)
    generate(options.out, options.train, options.val, options.size, options.seed)
    print(f"{options.out}: {len(NAMES)} classes, {options.train} + {options.val} pictures each")


if __name__ == "__main__":
    main()
