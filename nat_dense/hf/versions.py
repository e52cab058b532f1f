"""Everything that differs between transformers 4.57 and 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from transformers import AutoImageProcessor, PretrainedConfig
from transformers.utils import is_torchvision_available

try:
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
except ImportError:  # before 5.0
    from transformers.utils.backbone_utils import BackboneConfigMixin, BackboneMixin

__all__ = [
    "BackboneConfigMixin",
    "BackboneMixin",
    "hide_new_natten",
    "init_backbone",
    "register_image_processor",
    "set_outputs",
]


def set_outputs(config: Any, out_features: list[str] | None, out_indices: Sequence[int] | None) -> None:
    """Sets the output stages of a configuration that already has `stage_names`.

    Raises:
        ValueError: One of them has unknown stages or is not in order, or the two disagree.
    """
    if hasattr(config, "set_output_features_output_indices"):
        config.set_output_features_output_indices(out_features, out_indices)
        return
    from transformers.utils.backbone_utils import (  # type: ignore[attr-defined]
        get_aligned_output_features_output_indices as aligned,
    )

    config._out_features, config._out_indices = aligned(out_features, out_indices, config.stage_names)


def init_backbone(backbone: Any, config: PretrainedConfig) -> None:
    """Does what `BackboneMixin` does in its constructor from 5.0 on; before, it had to be called explicitly."""
    if hasattr(backbone, "_init_backbone"):
        backbone._init_backbone(config)


def register_image_processor(config_class: type[PretrainedConfig]) -> None:
    """Gives a configuration ViT's image processor, for files that specify none; 5.0 no longer does this for NAT."""
    if not hasattr(transformers, "ViTImageProcessorPil"):
        return
    classes: dict[str, type] = {"pil": transformers.ViTImageProcessorPil}
    if is_torchvision_available():
        classes["torchvision"] = transformers.ViTImageProcessor
    AutoImageProcessor.register(config_class, image_processor_classes=classes, exist_ok=True)


def hide_new_natten() -> None:
    """Lets transformers import its own DiNAT, which pipelines do by name, even if NATTEN is too new for it.

    If any NATTEN is installed, the module imports two functions that NATTEN dropped in 0.17.5.
    """
    if not transformers.utils.is_natten_available():
        return
    try:
        from natten.functional import natten2dav, natten2dqkrpb  # noqa: F401
    except ImportError:
        transformers.utils.is_natten_available = lambda: False
