"""Replaces the backbone of a config's model with a NAT, DiNAT or DiNAT_s and writes the result as a config.

python tools/swap_backbone.py mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py --backbone nat-tiny -o mask-rcnn_nat-tiny.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nat_dense.mm.errors import one_line_errors
from nat_dense.mm.options import KeyValues
from nat_dense.mm.swap.command import add_swap_options, check_new_config, load_swapped, write_expanded, write_inheriting


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, or mmdet::FOLDER/NAME.py, mmseg::FOLDER/NAME.py")
    add_swap_options(parser)
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="FILE", help="the config to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--inherit", action="store_true", help="write only the differences, with the old config as _base_"
    )
    parser.add_argument(
        "--cfg-options", nargs="+", action=KeyValues, default={}, metavar="KEY=VALUE", help="more changes"
    )
    args = parser.parse_args(argv)
    if not args.backbone:
        parser.error("--backbone is missing: choose the backbone to put under the model")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors("swap_backbone.py"):
        check_new_config(args.out, args.overwrite)
        cfg = load_swapped(args)
        if args.inherit:
            write_inheriting(cfg, args.config, args.out)
        else:
            write_expanded(cfg, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
