"""Parameters and multiply-adds of a config's model, part by part, with attention counted exactly.

python tools/get_flops.py configs/mask_rcnn/mask-rcnn_nat-tiny_fpn_8xb2-amp-ms-crop-3x_coco.py --shape 800 1280
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nat_dense.files import atomic, check_folder, check_free
from nat_dense.mm.errors import one_line_errors
from nat_dense.mm.flops import count_config
from nat_dense.mm.options import KeyValues
from nat_dense.mm.swap.command import add_swap_options, load_swapped


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, or mmdet::FOLDER/NAME.py, mmseg::FOLDER/NAME.py")
    add_swap_options(parser)
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        required=True,
        metavar=("H", "W"),
        help="height and width in pixels of the backbone's input image (usually 800 1280 or 512 2048)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write exact numbers, by part and kind of operation")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--cfg-options", nargs="+", action=KeyValues, default={}, metavar="KEY=VALUE", help="changes to the config"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors("get_flops.py"):
        if args.json:
            check_folder(args.json)
            check_free(args.json, args.overwrite)
        cost = count_config(load_swapped(args), *args.shape)
        if args.json:
            with atomic(args.json) as part:
                text = json.dumps({"config": args.config, **cost.as_dict()}, indent=2)
                part.write_text(text + "\n", encoding="utf-8")
    Console().print(cost.as_table())


if __name__ == "__main__":
    main()
