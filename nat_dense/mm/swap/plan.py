"""The swap itself: from a config and a backbone's name to a new config, its changes, and what to know about them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmengine.config import Config

from nat_dense.mm.errors import did_you_mean
from nat_dense.mm.fields import type_name
from nat_dense.mm.swap.changes import Change, changes_between
from nat_dense.mm.swap.maps import STRIDES, FeatureMap, choose_stages, measure
from nat_dense.mm.swap.refusals import SwapRefusedError, check_model, segments
from nat_dense.mm.swap.training import (
    adapt_decay,
    adapt_normalisation,
    adapt_weights,
    optimizer_hint,
    use_adamw,
)
from nat_dense.mm.swap.wiring import rewire
from nat_dense.models.variants import DILATIONS, VARIANTS, variant

BACKBONES = {f"{family.lower()}-{arch}": (family, arch) for family, rows in VARIANTS.items() for arch in rows}
"""The name of each backbone ("nat-tiny", "dinat_s-base", ...) and its row in `variants.VARIANTS`."""

LARGE_CROP = 640
"""Side in pixels of training crops from which on segmentors take the dilations published for 640 x 640."""


@dataclass(frozen=True)
class Swap:
    """The result of a swap.

    Attributes:
        cfg: The new config; shares nothing with the old one.
        changes: Every field that differs.
        notes: What the user should know beyond the fields.
    """

    cfg: Config
    changes: list[Change]
    notes: list[str]


def swap_backbone(cfg: Config, backbone: str, optimizer: Literal["adamw"] | None = None) -> Config:
    """Puts a NAT, DiNAT or DiNAT_s under the model of a config; see `plan_swap`, which also reports what changed."""
    return plan_swap(cfg, backbone, optimizer).cfg


def plan_swap(cfg: Config, backbone: str, optimizer: Literal["adamw"] | None = None) -> Swap:
    """Puts a NAT, DiNAT or DiNAT_s under the model of a config.

    Changed are the backbone, the fields of necks and heads that describe its maps, pretrained weights, normalisation
    and parameter-wise rules; heads, data and schedule stay. The old backbone is built without weights to see what it
    returns, so the library that has it must be installed.

    Args:
        cfg: A detector's or segmentor's config. Not changed.
        backbone: A key of `BACKBONES`, such as "nat-tiny".
        optimizer: "adamw" for the published optimizer settings of the task; None keeps the config's.

    Raises:
        SwapRefusedError: The model is of a kind whose backbone can't be exchanged.
        ValueError: There is no such backbone, or the old one can't be built here.
    """
    if backbone not in BACKBONES:
        hint = did_you_mean(backbone, BACKBONES)
        raise ValueError(f"no backbone {backbone!r}.{hint} There are: {', '.join(BACKBONES)}.")
    if optimizer not in (None, "adamw"):
        raise ValueError(f"optimizer {optimizer!r}: expected 'adamw', or None to keep the config's.")
    if not isinstance(cfg.get("model"), dict):
        raise SwapRefusedError("the config has no model.")
    check_model(cfg.model)
    new = _copy(cfg, backbone)
    notes = _swap_model(new, backbone)
    if new.get("optim_wrapper"):
        notes += adapt_decay(new.optim_wrapper, pretrained=bool(new.model.backbone.get("init_cfg")))
    if optimizer == "adamw":
        notes += use_adamw(new)
    else:
        notes += optimizer_hint(new, backbone)
    _import_nat_dense(new)
    return Swap(new, list(changes_between(cfg._cfg_dict, new._cfg_dict)), notes)


def _copy(cfg: Config, backbone: str) -> Config:
    """A copy with its own name, after which MMEngine's tools name the work-dir."""
    new = copy.deepcopy(cfg)
    if cfg.filename:
        file = Path(cfg.filename)
        new = Config(new._cfg_dict, cfg_text=cfg.text, filename=str(file.with_name(f"{file.stem}_{backbone}.py")))
    return new


def _swap_model(cfg: Config, backbone: str) -> list[str]:
    """Exchanges the backbone in place; returns notes for the user."""
    family, arch = BACKBONES[backbone]
    row = variant(family, arch)
    model, old = cfg.model, cfg.model.backbone
    maps = measure(old, cfg.get("default_scope"))
    stages = choose_stages(maps, segments(model))
    widths = [row.embed_dim * 2**stage for stage in stages]
    kept = rewire(model, [m.channels for m in maps], widths)
    new: dict[str, Any] = dict(type=family, arch=arch, drop_path_rate=row.drop_path_rate)
    new["out_indices"] = tuple(stages[i] for i in kept)
    if family in DILATIONS:
        new["dilations"] = _dilations(cfg)
    if old.get("with_cp"):
        new["with_cp"] = True
    notes = [*_stride_notes(maps, stages, kept), *_neck_notes(model), *adapt_weights(cfg, row, new, old)]
    if stages[kept[-1]] < len(STRIDES) - 1:
        cfg.find_unused_parameters = True
        notes.append(
            f"nothing reads the backbone after stage {stages[kept[-1]]}: the rest is not computed or trained, and "
            "find_unused_parameters is set for distributed training."
        )
    model["backbone"] = new
    if isinstance(model.get("data_preprocessor"), dict):
        adapt_normalisation(model["data_preprocessor"])
    return notes


def _dilations(cfg: Config) -> str:
    if not segments(cfg.model):
        return "detection"
    size = (cfg.model.get("data_preprocessor") or {}).get("size")
    return "segmentation-640" if size and min(size) >= LARGE_CROP else "segmentation"


def _stride_notes(maps: Sequence[FeatureMap], stages: Sequence[int], kept: Sequence[int]) -> list[str]:
    return [
        f"map {i} of the old backbone had stride {maps[i].stride}; stage {stages[i]}, with stride "
        f"{STRIDES[stages[i]]}, replaces it: what reads it gets "
        f"{'coarser' if STRIDES[stages[i]] > maps[i].stride else 'finer'} features."
        for i in kept
        if STRIDES[stages[i]] != maps[i].stride
    ]


def _neck_notes(model: dict) -> list[str]:
    shared = (model.get("roi_head") or {}).get("shared_head")
    if not shared or not model.get("neck"):
        return []
    return [
        f"roi_head.shared_head ({type_name(shared)}) stays, with its own weights, behind a 1x1 projection to its "
        "width (model.neck)."
    ]


def _import_nat_dense(cfg: Config) -> None:
    """Makes MMEngine import nat_dense wherever it reads the config."""
    found = dict(cfg.get("custom_imports") or dict(imports=[], allow_failed_imports=False))
    imports = [found["imports"]] if isinstance(found["imports"], str) else list(found["imports"])
    if "nat_dense" not in imports:
        cfg.custom_imports = dict(found, imports=[*imports, "nat_dense"])
