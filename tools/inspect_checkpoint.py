"""Tells what a checkpoint is: format, model, preset, dilations, and what a dense backbone would not take from it.

    python tools/inspect_checkpoint.py maskrcnn_dinat_tiny.pth

IN is a file, a folder that transformers wrote, a URL, or the name of a published checkpoint (which is downloaded).
"""

import argparse
from collections.abc import Sequence

from nat_dense.checkpoints import inspect
from nat_dense.mm.errors import one_line_errors


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN")
    parser.add_argument("--prefix", help="where the backbone is, if there are several, such as teacher.backbone")
    parser.add_argument("--entry", help="which entry of IN holds the weights, such as state_dict_ema")
    parser.add_argument("--sha256", help="IN's expected hash")
    parser.add_argument(
        "--trust", action="store_true", help="run code that IN may bring along; only for your own files"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors("inspect_checkpoint.py"):
        print(inspect(**vars(args)))


if __name__ == "__main__":
    main()
