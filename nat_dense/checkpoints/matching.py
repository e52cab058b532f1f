"""Decides which tensor of a file goes where in a model, with every tensor of both accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nat_dense.checkpoints.keymaps import STEM_NORM
from nat_dense.checkpoints.layout import Layout, architecture_of
from nat_dense.checkpoints.rpb import resize_rpb as _resize
from nat_dense.listing import listing

RULES = {
    "fresh-output-norms": "the file has no output norms (classification models have none): the model keeps its own",
    "classifier": "this backbone doesn't use the classifier's norm and head",
    "unused-output-norm": "norms of stages that out_indices leaves out",
    "stem-norm": "transformers' norm of the stem's map, which these backbones don't return",
    "outside-backbone": "only the backbone, or the part given by prefix, is loaded",
    "batch-norm-counter": "batch norm counters, which old files lack and which don't affect results",
    "ema-copy": "mmcv 1.x's second copy of the weights (the first is the averaged one)",
    "replaced-head": "a new classifier was requested",
}
"""Why a tensor may be absent from the file or left out of the model; nothing else may."""

_OUTPUT_NORM = re.compile(r"norm\d+\.(weight|bias)")


@dataclass
class Match:
    """What `match` found.

    Attributes:
        sources: The model's name to the tensor for it, in the model's shape.
        converted: The model's name to what was changed, such as "kernel 7 -> 11".
        absent: The model's name to the rule by which the file needn't have it.
        left_out: The file's name to the rule by which the model needn't have it.
    """

    sources: dict[str, Tensor] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def match(
    model: Mapping[str, Tensor],
    layout: Layout,
    *,
    backbone_path: str = "",
    resize_rpb: bool = False,
    replace_head: bool = False,
) -> Match:
    """Pairs a file's tensors with a model's; looks at names, shapes and dtypes only.

    Args:
        model: The model's state dict; its tensors may be on any device, "meta" too.
        layout: What the file holds.
        backbone_path: Where the model keeps its backbone: "" for a backbone or classifier alone, "backbone." in mm.
        resize_rpb: Whether biases of a different kernel size are resized.
        replace_head: Whether the classifier keeps the model's own head.

    Raises:
        ValueError: Tensors are missing, unknown, or of a different shape; the message gives the likely cause.
    """
    pair = _Pair(model, layout, backbone_path, replace_head)
    result, missing, unknown, shapes = Match(), [], [], []
    if not backbone_path:
        result.left_out |= dict.fromkeys(layout.others, "outside-backbone")
    for name, target in model.items():
        source = pair.found.get(name)
        if source is None or pair.replaces(name):
            rule = pair.absence(name)
            if rule is None:
                missing.append(name)
            else:
                result.absent[name] = rule
        elif source.shape == target.shape:
            result.sources[name] = source
        elif resize_rpb and _same_but_kernel(name, source, target):
            old, new = ((t.shape[-1] + 1) // 2 for t in (source, target))
            result.sources[name] = _resize(source, new)
            result.converted[name] = f"kernel {old} -> {new}"
        else:
            shapes.append(f"{name} {tuple(source.shape)}, the model's {tuple(target.shape)}")
    for name in pair.found:
        if name not in model or pair.replaces(name):
            rule = pair.surplus(name)
            if rule is None:
                unknown.append(name)
            else:
                result.left_out[name] = rule
    kinds = [
        f"{n} {_short(t)}"
        for n, t in result.sources.items()
        if t.dtype.is_floating_point != model[n].is_floating_point()
    ]
    problems = (
        _listed("missing", missing),
        _listed("not in the model", unknown),
        _listed("of a different shape", shapes),
    )
    if any(problems) or kinds:
        listed = "; ".join(filter(None, (*problems, _listed("of a different kind of number", kinds))))
        raise ValueError(f"the weights don't fit the model{pair.cause()}: {listed}")
    for name, source in result.sources.items():
        if source.dtype != model[name].dtype:
            notes = [result.converted[name]] if name in result.converted else []
            result.converted[name] = ", ".join([*notes, f"{_short(source)} -> {_short(model[name])}"])
    return result


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a tensor has NaN or infinite values."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{name}: {count} of {tensor.numel()} values are NaN or infinite; did training diverge?")


def is_ema_copy(name: str, names: Iterable[str]) -> bool:
    """Whether this tensor is the second copy of one of `names`, made by mmcv 1.x's averaging hook."""
    return name.startswith("ema_") and name.removeprefix("ema_") in {n.replace(".", "_") for n in names}


class _Pair:
    """A model's names and a file's, and the rules by which they may differ."""

    def __init__(self, model: Mapping[str, Tensor], layout: Layout, backbone_path: str, replace_head: bool):
        if backbone_path and layout.prefix != backbone_path:
            raise ValueError(
                f"the file is {layout.kind}, the model a whole detector or segmentor: give the file to the backbone, "
                "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=...)"
            )
        self.path = backbone_path
        self.replace_head = replace_head
        self.file_backbone = layout.backbone
        self.model_backbone = {
            n.removeprefix(backbone_path): t for n, t in model.items() if n.startswith(backbone_path)
        }
        self.found = {backbone_path + name: value for name, value in layout.backbone.items()}
        if backbone_path:
            self.found |= layout.others

    def replaces(self, name: str) -> bool:
        return self.replace_head and name in ("head.weight", "head.bias") and name in self.model_backbone

    def absence(self, name: str) -> str | None:
        """The rule by which the file may lack a tensor of the model, if there is one."""
        if self.replaces(name):
            return "replaced-head"
        if name.endswith(".num_batches_tracked"):
            return "batch-norm-counter"
        normless = not any(map(_OUTPUT_NORM.fullmatch, self.file_backbone))
        # A whole detector was trained with its output norms: there, their absence is damage.
        if normless and not self.path and _OUTPUT_NORM.fullmatch(name):
            return "fresh-output-norms"
        return None

    def surplus(self, name: str) -> str | None:
        """The rule by which the model may lack a tensor of the file, if there is one."""
        if self.replaces(name):
            return "replaced-head"
        if is_ema_copy(name, self.found):
            return "ema-copy"
        inner = name.removeprefix(self.path)
        if inner.startswith(f"{STEM_NORM}."):
            return "stem-norm"
        dense = any(map(_OUTPUT_NORM.fullmatch, self.model_backbone))
        if dense and re.fullmatch(r"(norm|head)\.(weight|bias)", inner):
            return "classifier"
        if dense and _OUTPUT_NORM.fullmatch(inner):
            return "unused-output-norm"
        return None

    def cause(self) -> str:
        """The likely cause of the mismatch, as " (...)": how the two architectures differ."""
        ours, theirs = architecture_of(self.file_backbone), architecture_of(self.model_backbone)
        differences = ours.differences(theirs)
        if differences == [f"kernel_size {ours.kernel_size} weights, {theirs.kernel_size} model"]:
            return f" ({differences[0]}; resize_rpb=True resizes the biases)"
        if differences:
            return f" ({'; '.join(differences)})"
        if None not in (ours.num_classes, theirs.num_classes) and ours.num_classes != theirs.num_classes:
            return f" ({ours.num_classes} classes in the file, {theirs.num_classes} in the model; see replace_head)"
        return ""


def _same_but_kernel(name: str, source: Tensor, target: Tensor) -> bool:
    square = source.dim() == 3 and source.shape[1] == source.shape[2] and source.shape[1] % 2 == 1
    return name.endswith(".rpb") and square and source.shape[0] == target.shape[0]


def _listed(what: str, names: list[str]) -> str:
    return f"{len(names)} {what}: {listing(names, 4)}" if names else ""


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
