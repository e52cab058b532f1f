"""What can't be swapped, and why: one table each for models, backbones, necks and heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nat_dense.mm.channels import RGB, configured_channels
from nat_dense.mm.fields import as_list, type_name


class SwapRefusedError(ValueError):
    """The backbone of this config can't be exchanged; the message says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the backbone can't be exchanged: {reason}")


_TRACKER = "it wraps a trained detector in a tracker; swap the backbone of the detector's own config"
_BRANCHES = "its branches of several resolutions are fused inside it, and its heads read the branches"
_ENCODER_DECODER = "it is encoder and decoder in one, with skip connections between its own stages"

MODELS_REFUSED: Mapping[str, str] = {
    "ByteTrack": _TRACKER,
    "DeepSORT": _TRACKER,
    "MaskTrackRCNN": _TRACKER,
    "OCSORT": _TRACKER,
    "QDTrack": _TRACKER,
    "StrongSORT": _TRACKER,
    "Mask2FormerVideo": "it tracks through videos; swap the backbone of the Mask2Former config that it starts from",
    "SoftTeacher": "it trains a teacher and a student together; swap the backbone of the detector's own config",
    "Detectron2Wrapper": "its detector is Detectron2's, which does not know this registry",
    "BaseReID": "it embeds one person, it is no detector or segmentor",
    "TridentFasterRCNN": "its heads follow the three branches of its own backbone",
    "MultimodalEncoderDecoder": "it reads several layers of CLIP's image encoder",
    "DepthEstimator": "its backbone is a diffusion model",
}

BACKBONES_REFUSED: Mapping[str, str] = {
    "BiSeNetV1": _BRANCHES,
    "BiSeNetV2": _BRANCHES,
    "DDRNet": _BRANCHES,
    "FastSCNN": _BRANCHES,
    "ICNet": _BRANCHES,
    "PIDNet": _BRANCHES,
    "STDCContextPathNet": _BRANCHES,
    "ERFNet": _ENCODER_DECODER,
    "UNet": _ENCODER_DECODER,
    "HourglassNet": "it returns the same resolution several times, refined in turn, and its heads expect that",
    "SSDVGG": "SSD's extra layers continue its stages, with their widths and paddings",
    "TridentResNet": "its three branches reach into the heads",
}

NECKS_REFUSED: Mapping[str, str] = {
    "RFP": "its recursive pyramid feeds back into a backbone of its own kind",
    "SSDNeck": "its extra layers continue the backbone's stages, with their widths and paddings",
    "MLANeck": "it adds maps of one resolution, and this backbone's differ",
    "ICNeck": "it cascades the branches of ICNet",
    "GlobalAveragePooling": "it pools for classification",
}

HEADS_REFUSED: Mapping[str, str] = {
    "LRASPPHead": "it pools windows of 49 x 49, which a map of stride 32 is too small for",
    "DPTHead": "it reassembles the token sequences of a plain vision transformer",
}


def check_model(model: Mapping[str, Any]) -> None:
    """Refuses a model that is in one of the tables, or that doesn't take one picture of three channels.

    Raises:
        SwapRefusedError: With the reason.
    """
    if type_name(model) in MODELS_REFUSED:
        raise SwapRefusedError(f"{type_name(model)}: {MODELS_REFUSED[type_name(model)]}.")
    if not isinstance(model.get("backbone"), dict):
        raise SwapRefusedError(f"{type_name(model)} has no model.backbone; its parts are: {', '.join(model)}.")
    for node, reasons in _parts(model):
        if type_name(node) in reasons:
            raise SwapRefusedError(f"{type_name(node)}: {reasons[type_name(node)]}.")
    channels = configured_channels(dict(backbone=model["backbone"]))
    if channels != RGB:
        raise SwapRefusedError(f"model.backbone takes {channels} channels; expected pictures of {RGB}.")


def segments(model: Mapping[str, Any]) -> bool:
    """Whether a model is one of MMSegmentation's; otherwise it detects."""
    return "decode_head" in model


def _parts(model: Mapping[str, Any]) -> Iterator[tuple[dict, Mapping[str, str]]]:
    yield model["backbone"], BACKBONES_REFUSED
    for neck in as_list(model.get("neck")):
        yield neck, NECKS_REFUSED
    for name in model:
        if name.endswith("head"):
            for head in as_list(model[name]):
                yield head, HEADS_REFUSED
