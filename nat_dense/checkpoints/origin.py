"""What a checkpoint was trained as, if its file or folder says so: dilations are not among the weights."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from nat_dense.checkpoints.reading import DIRECTORY_FILES, Checkpoint
from nat_dense.models import NAT, DiNAT, DiNAT_s
from nat_dense.models.backbone import NeighborhoodBackbone
from nat_dense.models.fields import Dilations, resolve_dilations

FAMILIES: dict[str, type[NeighborhoodBackbone]] = {"NAT": NAT, "DiNAT": DiNAT, "DiNAT_s": DiNAT_s}

_TYPE = re.compile(r"\btype=['\"](?:\w+\.)*(NAT|DiNAT|DiNAT_s)['\"]")
_ROWS = r"[\[(]\s*(?:[\[(][\d\s,]*[\])][\s,]*)+[\])]"
_DILATIONS = re.compile(rf"\bdilations=(?:['\"]([\w-]+)['\"]|({_ROWS}))")
"""Dilations in the text of a config. Those of heads are single numbers or a flat list."""


@dataclass(frozen=True)
class Origin:
    """A backbone as described by the config stored with its weights.

    Attributes:
        family: "NAT", "DiNAT" or "DiNAT_s".
        dilations: As in `NeighborhoodBackbone`; None if undilated.
    """

    family: str
    dilations: Dilations

    def resolved(self, depths: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
        """A dilation for each block of a model of these depths; None if they can't be those of the weights."""
        try:
            return resolve_dilations(self.family, self.dilations, depths)
        except ValueError:
            return None


def origin_of(checkpoint: Checkpoint) -> Origin | None:
    """Reads the config that MMEngine stores in a checkpoint, or transformers next to it, as text; runs nothing.

    Returns:
        What it says, or None if there is no config or it doesn't have exactly one of our backbones.
    """
    meta = checkpoint.extras.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    if isinstance(text, str):
        return _of_mmengine(text)
    return _of_transformers(checkpoint) if checkpoint.path.name in DIRECTORY_FILES else None


def _of_mmengine(text: str) -> Origin | None:
    start = re.search(r"^model = ", text, re.MULTILINE)
    model = text[start.start() :] if start else ""
    types = list(_TYPE.finditer(model))
    if len({found[1] for found in types}) != 1:
        return None
    # MMEngine sorts fields by name: those of a backbone stand before its type.
    family, end = types[0][1], types[0].start()
    backbone = model[max(model.rfind("backbone=dict(", 0, end), 0) : end]
    given = _DILATIONS.search(backbone)
    if given is None:
        has_preset = re.search(r"\barch=['\"]", backbone) is not None
        return Origin(family, FAMILIES[family].default_dilations if has_preset else None)
    try:
        return Origin(family, given[1] or ast.literal_eval(given[2]))
    except SyntaxError:  # not written by MMEngine
        return None


def _of_transformers(checkpoint: Checkpoint) -> Origin | None:
    try:
        config = json.loads((checkpoint.path.parent / "config.json").read_text(encoding="utf-8"))
        family = {"nat": "NAT", "dinat": "DiNAT"}[config["model_type"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Origin(family, config.get("dilations") if family == "DiNAT" else None)
