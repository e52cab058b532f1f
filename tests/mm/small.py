"""Small data in COCO and ADE20K form, the options that point a full config to it, and the tools as functions."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from mmengine.config import Config, DictAction
from PIL import Image

from nat_dense.mm.data_checks import check_data

REPOSITORY = Path(__file__).resolve().parents[2]
DETECTOR = str(REPOSITORY / "configs/mask_rcnn/mask-rcnn_nat-tiny_fpn_8xb2-amp-ms-crop-3x_coco.py")
SEGMENTOR = str(REPOSITORY / "configs/upernet/nat-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py")

SIZE = (96, 64)
"""Width and height of the pictures."""

TRAIN = ("train_dataloader", "val_dataloader")

NANO = ["model.backbone.arch=nano", "model.backbone.init_cfg=None"]


def load_tool(name: str) -> ModuleType:
    """The module `tools/NAME.py`."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scalars(work_dir: Path) -> list[dict]:
    """What a run logged, oldest first; of several processes one logs."""
    (file,) = work_dir.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


def parse_options(options: list[str]) -> dict:
    """What `--cfg-options` makes of KEY=VALUE strings."""
    return {key: DictAction._parse_iterable(value) for key, value in (option.split("=", 1) for option in options)}


def picture(seed: int) -> Image.Image:
    """A bright box on noise; the box lies at (16, 8) and is 48 x 32 pixels large."""
    pixels = np.random.default_rng(seed).integers(0, 100, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    pixels[8:40, 16:64] += 120
    return Image.fromarray(pixels)


def write_coco(root: Path, train: int = 4, val: int = 2, classes: tuple[str, ...] | None = None) -> Path:
    """Writes a COCO data set with one box an image; the classes are COCO's own unless given."""
    if classes is None:
        from mmdet.datasets import CocoDataset

        classes = CocoDataset.METAINFO["classes"]
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", train), ("val2017", val)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            picture(i).save(root / split / f"{i}.jpg")
            images.append(dict(id=i, file_name=f"{i}.jpg", width=SIZE[0], height=SIZE[1]))
            outline = [16, 8, 64, 8, 64, 40, 16, 40]
            box = dict(id=i + 1, image_id=i, category_id=1 + i % 2, bbox=[16, 8, 48, 32], area=48 * 32, iscrowd=0)
            annotations.append(box | dict(segmentation=[outline]))
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def write_ade(root: Path, train: int = 4, val: int = 2) -> Path:
    """Writes a data set of ADE20K's form: void, a box of class 1 and one of class 2."""
    for split, count in (("training", train), ("validation", val)):
        images, labels = root / "images" / split, root / "annotations" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(count):
            picture(i).save(images / f"{i}.jpg")
            label = np.ones((SIZE[1], SIZE[0]), np.uint8)
            label[8:40, 16:64] = 2
            label[:4] = 0
            Image.fromarray(label).save(labels / f"{i}.png")
    return root


def coco_options(root: Path) -> list[str]:
    """A NAT-Nano Mask R-CNN on small pictures for one epoch of `write_coco`'s data."""
    annotations = root / "annotations" / "instances_val2017.json"
    pipeline = "train_dataloader.dataset.pipeline"
    scales = [f"{pipeline}.3.transforms.{path}.scales=[(64,96)]" for path in ("0.0", "1.0", "1.2")]
    return [
        *(f"{loader}.dataset.data_root={root}" for loader in ("train_dataloader", "val_dataloader", "test_dataloader")),
        *(f"{loader}.num_workers=0" for loader in ("train_dataloader", "val_dataloader", "test_dataloader")),
        *(f"{loader}.dataset.pipeline.1.scale=(96,64)" for loader in ("val_dataloader", "test_dataloader")),
        *(f"{evaluator}.ann_file={annotations}" for evaluator in ("val_evaluator", "test_evaluator")),
        *NANO,
        *scales,
        f"{pipeline}.3.transforms.1.1.crop_size=(48,64)",
        "model.neck.in_channels=[32,64,128,256]",
        "model.test_cfg.rcnn.score_thr=0.0",
        "train_cfg.max_epochs=1",
        "default_hooks.logger.interval=1",
    ]


def ade_options(root: Path, iterations: int = 2) -> list[str]:
    """A NAT-Nano UPerNet on small pictures for a few iterations of `write_ade`'s data."""
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    return [
        *(f"{loader}.dataset.data_root={root}" for loader in loaders),
        *(f"{loader}.num_workers=0" for loader in loaders),
        *(f"{loader}.dataset.pipeline.1.scale=(96,64)" for loader in loaders[1:]),
        *NANO,
        "train_dataloader.dataset.pipeline.2.scale=(96,64)",
        "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
        "model.data_preprocessor.size=(64,64)",
        "model.decode_head.in_channels=[32,64,128,256]",
        "model.decode_head.channels=32",
        "model.auxiliary_head.in_channels=128",
        "model.auxiliary_head.channels=32",
        f"train_cfg.max_iters={iterations}",
        f"train_cfg.val_interval={iterations}",
        f"default_hooks.checkpoint.interval={iterations}",
        "default_hooks.logger.interval=1",
    ]


def shrink(cfg: Config, root: Path) -> None:
    """Points a config, whatever its pipelines are, to `write_coco`'s or `write_ade`'s data at a small size."""
    for loader, split in ((cfg.train_dataloader, 0), (cfg.val_dataloader, 1)):
        dataset = loader.dataset
        dataset.data_root = str(root)
        if cfg.default_scope == "mmdet":
            name = ("train2017", "val2017")[split]
            dataset.update(ann_file=f"annotations/instances_{name}.json", data_prefix=dict(img=f"{name}/"))
        else:
            name = ("training", "validation")[split]
            dataset.update(data_prefix=dict(img_path=f"images/{name}", seg_map_path=f"annotations/{name}"))
            dataset.update(img_suffix=".jpg", seg_map_suffix=".png")
        _shrink_sizes(dataset.pipeline)
    if cfg.model.data_preprocessor.get("size"):
        cfg.model.data_preprocessor.size = (64, 64)


def _shrink_sizes(node: Any) -> None:
    if isinstance(node, dict):
        for key, size in (("scale", SIZE), ("scales", [SIZE]), ("crop_size", (64, 64))):
            if key in node:
                node[key] = size
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        _shrink_sizes(child)


def edit_annotations(root: Path, change: Callable[[dict], Any]) -> None:
    """Changes the training annotations of `write_coco`'s data."""
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def message(error: type[Exception], cfg: Config, loaders: tuple[str, ...] = TRAIN) -> str:
    """What `check_data` says of data that it refuses."""
    with pytest.raises(error) as raised:
        check_data(cfg, loaders)
    return str(raised.value)
