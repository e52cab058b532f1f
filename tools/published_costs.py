"""Counts the 34 published detectors and segmentors and writes the table of docs/flops.md.

python tools/published_costs.py            prints the table
python tools/published_costs.py --write    writes it to docs/flops.md
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from nat_dense.mm.config import load_config
from nat_dense.mm.errors import one_line_errors
from nat_dense.mm.flops import Cost, count_config
from nat_dense.models.published import PUBLISHED, Published

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "flops.md"
BEGIN, END = "<!-- begin: tools/published_costs.py -->\n", "<!-- end -->\n"

COLUMNS = ("convolution", "matmul", "na2d", "na2d_bias", "norm", "resize")


def count_published() -> dict[Published, Cost]:
    """The cost of every published row, from its config and at its size."""
    return {row: count_config(load_config(str(ROOT / row.config)), *row.image_size) for row in PUBLISHED}


def markdown_table(costs: Mapping[Published, Cost]) -> str:
    """One line per row: parameters in 10^6, operations in 10^9."""
    header = ("method", "backbone", "H x W", "params", "published", *COLUMNS, "total", "published")
    lines = [_line(header), _line(["---"] * 3 + ["--:"] * (len(header) - 3))]
    for row, cost in costs.items():
        total = cost.total
        counts = dict(total.counts)
        # Pooling is a thousandth of a percent: it goes with the resizes of the same pyramid.
        counts["resize"] = counts.get("resize", 0) + counts.pop("pool", 0)
        size = "{} x {}".format(*row.image_size)
        figures = [f"{total.parameters / 1e6:.2f}", str(row.params_m)]
        figures += [f"{counts.get(kind, 0) / 1e9:.2f}" for kind in COLUMNS]
        figures += [f"{total.operations / 1e9:.2f}", str(row.gmacs)]
        lines.append(_line([row.method.replace("_", " "), row.name, size, *figures]))
    return "".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def with_table(document: str, table: str) -> str:
    """The document with this table between its two marks.

    Raises:
        ValueError: The document lacks a mark.
    """
    if BEGIN not in document or END not in document:
        raise ValueError(f"expected the lines {BEGIN.strip()!r} and {END.strip()!r} around the table")
    before, rest = document.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table to docs/flops.md instead of printing it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors("published_costs.py"):
        table = markdown_table(count_published())
        if args.write:
            DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8"), table), encoding="utf-8")
        else:
            print(table, end="")


if __name__ == "__main__":
    main()
