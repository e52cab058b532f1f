"""Converts any checkpoint to a chosen kind of file, with every tensor checked against the target model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nat_dense.checkpoints.download import local
from nat_dense.checkpoints.keymaps import ModelType, to_hf
from nat_dense.checkpoints.layout import Architecture, Layout, architecture_of
from nat_dense.checkpoints.loading import Report, open_checkpoint
from nat_dense.checkpoints.matching import Match, check_finite, is_ema_copy, match
from nat_dense.checkpoints.origin import Origin, origin_of
from nat_dense.checkpoints.reading import Checkpoint
from nat_dense.checkpoints.writing import check_suffix, save
from nat_dense.files import atomic, check_folder, check_free
from nat_dense.models import NAT, DiNAT_s, DiNATsClassifier, NATClassifier
from nat_dense.models.fields import Dilations, resolve_dilations

Kind = Literal["dense", "classification", "hf", "mm"]
KINDS: tuple[str, ...] = get_args(Kind)


def convert(
    source: str | Path,
    target: str | Path,
    to: Kind,
    *,
    model_type: ModelType | None = None,
    dilations: str | None = None,
    kernel_size: int | None = None,
    prefix: str | None = None,
    trust: bool = False,
    sha256: str | None = None,
    entry: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Converts a checkpoint to another kind. Values are not changed, unless `kernel_size` requests it.

    Args:
        source: As in `load`.
        target: A file to write (.safetensors, .pth, .pt or .bin); with to="hf" also a folder, which then gets the
            config that transformers needs.
        to: "dense" is a backbone under the original's names, "classification" a backbone with its classifier,
            "hf" a transformers model or backbone, "mm" a file for mm's `load_from` or `tools/test.py`.
        model_type: With to="hf", "nat" or "dinat". The weights don't say which; a config stored with them does.
        dilations: With to="hf" and "dinat", the preset of `variants.DILATIONS` for the config; likewise.
        kernel_size: Of the result, if it differs from the file's.
        prefix, trust, sha256, entry: As in `load`.
        overwrite: Whether an existing file may be replaced.

    Returns:
        Where every tensor went.

    Raises:
        FileExistsError: There is a file already and `overwrite` is False.
        FileNotFoundError: There is no such file, or no folder to write into.
        ValueError: The file is refused as in `load`, can't be converted to this kind, or would be overwritten with
            less than it holds.
    """
    if model_type is not None and to != "hf":
        raise ValueError(f"model_type={model_type!r} (--model-type) is for to='hf', not to={to!r}")
    target = Path(target)
    folder = _check_target(target, to, overwrite)
    checkpoint, layout = open_checkpoint(source, prefix=prefix, trust=trust, sha256=sha256, entry=entry)
    architecture = architecture_of(layout.backbone)
    head = "head.weight" in layout.backbone and to in ("classification", "hf")
    if to == "classification" and not head:
        raise ValueError(f"{source} is {layout.kind}: it has no classifier to write")
    try:
        model = _skeleton(architecture, head, kernel_size)
        found = match(model.state_dict(), layout, resize_rpb=kernel_size is not None)
        check_finite(found.sources)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    tensors = found.sources
    if to == "hf":
        origin = origin_of(checkpoint)
        changed = model_type == "dinat" and dilations is not None  # on purpose
        model_type = _model_type(
            architecture, layout, None if changed else origin, model_type, source, needed=head or folder
        )
        tensors = to_hf(tensors, model_type if head else None)
    elif to == "mm":
        tensors = _with_heads(found, layout)
    if dilations is not None and not (folder and model_type == "dinat"):
        raise ValueError("dilations (--dilations) only apply to a DiNAT written to a folder with to='hf'")
    lost = [*found.left_out, *map(str, checkpoint.extras)]
    written = (target, target / "model.safetensors", target / "config.json") if folder else (target,)
    read = local(source)
    if lost and read and any(path.exists() and path.samefile(read) for path in written):
        raise ValueError(
            f"writing to {target} would overwrite the input and lose {len(lost)} entries that the new format doesn't "
            f"keep, such as {lost[0]!r}; choose another output"
        )
    if folder:
        known = dilations if dilations or origin is None else origin.dilations
        config = _hf_config(architecture, kernel_size, model_type, known)
        target.mkdir(exist_ok=True)
        save(tensors, target / "model.safetensors")
        with atomic(target / "config.json") as part:
            part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        save(tensors, target, content={"meta": _mm_meta(checkpoint)} if to == "mm" else None)
    return Report(
        source=str(source),
        kind=layout.kind,
        used=tuple(tensors),
        converted=found.converted,
        absent=found.absent,
        left_out=found.left_out,
        extras=tuple(map(str, checkpoint.extras)),
    )


def _check_target(target: Path, to: str, overwrite: bool) -> bool:
    """Whether the target is a folder; raises where it can't be written."""
    if to not in KINDS:
        raise ValueError(f"to={to!r}: expected one of {', '.join(KINDS)}")
    folder = to == "hf" and target.suffix == ""
    if not folder:
        check_suffix(target)
    check_folder(target)
    for file in (target / "model.safetensors", target / "config.json") if folder else (target,):
        check_free(file, overwrite)
    return folder


def _with_heads(found: Match, layout: Layout) -> dict[str, Tensor]:
    """A detector's or segmentor's tensors, whose backbone has been matched; removes the rest from `left_out`."""
    tensors = {f"backbone.{name}": value for name, value in found.sources.items()}
    if layout.prefix != "backbone.":
        return tensors
    copies = {name for name in layout.others if is_ema_copy(name, [*tensors, *layout.others])}
    others = {name: value for name, value in layout.others.items() if name not in copies}
    found.left_out.update(dict.fromkeys(copies, "ema-copy"))
    for name in others:
        del found.left_out[name]
    return tensors | others


def _skeleton(architecture: Architecture, head: bool, kernel_size: int | None) -> nn.Module:
    """The model that a complete file of this architecture fits, without memory for its weights."""
    fields: dict[str, Any] = {}
    for name in ("embed_dim", "depths", "num_heads", "mlp_ratio", "kernel_size", "in_chans"):
        value = getattr(architecture, name)
        if value is None or value == () or (isinstance(value, tuple) and None in value):
            raise ValueError(f"tensors are missing: {name} can't be determined from the others")
        fields[name] = value
    fields |= dict(layer_scale=float(architecture.layer_scale), qkv_bias=architecture.qkv_bias)
    fields["kernel_size"] = kernel_size or fields["kernel_size"]
    small = architecture.family == "DiNAT_s"
    with torch.device("meta"):
        if head:
            classes = architecture.num_classes or 0  # a head without outputs is refused like any other bad field
            return (DiNATsClassifier if small else NATClassifier)(num_classes=classes, **fields)
        stages = architecture.norms or tuple(range(len(architecture.depths)))
        return (DiNAT_s if small else NAT)(out_indices=stages, **fields)


def _model_type(
    architecture: Architecture,
    layout: Layout,
    origin: Origin | None,
    given: ModelType | None,
    source: str | Path,
    *,
    needed: bool,
) -> ModelType | None:
    if architecture.family == "DiNAT_s":
        raise ValueError("transformers has no DiNAT_s")
    stored = layout.prefix.removesuffix(".")
    if stored not in ("nat", "dinat") and origin:
        stored = origin.family.lower()
    own: ModelType | None = "nat" if stored == "nat" else "dinat" if stored == "dinat" else None
    if given and own and given != own:
        raise ValueError(
            f"{source} holds a {own}, and a {given} has different dilations: choose its own model type "
            f"(--model-type {own})"
        )
    if needed and given is None and own is None:
        raise ValueError("the weights don't tell NAT from DiNAT: choose the model type (--model-type nat or dinat)")
    return given or own


def _hf_config(
    architecture: Architecture, kernel_size: int | None, model_type: ModelType | None, dilations: Dilations
) -> dict[str, Any]:
    name = "Nat" if model_type == "nat" else "Dinat"
    config: dict[str, Any] = dict(
        model_type=model_type,
        num_channels=architecture.in_chans,
        embed_dim=architecture.embed_dim,
        depths=list(architecture.depths),
        num_heads=list(architecture.num_heads),
        kernel_size=kernel_size or architecture.kernel_size,
        mlp_ratio=architecture.mlp_ratio,
        qkv_bias=architecture.qkv_bias,
        # Its value only starts a training; 0 switches the layer scale off.
        layer_scale_init_value=1e-5 if architecture.layer_scale else 0.0,
    )
    if model_type == "dinat":
        if dilations is None:
            raise ValueError("the weights don't contain the dilations: choose a preset (--dilations classification)")
        config["dilations"] = [list(row) for row in resolve_dilations("DiNAT", dilations, architecture.depths)]
    if architecture.num_classes is not None:
        labels = range(architecture.num_classes)
        config |= dict(
            architectures=[f"{name}ForImageClassification"],
            id2label={str(i): f"LABEL_{i}" for i in labels},
            label2id={f"LABEL_{i}": i for i in labels},
        )
    else:
        stages = [f"stage{i + 1}" for i in architecture.norms] or [f"stage{len(architecture.depths)}"]
        config |= dict(architectures=[f"{name}Backbone"], out_features=stages)
    return config


def _mm_meta(checkpoint: Checkpoint) -> dict[str, Any]:
    """The class names and colours, which mm 2.x kept elsewhere."""
    meta = checkpoint.extras.get("meta")
    if not isinstance(meta, Mapping):
        return {}
    if isinstance(meta.get("dataset_meta"), Mapping):
        return {"dataset_meta": dict(meta["dataset_meta"])}
    names = {"classes": meta.get("CLASSES"), "palette": meta.get("PALETTE")}
    known = {name: value for name, value in names.items() if isinstance(value, (list, tuple))}
    return {"dataset_meta": known} if known else {}
