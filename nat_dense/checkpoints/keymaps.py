"""Maps tensor names between the original files and transformers, as pure functions of dicts.

The original's names are ours. They cover classification (`norm`, `head`) and dense models (`norm0` ... `norm3`), so
one function maps both. transformers has NAT and DiNAT, not DiNAT_s; it splits what the original fuses (query, key
and value) and stacks what the original splits (the two layer scales). Nothing is dropped here: a name that is in no
table comes out unchanged, and the loader decides what to do with it.

Source: transformers 4.25 - 4.57 (models nat and dinat) and SHI-Labs/Neighborhood-Attention-Transformer at d334f5b.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

ModelType = Literal["nat", "dinat"]
STEM_NORM = "norm_stem"
"""The norm of transformers' "stem" feature map, which the original lacks."""

_MODEL_NAMES = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("patch_embed.norm.", "embeddings.norm."),
    ("norm_stem.", "hidden_states_norms.stem."),
    ("norm.", "layernorm."),
    ("head.", "classifier."),
)
_BLOCK_NAMES = (
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.rpb", "attention.self.rpb"),
    ("attn.proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)
_HF_BLOCK = re.compile(r"encoder\.levels\.(\d+)\.layers\.(\d+)\.(.+)")
_HF_LEVEL = re.compile(r"encoder\.levels\.(\d+)\.(downsample\..+)")
_HF_STAGE_NORM = re.compile(r"hidden_states_norms\.stage([1-9]\d*)\.(.+)")
_HF_PART = re.compile(r"attention\.self\.(query|key|value)\.(weight|bias)")
_BLOCK = re.compile(r"levels\.(\d+)\.blocks\.(\d+)\.(.+)")
_LEVEL = re.compile(r"levels\.(\d+)\.(downsample\..+)")
_OUTPUT_NORM = re.compile(r"norm(\d+)\.(.+)")


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a transformers Nat or Dinat model, backbone or classifier under the original's names.

    Query, key and value become one new tensor; everything else is the same tensor or a view of it.

    Args:
        state: By transformers' names, with or without the leading "nat." or "dinat.".
    """
    result: dict[str, Tensor] = {}
    state = {re.sub(r"^(nat|dinat)\.", "", name): value for name, value in state.items()}
    for name, value in state.items():
        block = _HF_BLOCK.fullmatch(name)
        if not block:
            result[_model_name_from_hf(name)] = value
            continue
        level, index, rest = block.groups()
        prefix = f"levels.{level}.blocks.{index}."
        part = _HF_PART.fullmatch(rest)
        if part:
            kind = part[2]
            names = [f"{name.removesuffix(rest)}attention.self.{p}.{kind}" for p in ("query", "key", "value")]
            if not all(n in state for n in names):
                result[name] = value
            elif part[1] == "query":
                result[f"{prefix}attn.qkv.{kind}"] = torch.cat([state[n] for n in names])
        elif rest == "layer_scale_parameters" and value.dim() == 2 and value.shape[0] == 2:
            result[f"{prefix}gamma1"], result[f"{prefix}gamma2"] = value.unbind()
        else:
            ours = _renamed(rest, _BLOCK_NAMES, from_hf=True)
            result[name if ours is None else prefix + ours] = value
    return result


def to_hf(state: Mapping[str, Tensor], model_type: ModelType | None = None) -> dict[str, Tensor]:
    """The tensors of a NAT or DiNAT under transformers' names; the inverse of `from_hf`.

    Args:
        state: By the original's names: a dense backbone's, or a classifier's.
        model_type: The name prefix of a `*ForImageClassification`; None for `*Model` and `*Backbone`.
    """
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        block = _BLOCK.fullmatch(name)
        if not block:
            result[_model_name_to_hf(name)] = value
            continue
        level, index, rest = block.groups()
        prefix = f"encoder.levels.{level}.layers.{index}."
        if rest in ("attn.qkv.weight", "attn.qkv.bias"):
            for part, values in zip(("query", "key", "value"), value.chunk(3), strict=True):
                result[f"{prefix}attention.self.{part}.{rest.removeprefix('attn.qkv.')}"] = values
        elif rest == "gamma1" and name.replace("gamma1", "gamma2") in state:
            result[f"{prefix}layer_scale_parameters"] = torch.stack([value, state[name.replace("gamma1", "gamma2")]])
        elif rest == "gamma2" and name.replace("gamma2", "gamma1") in state:
            continue
        else:
            theirs = _renamed(rest, _BLOCK_NAMES, from_hf=False)
            result[name if theirs is None else prefix + theirs] = value
    if model_type is None:
        return result
    return {name if name.startswith("classifier.") else f"{model_type}.{name}": value for name, value in result.items()}


def _model_name_from_hf(name: str) -> str:
    level, norm = _HF_LEVEL.fullmatch(name), _HF_STAGE_NORM.fullmatch(name)
    if level:
        return f"levels.{level[1]}.{level[2]}"
    if norm:
        return f"norm{int(norm[1]) - 1}.{norm[2]}"
    return _renamed(name, _MODEL_NAMES, from_hf=True) or name


def _model_name_to_hf(name: str) -> str:
    level, norm = _LEVEL.fullmatch(name), _OUTPUT_NORM.fullmatch(name)
    if level:
        return f"encoder.levels.{level[1]}.{level[2]}"
    if norm:
        return f"hidden_states_norms.stage{int(norm[1]) + 1}.{norm[2]}"
    return _renamed(name, _MODEL_NAMES, from_hf=False) or name


def _renamed(name: str, table: tuple[tuple[str, str], ...], *, from_hf: bool) -> str | None:
    for ours, theirs in table:
        old, new = (theirs, ours) if from_hf else (ours, theirs)
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None
