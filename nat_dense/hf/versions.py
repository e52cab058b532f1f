"""What differs between transformers 4.57 and 5, in one place."""

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
    """Sets the output stages of a configuration that has its `stage_names`.

    Raises:
        ValueError: They name no stages, not in order, or not the same.
    """
    if hasattr(config, "set_output_features_output_indices"):
        config.set_output_features_output_indices(out_features, out_indices)
        return
    from transformers.utils.backbone_utils import (  # type: ignore[attr-defined]
        get_aligned_output_features_output_indices as aligned,
    )

    config._out_features, config._out_indices = aligned(out_features, out_indices, config.stage_names)


def init_backbone(backbone: Any, config: PretrainedConfig) -> None:
    """What `BackboneMixin` does in its constructor from 5.0 on, and had to be called for before."""
    if hasattr(backbone, "_init_backbone"):
        backbone._init_backbone(config)


def register_image_processor(config_class: type[PretrainedConfig]) -> None:
    """Gives a configuration the processor of ViT, which 5.0 no longer does for NAT: for files that don't name one."""
    if not hasattr(transformers, "ViTImageProcessorPil"):
        return
    classes: dict[str, type] = {"pil": transformers.ViTImageProcessorPil}
    if is_torchvision_available():
        classes["torchvision"] = transformers.ViTImageProcessor
    AutoImageProcessor.register(config_class, image_processor_classes=classes, exist_ok=True)


def hide_new_natten() -> None:
    """Lets transformers import its own DiNAT, which pipelines do by name, beside a NATTEN that is too new for it.

    Its module imports two functions that NATTEN dropped in 0.17.5, wherever any NATTEN is installed.
    """
    if not transformers.utils.is_natten_available():
        return
    try:
        from natten.functional import natten2dav, natten2dqkrpb  # noqa: F401
    except ImportError:
        transformers.utils.is_natten_available = lambda: False
