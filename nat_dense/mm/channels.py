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
    """The channels of a built model's images."""
    mean = getattr(getattr(model, "data_preprocessor", None), "mean", None)
    backbone = getattr(model, "backbone", None)
    return mean.numel() if mean is not None else getattr(backbone, "in_chans", getattr(backbone, "in_channels", RGB))
