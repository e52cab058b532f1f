"""The command-line options for reading checkpoints, the same in every tool."""

from __future__ import annotations

from argparse import ArgumentParser


def add_trust_option(parser: ArgumentParser) -> None:
    """Adds `--trust`, without which no code in a checkpoint is run."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run code in the checkpoint if it can't be read otherwise; only for your own files",
    )


def add_reading_options(parser: ArgumentParser) -> None:
    """Adds the checkpoint and how to read it, named like the arguments of `nat_dense.checkpoints.load`."""
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
