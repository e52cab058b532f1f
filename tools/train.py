"""Trains a detector or a segmentor from a config.

python tools/train.py configs/mask_rcnn/mask-rcnn_nat-tiny_fpn_8xb2-amp-ms-crop-3x_coco.py
python tools/train.py mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py --cfg-options train_dataloader.batch_size=4
python tools/train.py mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py --backbone nat-tiny --optimizer adamw
"""

import argparse
from collections.abc import Sequence

from nat_dense.checkpoints.options import add_trust_option
from nat_dense.mm.errors import one_line_errors
from nat_dense.mm.first_batch import FirstBatchError, first_batch_errors
from nat_dense.mm.options import KeyValues, enable_amp, enable_auto_scale_lr, set_randomness, set_resume, set_work_dir
from nat_dense.mm.processes import leave_group
from nat_dense.mm.runner import build_runner
from nat_dense.mm.swap.command import add_swap_options, load_swapped


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, or mmdet::FOLDER/NAME.py, mmseg::FOLDER/NAME.py")
    add_swap_options(parser)
    parser.add_argument("--work-dir", help="where checkpoints and logs go (default: work_dirs/ and the config's name)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from this checkpoint, or without a value from the latest one in the work-dir",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision (needs an accelerator)")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    parser.add_argument(
        "--seed", type=int, help="random seed (default: the config's, else a random one, which is logged)"
    )
    parser.add_argument("--deterministic", action="store_true", help="deterministic kernels where available; slower")
    parser.add_argument(
        "--cfg-options", nargs="+", action=KeyValues, default={}, metavar="KEY=VALUE", help="changes to the config"
    )
    parser.add_argument(
        "--launcher", choices=["none", "pytorch", "slurm"], default="none", help="how the processes were started"
    )
    add_trust_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors("train.py"):
        cfg = load_swapped(args)
        cfg.launcher = args.launcher
        set_work_dir(cfg, args.work_dir)
        set_resume(cfg, args.resume)
        set_randomness(cfg, args.seed, args.deterministic)
        if args.amp:
            enable_amp(cfg)
        if args.auto_scale_lr:
            enable_auto_scale_lr(cfg)
        runner = build_runner(cfg, "train", trust=args.trust)
    with one_line_errors("train.py", FirstBatchError), first_batch_errors(runner, "trained"):
        runner.train()


if __name__ == "__main__":
    main()
    leave_group()
