"""ResNet-50 against NAT-Tiny under three detectors and three segmentors, by the flags of tools/train.py alone.

python benchmarks/swap_comparison.py --iterations 1000 --size 96

The six configs are those of MMDetection and MMSegmentation with the generated shapes as data and a short schedule; each
is trained twice from random weights, with `--optimizer adamw` and with `--backbone nat-tiny --optimizer adamw`. What
is trained already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

from nat_dense.datasets.shapes import SEMANTIC_CLASSES, ShapesOptions, generate
from nat_dense.mm.config import load_config
from nat_dense.mm.swap.refusals import segments

REPOSITORY = Path(__file__).resolve().parents[1]
QUICKSTART = REPOSITORY / "configs" / "quickstart" / "_base_"
BACKBONE = "nat-tiny"

MODELS = {
    "RetinaNet": "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    "Faster R-CNN": "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "ATSS": "mmdet::atss/atss_r50_fpn_1x_coco.py",
    "Semantic FPN": "mmseg::sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024.py",
    "PSPNet": "mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py",
    "UPerNet": "mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py",
}
METRICS = ("coco/bbox_mAP", "mIoU")


def compose(name: str, data: Path, iterations: int) -> Config:
    """A shipped config with the shapes as data, a short schedule and random initial weights.

    Args:
        name: Of the shipped config.
        data: The folder of the generated shapes.
        iterations: Of the training; the first twentieth warms up.
    """
    cfg = load_config(name)
    task = "segmentation" if segments(cfg.model) else "detection"
    shapes = Config.fromfile(QUICKSTART / f"shapes_{task}.py", lazy_import=False)
    for key in ("train_dataloader", "val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator"):
        cfg[key] = shapes[key]
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        cfg[key].dataset.data_root = str(data)
    if task == "detection":
        boxes = dict(ann_file=str(data / "annotations/instances_validation.json"), metric=["bbox"])
        cfg.val_evaluator.update(boxes)
        cfg.test_evaluator.update(boxes)
        _set_classes(cfg.model, len(SEMANTIC_CLASSES) - 1)
        if "roi_head" in cfg.model:
            # 512 regions a picture are meant for 800x1333 pixels; here they would take longer than all the rest.
            cfg.model.train_cfg.rcnn.sampler.num = 128
            cfg.model.train_cfg.rpn_proposal.max_per_img = 500
            cfg.model.test_cfg.rpn.max_per_img = 250
    else:
        _set_classes(cfg.model, len(SEMANTIC_CLASSES))
        cfg.model.data_preprocessor.update(size=None, size_divisor=32, test_cfg=dict(size_divisor=32))
        cfg.model.test_cfg = dict(mode="whole")
        cfg.model.pretrained = None
    # Nothing is pretrained, so nothing is frozen.
    norm = dict(type="BN", requires_grad=True)
    cfg.model.backbone.update(init_cfg=None, frozen_stages=-1, norm_eval=False, norm_cfg=norm)
    warm_up = max(1, iterations // 20)
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations)
    cfg.param_scheduler = [
        dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warm_up),
        dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=warm_up, end=iterations),
    ]
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", by_epoch=False, interval=iterations)
    cfg.log_processor = dict(type="LogProcessor", by_epoch=False)
    return cfg


def _set_classes(node: object, count: int) -> None:
    """Sets every `num_classes` inside a part of a config."""
    if isinstance(node, dict):
        if "num_classes" in node:
            node["num_classes"] = count
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for part in node:
            _set_classes(part, count)


def train(config: Path, work_dir: Path, flags: list[str]) -> float:
    """Trains through tools/train.py unless that is done, and returns the metric of the last evaluation in percent.

    Raises:
        subprocess.CalledProcessError: The training failed.
        ValueError: It ended without an evaluation, or nothing was detected in it.
    """
    found = list(_metrics(work_dir))
    if not found:
        command = [sys.executable, str(REPOSITORY / "tools" / "train.py"), str(config), "--work-dir", str(work_dir)]
        subprocess.run([*command, "--seed", "0", *flags], check=True)
        found = list(_metrics(work_dir))
    if not found:
        raise ValueError(
            f"{work_dir} holds no {' or '.join(METRICS)}: the training was cut short, or so short that nothing is "
            "detected. Remove it to train again."
        )
    return found[-1]


def _metrics(work_dir: Path) -> Iterator[float]:
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in file.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            for metric in METRICS:
                if metric in values:
                    # MMDetection counts from 0 to 1, MMSegmentation in percent.
                    yield values[metric] * (100 if metric.startswith("coco") else 1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/shapes_comparison"), help="the shapes; made if absent")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/swap_comparison"))
    parser.add_argument("--iterations", type=int, default=1500, help="of 4 pictures each (default: 1500)")
    parser.add_argument("--pictures", type=int, default=1600, help="to train on (default: 1600)")
    parser.add_argument("--size", type=int, default=128, help="of the pictures in pixels (default: 128)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="only these")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    generate(args.data, ShapesOptions(train=args.pictures, val=max(1, args.pictures // 8), size=args.size))
    rows = ["| model | metric | ResNet-50 | NAT-Tiny |", "|---|---|---:|---:|"]
    for title in args.models:
        name = MODELS[title]
        cfg = compose(name, args.data.absolute(), args.iterations)
        work_dir = args.work_dir / Path(name).stem
        work_dir.mkdir(parents=True, exist_ok=True)
        config = work_dir / "shapes.py"
        cfg.dump(config)
        adamw = ["--optimizer", "adamw"]
        resnet = train(config, work_dir / "resnet-50", adamw)
        nat = train(config, work_dir / BACKBONE, ["--backbone", BACKBONE, *adamw])
        metric = "mIoU" if segments(cfg.model) else "box mAP"
        rows.append(f"| {title} | {metric} | {resnet:.1f} | {nat:.1f} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
