"""The part of a detector or a segmentor that goes into an ONNX file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from nat_dense.checkpoints import fetch, read
from nat_dense.checkpoints.layout import unwrap
from nat_dense.mm.build_errors import naming_parts
from nat_dense.mm.channels import configured_channels
from nat_dense.mm.checkpoints import check_fits
from nat_dense.mm.config import model_of
from nat_dense.mm.machine import replace_sync_norms
from nat_dense.version import __version__

PARTS = ("backbone", "neck", "logits")
"""Where a graph ends: after the backbone, after the neck, or (segmentors) with logits of the image's size."""


@dataclass(frozen=True)
class Graph:
    """The part of a model that goes into a file.

    Attributes:
        module: In eval mode; takes a normalised image [B, C, H, W].
        channels: Of the image.
        output_names: "logits", or "map_0", "map_1", ...; None where the module decides.
        metadata: What has to be known to use the file: the config, the image's normalisation, the classes.
        notices: Notes for the user.
    """

    module: nn.Module
    channels: int
    output_names: list[str] | None
    metadata: dict[str, str]
    notices: list[str]


class Maps(nn.Module):
    """The feature maps of a detector or a segmentor, after its neck where `with_neck`."""

    def __init__(self, model: Any, with_neck: bool):
        super().__init__()
        self.backbone: Any = model.backbone
        self.neck: Any = model.neck if with_neck else None

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """[B, C, H, W] -> one map per level."""
        maps = self.backbone(image)
        return tuple(maps if self.neck is None else self.neck(maps))


class Logits(nn.Module):
    """A segmentor that takes its images whole."""

    def __init__(self, model: Any):
        super().__init__()
        self.model: Any = model

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes, H, W]."""
        return self.model.encode_decode(image, [dict(img_shape=image.shape[2:])])


def graph_of(cfg: Config, checkpoint: str, part: str | None = None, *, trust: bool = False) -> Graph:
    """Builds a config's model with a checkpoint's weights and takes the part to export.

    Args:
        cfg: A config of a detector or a segmentor; its SyncBN is replaced by BN.
        checkpoint: A file or a URL with the weights of the whole model.
        part: One of `PARTS`; None for the most that can be exported: the logits of a segmentor, the neck of a detector.
        trust: Whether the checkpoint may run code.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The config has no model or no such part, or the checkpoint is of another model.
    """
    node = model_of(cfg)
    init_default_scope(cfg.get("default_scope", "mmengine"))
    replace_sync_norms(node)
    with naming_parts(node):
        model = MODELS.build(node)
    part = _check_part(model, part)
    source = read(fetch(checkpoint), trust=trust)
    notices = check_fits(model, source)
    weights, _ = unwrap(source.tensors)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.eval().requires_grad_(False)
    if part == "logits":
        module: nn.Module = Logits(model)
        if (node.get("test_cfg") or {}).get("mode") == "slide":
            notices.append(
                "The config slides a window over its images (test_cfg.mode='slide'); the file takes whole images."
            )
    else:
        module = Maps(model, with_neck=part == "neck")
    preprocessor = node.get("data_preprocessor") or {}
    metadata = _metadata(cfg, preprocessor, part, source.extras.get("meta") or {})
    return Graph(module.eval(), configured_channels(node), ["logits"] if part == "logits" else None, metadata, notices)


def _check_part(model: Any, part: str | None) -> str:
    has = {
        "backbone": getattr(model, "backbone", None) is not None,
        "neck": getattr(model, "neck", None) is not None,
        "logits": hasattr(model, "encode_decode"),
    }
    available = [name for name in PARTS if has[name]]
    if not available:
        raise ValueError(f"{type(model).__name__} has no backbone; expected a detector or a segmentor")
    if part is None:
        return available[-1]
    if part not in available:
        raise ValueError(
            f"part={part!r}: {type(model).__name__} has no such part to export, only {', '.join(available)}"
        )
    return part


def _metadata(cfg: Config, preprocessor: dict, part: str, checkpoint_meta: dict) -> dict[str, str]:
    """Text by name. MMEngine's loaders give BGR, which the preprocessor may turn around."""
    turned = preprocessor.get("bgr_to_rgb") or preprocessor.get("rgb_to_bgr")
    metadata = dict(
        nat_dense=__version__,
        config=Path(cfg.filename or "").name,
        part=part,
        channel_order="RGB" if turned else "BGR",
        mean=json.dumps(list(preprocessor.get("mean") or [])),
        std=json.dumps(list(preprocessor.get("std") or [])),
    )
    classes = (checkpoint_meta.get("dataset_meta") or {}).get("classes")
    return metadata | (dict(classes=json.dumps(list(classes))) if classes else {})
