"""transformers' UPerNet with a NAT backbone, trained by its Trainer and measured by mIoU.

python -m nat_dense.datasets.shapes data/shapes --train 800 --val 100 --size 96
python examples/transformers_segmentation.py data/shapes work_dirs/hf-upernet
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, UperNetConfig, UperNetForSemanticSegmentation

from nat_dense.datasets.shapes import SEMANTIC_CLASSES, VOID
from nat_dense.hf import NatConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IGNORED = 255


class Shapes(Dataset):
    """Pictures and label maps of one split; training pictures are mirrored at random."""

    def __init__(self, root: Path, split: str):
        self.images = sorted((root / "images" / split).glob("*.jpg"))
        self.labels = root / "annotations" / split
        self.mirror = split == "training"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        path = self.images[index]
        image = np.asarray(Image.open(path), np.float32) / 255
        labels = np.asarray(Image.open(self.labels / f"{path.stem}.png"), np.int64)
        labels = np.where(labels == VOID, IGNORED, labels - 1)
        if self.mirror and torch.rand(()) < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        pixels = torch.from_numpy((image - MEAN) / STD).permute(2, 0, 1).float()
        return dict(pixel_values=pixels, labels=torch.from_numpy(labels.copy()))


def build_model() -> UperNetForSemanticSegmentation:
    """A NAT small enough for a CPU. A released one: `NatBackbone.from_pretrained` into `model.backbone`."""
    backbone = NatConfig(
        embed_dim=32,
        depths=[2, 2, 4, 2],
        num_heads=[1, 2, 4, 8],
        drop_path_rate=0.0,
        initializer_range=0.1,  # layers this narrow start too weak with the 0.02 that suits the published widths
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    labels = dict(enumerate(SEMANTIC_CLASSES))
    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=32,
        auxiliary_in_channels=128,
        auxiliary_channels=32,
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )
    return UperNetForSemanticSegmentation(config)


def mean_iou(prediction) -> dict[str, float]:
    """Intersection over union of predicted and true pixels, by class and on average, in percent."""
    predicted, labels = (np.asarray(values).ravel() for values in (prediction.predictions, prediction.label_ids))
    count = len(SEMANTIC_CLASSES)
    valid = labels != IGNORED
    pairs = np.bincount(labels[valid] * count + predicted[valid], minlength=count**2).reshape(count, count)
    both = np.diag(pairs)
    iou = 100 * both / (pairs.sum(0) + pairs.sum(1) - both)
    return {"mIoU": float(iou.mean()), **{name: float(x) for name, x in zip(SEMANTIC_CLASSES, iou, strict=True)}}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, evaluates, saves; returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that nat_dense.datasets.shapes made")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    trainer = Trainer(
        build_model(),
        TrainingArguments(
            str(options.out),
            num_train_epochs=options.epochs,
            learning_rate=options.lr,
            weight_decay=0.01,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            warmup_steps=20,
            per_device_train_batch_size=options.batch,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Shapes(options.data, "training"),
        eval_dataset=Shapes(options.data, "validation"),
        compute_metrics=mean_iou,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=1),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    print({name: round(value, 2) for name, value in metrics.items()})
    return metrics


if __name__ == "__main__":
    main()
