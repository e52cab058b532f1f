"""Writes README.md and metafile.yml beside the configs of the published models, and model-index.yml.

Run it after a change of nat_dense/models/published.py; a test compares the files with the table.
"""

from pathlib import Path

from nat_dense.mm.model_cards import write_cards


def main() -> None:
    write_cards(Path(__file__).resolve().parents[1])


if __name__ == "__main__":
    main()
