"""Writes README.md and metafile.yml beside the configs of the published models, and model-index.yml.

Run it after a change of nat_dense/models/published.py; a test compares the files with the table.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nat_dense.mm.model_cards import write_cards


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    write_cards(Path(__file__).resolve().parents[1])


if __name__ == "__main__":
    main()
