"""Trains a small NAT Mask R-CNN and a small DiNAT UPerNet on generated images and shows their predictions.

python tools/quickstart.py

writes checkpoints, logs, curves, pictures and report.html to work_dirs/quickstart. A second run reuses what is finished
and resumes what is not; results of other settings are renamed, not overwritten.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nat_dense.datasets.shapes import ShapesOptions
from nat_dense.mm.errors import one_line_errors


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = ShapesOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/quickstart"), help="output folder")
    parser.add_argument("--data", type=Path, default=Path("data/shapes"), help="where the images are, or are generated")
    parser.add_argument("--train", type=int, default=defaults.train, help="number of training images")
    parser.add_argument("--val", type=int, default=defaults.val, help="number of validation images")
    parser.add_argument("--size", type=int, default=defaults.size, help="side of an image in pixels")
    parser.add_argument("--seed", type=int, default=0, help="random seed for the weights and the order of the images")
    parser.add_argument("--budget", type=float, default=1.0, help="training length relative to the configs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    print("Loading PyTorch, MMDetection and MMSegmentation (about ten seconds)", flush=True)
    with one_line_errors("quickstart.py"):
        from nat_dense.quickstart import prepare, run

        if args.work_dir.exists() and not args.work_dir.is_dir():
            raise ValueError(f"--work-dir {args.work_dir}: this is a file; choose a directory")
        args.work_dir.mkdir(parents=True, exist_ok=True)  # where that fails, before anything is drawn
        options = ShapesOptions(args.train, args.val, args.size)
        configs = prepare(args.data, options, args.seed, args.budget)
    with one_line_errors("quickstart.py", BlockingIOError):  # another one is under way
        run(args.work_dir, configs, options)


if __name__ == "__main__":
    main()
