"""Converts any NAT, DiNAT or DiNAT_s checkpoint to another kind of checkpoint.

    python tools/convert_checkpoint.py maskrcnn_dinat_tiny.pth backbone.safetensors --to dense
    python tools/convert_checkpoint.py nat-tiny nat-tiny-hf --to hf --model-type nat
    python tools/convert_checkpoint.py upernet_dinat_tiny.pth upernet.pth --to mm

OUT ends in .safetensors, .pth, .pt or .bin; with `--to hf` it may be a folder, into which the config is written too.
"""

import argparse
from collections.abc import Sequence

from nat_dense.checkpoints import convert
from nat_dense.checkpoints.convert import KINDS
from nat_dense.checkpoints.options import add_reading_options
from nat_dense.mm.errors import one_line_errors
from nat_dense.models.variants import DILATIONS


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_reading_options(parser)
    parser.add_argument("target", metavar="OUT")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--to", required=True, choices=KINDS, help="kind of checkpoint to write")
    parser.add_argument(
        "--model-type", choices=["nat", "dinat"], help="with --to hf: the weights don't say which they are"
    )
    parser.add_argument("--dilations", choices=DILATIONS["DiNAT"], help="with --to hf, for a DiNAT written to a folder")
    parser.add_argument("--kernel-size", type=int, metavar="K", help="resize the position biases to this kernel")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors("convert_checkpoint.py"):
        print(convert(**vars(args)))


if __name__ == "__main__":
    main()
