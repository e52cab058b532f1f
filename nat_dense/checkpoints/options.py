"""The options by which command lines read checkpoints, the same ones everywhere."""

from __future__ import annotations

from argparse import ArgumentParser


def add_trust_option(parser: ArgumentParser) -> None:
    """`--trust`, without which nothing in a checkpoint is ever run."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run code that the checkpoint may bring along, if it can't be read without; only for your own files",
    )


def add_reading_options(parser: ArgumentParser) -> None:
    """The checkpoint to read and how, named like the arguments of `nat_dense.checkpoints.load`."""
    parser.add_argument(
        "source",
        metavar="IN",
        help="a file, a folder that transformers wrote, a URL, or the name of a published checkpoint (which is "
        "downloaded)",
    )
    parser.add_argument("--prefix", help="where IN's backbone is, if it has several, such as teacher.backbone")
    parser.add_argument("--entry", help="which entry of IN holds the weights, such as state_dict_ema")
    parser.add_argument("--sha256", help="IN's expected hash, or its first 8 digits or more")
    add_trust_option(parser)
