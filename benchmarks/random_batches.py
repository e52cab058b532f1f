"""Random pictures with random labels, in the form that detectors and segmentors train on."""

from __future__ import annotations

import numpy as np
import torch
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

SIDE = 64
"""Of the pictures in pixels."""

BOXES = 3
"""Objects a picture."""


def random_detection_batch(seed: int, masks: bool, size: int = 2) -> dict:
    """Pictures with boxes, a semantic map, proposals and, if wanted, masks; all objects are of class 0."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    generator = torch.Generator().manual_seed(seed)
    inputs, samples = [], []
    for i in range(size):
        corners = torch.randint(0, SIDE // 2, (BOXES, 2), generator=generator)
        extents = torch.randint(SIDE // 4, SIDE // 2, (BOXES, 2), generator=generator)
        boxes = torch.cat([corners, corners + extents], dim=1)
        pixels = np.zeros((BOXES, SIDE, SIDE), dtype=np.uint8)
        for mask, (left, top, right, bottom) in zip(pixels, boxes.tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        sample = DetDataSample(metainfo=dict(_metainfo(), img_id=i, scale_factor=(1.0, 1.0), flip=False))
        labels = torch.zeros(BOXES, dtype=torch.long)
        sample.gt_instances = InstanceData(bboxes=boxes.float(), labels=labels)
        if masks:
            sample.gt_instances.masks = BitmapMasks(pixels, SIDE, SIDE)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        sample.proposals = InstanceData(bboxes=boxes.float(), scores=torch.ones(BOXES))
        sample.gt_sem_seg = PixelData(sem_seg=torch.from_numpy(1 - pixels.max(axis=0, keepdims=True)).long())
        inputs.append(_picture(generator))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def random_segmentation_batch(seed: int, classes: int, size: int = 2) -> dict:
    """Pictures with a label map of `classes` classes."""
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(seed)
    inputs, samples = [], []
    for _ in range(size):
        labels = torch.randint(0, classes, (1, SIDE, SIDE), generator=generator)
        samples.append(SegDataSample(metainfo=_metainfo(), gt_sem_seg=PixelData(data=labels)))
        inputs.append(_picture(generator))
    return dict(inputs=inputs, data_samples=samples)


def _metainfo() -> dict:
    return dict(img_path="random.jpg", img_shape=(SIDE, SIDE), ori_shape=(SIDE, SIDE), pad_shape=(SIDE, SIDE))


def _picture(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
