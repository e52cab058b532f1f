"""Reports what a checkpoint is: format, model, preset, dilations, and what a dense backbone would not use of it.

python tools/inspect_checkpoint.py maskrcnn_dinat_tiny.pth
"""

import argparse
from collections.abc import Sequence

from nat_dense.checkpoints import inspect
from nat_dense.checkpoints.options import add_reading_options
from nat_dense.mm.errors import one_line_errors


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_reading_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors("inspect_checkpoint.py"):
        print(inspect(**vars(args)))


if __name__ == "__main__":
    main()
