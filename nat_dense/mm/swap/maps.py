"""The maps that a backbone returns: measured on the old one, chosen from the new one."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nat_dense.mm.channels import RGB
from nat_dense.mm.fields import type_name
from nat_dense.mm.machine import replace_sync_norms
from nat_dense.mm.meta import build_on_meta
from nat_dense.mm.swap.refusals import SwapRefusedError

STRIDES = (4, 8, 16, 32)
"""Of the stages of NAT, DiNAT and DiNAT_s, in pixels."""

SIDE = 128
"""Of the measured picture in pixels: a power of two, so that every stride divides it, and large enough for 3x3 windows
at stride 32, which deformable convolutions demand. Some vision transformers take no other size than their `img_size`.
"""

COMPUTED_WEIGHTS = 80_000_000
"""Backbones with fewer weights compute a small picture faster than meta tensors give its shapes."""


@dataclass(frozen=True)
class FeatureMap:
    """One output of a backbone: its channels, and how many pixels of the image one step in it is."""

    channels: int
    stride: int


def measure(backbone: dict, scope: str | None) -> list[FeatureMap]:
    """Measures what a backbone returns, by sending a small black picture, or only its shape, through it.

    Args:
        backbone: The config of any backbone that the scope's registry knows. Not changed.
        scope: The library, "mmdet" or "mmseg".

    Raises:
        ValueError: It can't be built or run here.
        SwapRefusedError: It returns something other than maps [B, C, H, W].
    """
    name = type_name(backbone)
    try:
        size = _image_size(backbone)
        # MMCV's own synchronised norm can't be built before the processes know each other.
        alone = copy.deepcopy(backbone)
        replace_sync_norms(alone)
        outputs = _run(build_on_meta(alone, scope), size)
    except Exception as error:
        raise ValueError(f"the original backbone {name} doesn't build or run here: {error}") from error
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    if not outputs or not all(isinstance(m, Tensor) and m.dim() == 4 for m in outputs):
        raise SwapRefusedError(f"{name} returns something other than feature maps, on which its heads depend.")
    return [FeatureMap(m.shape[1], size[0] // m.shape[2]) for m in outputs]


def _image_size(backbone: dict) -> tuple[int, int]:
    size = backbone.get("img_size") or SIDE
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def _run(module: nn.Module, size: tuple[int, int]) -> Any:
    module.eval()
    with torch.no_grad():
        if max(size) > SIDE or sum(p.numel() for p in module.parameters()) > COMPUTED_WEIGHTS:
            try:
                return module(torch.zeros(1, RGB, *size, device="meta"))
            except (RuntimeError, NotImplementedError, TypeError):
                # MMCV's own operators (deformable convolutions) don't support meta tensors.
                pass
        module = module.to_empty(device="cpu")
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
        # Maps this small cost more to share between threads than to compute.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return module(torch.zeros(1, RGB, *size))
        finally:
            torch.set_num_threads(threads)


def choose_stages(maps: Sequence[FeatureMap], segments: bool) -> list[int]:
    """Which stage of the new backbone takes the place of each map of the old one.

    Detectors tie boxes to strides (anchors, points, RoI levels): they get the stage of the same stride. Segmentation
    heads resize what they get: the deepest map is replaced by the deepest stage, and those before it by stages in
    order, of the same stride where that is free.

    Args:
        maps: Of the old backbone, in order.
        segments: Whether the model is a segmentor.

    Returns:
        One stage (0 .. 3) per map, ascending.

    Raises:
        SwapRefusedError: There is no stage for a map.
    """
    strides = [m.stride for m in maps]
    if not segments:
        if strides != sorted(set(strides)) or not set(strides) <= set(STRIDES):
            raise SwapRefusedError(
                f"the heads expect maps of strides {strides}; the new backbone gives one map each of {list(STRIDES)}."
            )
        return [STRIDES.index(stride) for stride in strides]
    if len(maps) > len(STRIDES):
        raise SwapRefusedError(f"the old backbone returns {len(maps)} maps; the new one has {len(STRIDES)} stages.")
    stages: list[int] = []
    for i, stride in enumerate(strides):
        by_stride = round(math.log2(stride / STRIDES[0])) if stride else 0
        lowest = stages[-1] + 1 if stages else 0
        stages.append(min(max(by_stride, lowest), len(STRIDES) - len(maps) + i))
    stages[-1] = len(STRIDES) - 1
    return stages
