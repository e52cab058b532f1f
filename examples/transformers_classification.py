"""Trains or fine-tunes `NatForImageClassification` on a folder of images with transformers' Trainer; prints top-1.

    python -m nat_dense.datasets.shape_folders data/shape-classes
    python examples/transformers_classification.py data/shape-classes work_dirs/hf-classifier
    python examples/transformers_classification.py my-images work_dirs/mine --model shi-labs/nat-mini-in1k-224

The result starts a dense model as it is: `init_cfg=dict(type='Pretrained', checkpoint='work_dirs/hf-classifier')`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from nat_dense.hf import NatConfig, NatForImageClassification

try:
    from transformers import ViTImageProcessorPil as ViTImageProcessor
except ImportError:  # before 5.0
    from transformers import ViTImageProcessor


class ImageFolder(Dataset):
    """`root/<class>/*`, through an image processor; training pictures are mirrored at random."""

    def __init__(self, root: Path, processor, mirror: bool):
        self.classes = sorted(path.name for path in root.iterdir() if path.is_dir())
        self.files = [(path, i) for i, name in enumerate(self.classes) for path in sorted((root / name).iterdir())]
        self.processor = processor
        self.mirror = mirror

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        path, label = self.files[index]
        image = Image.open(path).convert("RGB")
        if self.mirror and torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return dict(pixel_values=self.processor(image, return_tensors="pt")["pixel_values"][0], labels=label)


def top1(prediction) -> dict[str, float]:
    """Share of pictures whose class is the first guess, in percent."""
    return {"top1": float(100 * (np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


def build_model(start: str | None, classes: list[str]):
    """A published model with a new head, or a NAT small enough for a CPU."""
    labels = dict(enumerate(classes))
    names = dict(id2label=labels, label2id={name: number for number, name in labels.items()})
    if start:
        return AutoModelForImageClassification.from_pretrained(start, ignore_mismatched_sizes=True, **names)
    shape = dict(embed_dim=32, depths=[2, 2, 4, 2], num_heads=[1, 2, 4, 8])
    # Layers this narrow start too weak with the 0.02 that suits the published widths.
    return NatForImageClassification(NatConfig(**shape, **names, drop_path_rate=0.0, initializer_range=0.1))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, evaluates, saves model and processor; returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/<class>/ and validation/<class>/")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--model", help="published name or folder to start from; a new small model when left out")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels, for a new model")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.model:
        processor = AutoImageProcessor.from_pretrained(options.model)
    else:
        processor = ViTImageProcessor(size=dict(height=options.size, width=options.size))
    train = ImageFolder(options.data / "train", processor, mirror=True)
    trainer = Trainer(
        build_model(options.model, train.classes),
        TrainingArguments(
            str(options.out),
            num_train_epochs=options.epochs,
            learning_rate=options.lr,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            per_device_train_batch_size=options.batch,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=train,
        eval_dataset=ImageFolder(options.data / "validation", processor, mirror=False),
        compute_metrics=top1,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    processor.save_pretrained(options.out)
    print({name: round(value, 3) for name, value in metrics.items()})
    return metrics


if __name__ == "__main__":
    main()
