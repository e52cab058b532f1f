"""The only entry point for loading weights into a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nat_dense.checkpoints.download import fetch
from nat_dense.checkpoints.layout import Layout, part_of, recognise
from nat_dense.checkpoints.matching import RULES, check_finite, match
from nat_dense.checkpoints.reading import Checkpoint, read
from nat_dense.models.backbone import NeighborhoodBackbone


@dataclass(frozen=True)
class Report:
    """Where every tensor of a file and of a model went. `str(report)` describes it in words.

    Attributes:
        source: The file.
        kind: What it is, in words.
        used: The model's tensors that came from the file.
        converted: Which of those were changed on the way, and how.
        absent: The model's tensors that the file lacks: name to rule.
        left_out: The file's tensors that the model lacks: name to rule.
        extras: The file's other entries, such as "optimizer", which are not weights.
    """

    source: str
    kind: str
    used: tuple[str, ...]
    converted: Mapping[str, str]
    absent: Mapping[str, str]
    left_out: Mapping[str, str]
    extras: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.kind}; {len(self.used)} tensors used"]
        for note, count in Counter(self.converted.values()).items():
            lines.append(f"  {count} converted: {note}")
        for verb, names in (("not in the file", self.absent), ("left out", self.left_out)):
            for rule, count in Counter(names.values()).items():
                first = next(name for name, r in names.items() if r == rule)
                lines.append(f"  {count} {verb}, rule {rule!r}: {RULES[rule]} ({first}, ...)")
        if self.extras:
            lines.append(f"  not weights: {', '.join(self.extras)}")
        return "\n".join(lines)


def load(
    model: nn.Module,
    source: str | Path,
    *,
    prefix: str | None = None,
    resize_rpb: bool = False,
    replace_head: bool = False,
    trust: bool = False,
    sha256: str | None = None,
    entry: str | None = None,
) -> Report:
    """Loads any NAT, DiNAT or DiNAT_s checkpoint into a model completely, or raises and leaves the model unchanged.

    Args:
        model: A backbone, a classifier, a whole detector or segmentor with one of our backbones, or another part of
            one, such as its neck.
        source: A file, a folder that transformers wrote, a URL, or a published name (`names.URLS`).
        prefix: Which backbone, if the file has several, such as "teacher.backbone", or which other part, such as
            "neck".
        resize_rpb: Whether position biases of a different kernel size are interpolated.
        replace_head: Whether a classifier keeps its own head instead of the file's.
        trust: Whether to run code that the file may contain.
        sha256: The file's expected hash.
        entry: Which entry of the file holds the weights, if several do, such as "state_dict_ema".

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file can't be read as data or holds a different model, or a tensor is missing, unknown, not
            finite or of a different shape.
    """
    model = _unwrapped(model)
    paths = backbone_paths(model)
    if len(paths) > 1 or not (paths or prefix):
        raise ValueError(
            f"{type(model).__name__} has {len(paths)} NAT, DiNAT or DiNAT_s backbones; expected one. If there "
            "are several, give each its own init_cfg; any other part of a model needs its prefix in the file, such as "
            "prefix='neck'"
        )
    checkpoint = read(fetch(source, sha256=sha256), trust=trust, sha256=sha256, entry=entry)
    try:
        layout = recognise(checkpoint.tensors, prefix) if paths else part_of(checkpoint.tensors, prefix or "")
        found = match(
            model.state_dict(),
            layout,
            backbone_path=paths[0] if paths else "",
            resize_rpb=resize_rpb,
            replace_head=replace_head,
        )
        check_finite(found.sources)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    # strict: `match` has accounted for every name; tensors that it allows to be absent keep their values.
    kept = {name: value for name, value in model.state_dict().items() if name in found.absent}
    with torch.no_grad():
        model.load_state_dict({**found.sources, **kept}, strict=True)
    return Report(
        source=str(source),
        kind=layout.kind,
        used=tuple(found.sources),
        converted=found.converted,
        absent=found.absent,
        left_out=found.left_out,
        extras=tuple(map(str, checkpoint.extras)),
    )


def open_checkpoint(
    source: str | Path,
    *,
    prefix: str | None = None,
    trust: bool = False,
    sha256: str | None = None,
    entry: str | None = None,
) -> tuple[Checkpoint, Layout]:
    """Fetches, reads and recognises a checkpoint. Arguments and errors are those of `load`."""
    checkpoint = read(fetch(source, sha256=sha256), trust=trust, sha256=sha256, entry=entry)
    try:
        return checkpoint, recognise(checkpoint.tensors, prefix)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and data parallelism."""
    while True:
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def backbone_paths(model: nn.Module) -> list[str]:
    """Where a model keeps our backbones, such as "backbone."; "" if it is one itself."""
    paths = [name for name, module in model.named_modules() if isinstance(module, NeighborhoodBackbone)]
    return [f"{path}." if path else "" for path in paths]
