"""How many channels a model's images have, by its preprocessor's statistics or else its backbone."""

from collections.abc import Mapping
from typing import Any

from torch import nn

RGB = 3


def configured_channels(model: Mapping[str, Any]) -> int:
    """The channels of a model's images, by its config."""
    preprocessor, backbone = model.get("data_preprocessor") or {}, model.get("backbone") or {}
    mean = preprocessor.get("mean")
    return len(mean) if mean else backbone.get("in_chans", backbone.get("in_channels", RGB))


def image_channels(model: nn.Module) -> int:
    """The channels of a built model's images. (`in_channels` of the libraries' backbones may be a stage's.)"""
    mean = getattr(getattr(model, "data_preprocessor", None), "mean", None)
    return mean.numel() if mean is not None else getattr(getattr(model, "backbone", None), "in_chans", RGB)
