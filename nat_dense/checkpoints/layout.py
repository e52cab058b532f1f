"""Recognises a set of tensors: the naming scheme, where the backbone is, and which architecture it has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from torch import Tensor

from nat_dense.checkpoints.keymaps import from_hf
from nat_dense.models import variants

Scheme = Literal["original", "transformers"]

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel, averaged models and torch.compile put before every name."""

_ORIGINAL = re.compile(r"((?:.*\.)?)(levels|layers)\.\d+\.blocks\.\d+\.attn\.rpb")
_TRANSFORMERS = re.compile(r"((?:.*\.)?)encoder\.levels\.\d+\.layers\.\d+\.attention\.self\.rpb")
_FAMILY_OF_STAGES = {"levels": "NAT", "layers": "DiNAT_s"}

_STRANGERS = (
    (r"relative_position_bias_table$", "a Swin Transformer"),
    (r"(^|\.)blocks\.\d+\.attn\.rpb$", "an isotropic NAT, which has no maps at several scales"),
    (r"(^|\.)layer1\.0\.conv1\.weight$", "a ResNet"),
    (r"(^|\.)cls_token$", "a ViT"),
    (r"(^|\.)stages\.\d+\.(blocks\.)?\d+\.(gamma|depthwise_conv|dwconv|conv_dw)", "a ConvNeXt"),
    (
        r"(^|\.)(levels|layers)\.\d+\.blocks\.\d+\.attn\.qkv\.weight$",
        "a NAT trained without relative position biases (as with NATTEN 0.20 and newer), or not a NAT",
    ),
    (r"^(exp_avg|step|momentum_buffer)", "an optimizer's state"),
)


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a backbone's tensors reveal; None or short where tensors are missing.

    `family` is "NAT" for DiNAT as well: dilations add no weights. `norms` are the stages with an output norm,
    `num_classes` counts the classifier's outputs.
    """

    family: str
    embed_dim: int | None
    depths: tuple[int, ...]
    num_heads: tuple[int | None, ...]
    mlp_ratio: float | None
    kernel_size: int | None
    layer_scale: bool
    qkv_bias: bool
    in_chans: int | None
    norms: tuple[int, ...]
    num_classes: int | None

    def presets(self) -> list[tuple[str, str]]:
        """The (family, arch) rows of the published table with this architecture."""
        families = ("NAT", "DiNAT") if self.family == "NAT" else (self.family,)
        return [(f, name) for f in families for name, row in variants.VARIANTS[f].items() if self._is(row)]

    def differences(self, model: Architecture) -> list[str]:
        """How this architecture, from a file, differs from a model's, in words; ignores output norms and classes."""
        if self.family != model.family:
            of = {"NAT": "NAT or DiNAT", "DiNAT_s": "DiNAT_s"}
            return [f"{of[self.family]} weights, {of[model.family]} model"]
        names = [f.name for f in fields(self) if f.name not in ("family", "norms", "num_classes")]
        pairs = [(name, getattr(self, name), getattr(model, name)) for name in names]
        return [f"{name} {ours} weights, {theirs} model" for name, ours, theirs in pairs if ours not in (None, theirs)]

    def _is(self, row: variants.Variant) -> bool:
        same = ("embed_dim", "depths", "num_heads", "mlp_ratio", "kernel_size")
        return all(getattr(self, n) == getattr(row, n) for n in same) and self.layer_scale == bool(row.layer_scale)


@dataclass(frozen=True)
class Layout:
    """Where a file keeps its backbone.

    Attributes:
        scheme: The naming scheme of the backbone's tensors.
        prefix: The prefix of the backbone's names, such as "backbone."; "" if it is the whole file.
        backbone: The backbone's tensors under the original's names, including a classifier's `norm` and `head`.
        others: The tensors outside the backbone, under the file's names without wrappers.
        unwrapped: The prefix stripped from all names, such as "module.".
    """

    scheme: Scheme
    prefix: str
    backbone: dict[str, Tensor]
    others: dict[str, Tensor]
    unwrapped: str

    @property
    def kind(self) -> str:
        """The file in words."""
        if not find_backbones(self.backbone):
            return f"the part {self.prefix.removesuffix('.')!r} of a file"
        if self.others and self.prefix == "backbone.":
            heads = sorted({name.split(".")[0] for name in self.others})
            task = "segmentor" if "decode_head" in heads else "detector"
            return f"a whole {task} (backbone, {', '.join(heads)})"
        who = "original" if self.scheme == "original" else "transformers"
        if "head.weight" in self.backbone:
            return f"a classification model with {who} names"
        if any(re.match(r"norm\d", name) for name in self.backbone):
            return f"a dense backbone with {who} names"
        return f"a backbone without output norms, with {who} names"


def recognise(tensors: Mapping[str, Tensor], prefix: str | None = None) -> Layout:
    """Finds the backbone among a file's tensors.

    Args:
        tensors: Under the file's names.
        prefix: Where to look, such as "teacher.backbone", with or without the last dot; None for anywhere.

    Raises:
        ValueError: There is none, or there are several.
    """
    tensors, unwrapped = unwrap(tensors)
    found = find_backbones(tensors)
    if not found:
        raise ValueError(f"no NAT, DiNAT or DiNAT_s among {len(tensors)} tensors: {_guess(tensors)}")
    places = ", ".join(map(repr, sorted(found)))
    if prefix is None and len(found) > 1:
        raise ValueError(f"{len(found)} backbones in one file, under {places}; choose one with prefix=...")
    prefix = next(iter(found)) if prefix is None else prefix and f"{prefix.removesuffix('.')}."
    if prefix not in found:
        raise ValueError(f"no backbone under prefix={prefix!r}; the file has one under {places}")
    scheme = found[prefix]
    # transformers puts its classifier beside the model, not inside.
    inside = {n: t for n, t in tensors.items() if n.startswith(prefix) or (scheme, prefix) == ("transformers", "")}
    if scheme == "transformers" and prefix in ("nat.", "dinat."):
        inside |= {n: t for n, t in tensors.items() if n.startswith("classifier.")}
    others = {name: value for name, value in tensors.items() if name not in inside}
    backbone = {name.removeprefix(prefix): value for name, value in inside.items()}
    if scheme == "transformers":
        backbone = from_hf(backbone)
    return Layout(scheme, prefix, backbone, others, unwrapped)


def find_backbones(names: Iterable[str]) -> dict[str, Scheme]:
    """The prefix of each backbone's names, such as "backbone.", and its naming scheme."""
    found: dict[str, Scheme] = {}
    for name in names:
        if match := _ORIGINAL.fullmatch(name):
            found[match[1]] = "original"
        elif match := _TRANSFORMERS.fullmatch(name):
            found[match[1]] = "transformers"
    return found


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> Layout:
    """A part of a file that is not a backbone, such as a neck, as a layout like a backbone's.

    Args:
        tensors: Under the file's names.
        prefix: The prefix of the part's names, such as "neck", with or without the last dot.

    Raises:
        ValueError: No name starts with it.
    """
    tensors, unwrapped = unwrap(tensors)
    prefix = f"{prefix.removesuffix('.')}."
    part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not part:
        parts = ", ".join(repr(name) for name in sorted({name.split(".")[0] for name in tensors}))
        raise ValueError(f"nothing under prefix={prefix!r}; the file has {parts}")
    others = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    return Layout("original", prefix, part, others, unwrapped)


def unwrap(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Strips `WRAPPERS` if all names have them; returns the tensors and what was stripped.

    Averaged models keep a bare counter (`steps`, `n_averaged`) beside the wrapped names, which is dropped too.
    """
    result, unwrapped = dict(tensors), ""
    while True:
        names = [name for name, value in result.items() if value.dim() > 0 or "." in name]
        wrapper = next((w for w in WRAPPERS if names and all(name.startswith(w) for name in names)), None)
        if wrapper is None:
            return result, unwrapped
        result = {name.removeprefix(wrapper): result[name] for name in names}
        unwrapped += wrapper


def architecture_of(backbone: Mapping[str, Tensor]) -> Architecture:
    """Infers the architecture from a backbone's tensors under the original's names; some may be missing."""
    stages = next((match[2] for name in backbone if (match := _ORIGINAL.fullmatch(name))), "levels")
    blocks = _blocks(backbone, stages)
    depths = tuple(max(blocks[i]) + 1 if i in blocks else 0 for i in range(max(blocks, default=-1) + 1))

    def shape(name: str) -> tuple[int, ...] | None:
        return tuple(backbone[name].shape) if name in backbone else None

    rpbs = [
        next((shape(n) for j in range(d) if (n := f"{stages}.{i}.blocks.{j}.attn.rpb") in backbone), None)
        for i, d in enumerate(depths)
    ]
    stem = shape("patch_embed.proj.0.weight") or shape("patch_embed.proj.weight")
    width = shape("patch_embed.norm.weight")
    head = shape("head.weight")
    kernel = next((rpb[1] for rpb in rpbs if rpb is not None and len(rpb) == 3), None)
    return Architecture(
        family=_FAMILY_OF_STAGES[stages],
        embed_dim=width[0] if width else None,
        depths=depths,
        num_heads=tuple(rpb[0] if rpb else None for rpb in rpbs),
        mlp_ratio=_mlp_ratio(backbone, stages, len(depths)),
        kernel_size=(kernel + 1) // 2 if kernel else None,
        layer_scale=any(name.endswith(".gamma1") for name in backbone),
        qkv_bias=any(name.endswith(".attn.qkv.bias") for name in backbone),
        in_chans=stem[1] if stem and len(stem) == 4 else None,
        norms=tuple(i for i in range(len(depths)) if f"norm{i}.weight" in backbone),
        num_classes=head[0] if head else None,
    )


def _mlp_ratio(backbone: Mapping[str, Tensor], stages: str, count: int) -> float | None:
    """A ratio that gives every stage's hidden channels, which are rounded down."""
    names = (f"{stages}.{i}.blocks.0.mlp.fc1.weight" for i in range(count))
    shapes = [backbone[name].shape for name in names if name in backbone and backbone[name].dim() == 2]
    if not shapes:
        return None
    hidden, dim = max(shapes)  # the widest stage gives it most precisely
    exact = hidden / dim
    return exact if all(int(d * exact) == h for h, d in shapes) else (hidden + 0.5) / dim


def _blocks(names: Iterable[str], stages: str) -> dict[int, set[int]]:
    result: dict[int, set[int]] = {}
    for name in names:
        if match := re.match(rf"{stages}\.(\d+)\.blocks\.(\d+)\.", name):
            result.setdefault(int(match[1]), set()).add(int(match[2]))
    return result


def _guess(names: Iterable[str]) -> str:
    names = list(names)
    for pattern, meaning in _STRANGERS:
        if any(re.search(pattern, name) for name in names):
            return f"it looks like {meaning}"
    return f"the first are {', '.join(names[:3])}" if names else "the file is empty"
