"""Evaluates a checkpoint of a detector (mAP) or a segmentor (mIoU).

python tools/test.py configs/upernet/nat-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py CHECKPOINT --tta
"""

import argparse
from collections.abc import Sequence

from nat_dense.checkpoints.options import add_trust_option
from nat_dense.mm.errors import one_line_errors
from nat_dense.mm.first_batch import FirstBatchError, first_batch_errors
from nat_dense.mm.options import KeyValues, set_out, set_show_dir, set_work_dir
from nat_dense.mm.processes import leave_group
from nat_dense.mm.runner import build_runner
from nat_dense.mm.swap.command import add_swap_options, load_swapped


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, or mmdet::FOLDER/NAME.py, mmseg::FOLDER/NAME.py")
    add_swap_options(parser)
    parser.add_argument("checkpoint", help="a file or a URL")
    parser.add_argument(
        "--work-dir", help="where the log and the metrics go (default: work_dirs/ and the config's name)"
    )
    parser.add_argument("--tta", action="store_true", help="test-time augmentation")
    parser.add_argument("--show-dir", metavar="DIR", help="draw predictions beside ground truth into this directory")
    parser.add_argument(
        "--out", metavar="PATH", help="write predictions: a .pkl for detectors, a directory of PNGs for segmentors"
    )
    parser.add_argument(
        "--cfg-options", nargs="+", action=KeyValues, default={}, metavar="KEY=VALUE", help="changes to the config"
    )
    parser.add_argument(
        "--launcher", choices=["none", "pytorch", "slurm"], default="none", help="how the processes were started"
    )
    add_trust_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    with one_line_errors("test.py"):
        cfg = load_swapped(args)
        cfg.launcher = args.launcher
        cfg.load_from = args.checkpoint
        set_work_dir(cfg, args.work_dir)
        if args.show_dir:
            set_show_dir(cfg, args.show_dir)
        if args.out:
            set_out(cfg, args.out)
        runner = build_runner(cfg, "test", tta=args.tta, trust=args.trust)
    with one_line_errors("test.py", FirstBatchError), first_batch_errors(runner, "tested"):
        return runner.test()


if __name__ == "__main__":
    main()
    leave_group()
