"""Parameters and operations of a detector or a segmentor, part by part, without running it.

The model is built and run on torch's meta device, where tensors have shapes and no data: nothing is computed, so a
large model at a large size takes a second.

Three figures go by the name of FLOPs, and all three can be read off here:

- multiply-adds (MACs) of convolutions, linear layers, matrix products and attention: `Part.macs`;
- FLOPs of the same, twice the MACs: what `torch.utils.flop_counter` says;
- operations: the MACs plus rough counts of norms, resizes, poolings and attention biases, one unit per elementary step:
  `Part.operations`. That is what fvcore and MMEngine count and what the NAT and DiNAT papers publish as FLOPs.
  Activations, softmax, residual additions, RoIAlign and post-processing count nothing in any of the three.

`docs/flops.md` sets the published figures beside these.

Source: fvcore's and `mmengine.analysis`'s operations per element of norms, resizes and poolings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nat_dense.mm.build_errors import naming_parts
from nat_dense.mm.channels import image_channels
from nat_dense.mm.config import model_of
from nat_dense.mm.meta import build_on_meta
from nat_dense.ops.flops import bias_additions

MAC_KINDS = ("convolution", "matmul", "na2d")
EXTRA_KINDS = ("na2d_bias", "norm", "resize", "pool")
KINDS = MAC_KINDS + EXTRA_KINDS
"""What an operation belongs to. "matmul" holds linear layers and the products of attention other than ours."""

ROI_HEADS = ("StandardRoIHead", "CascadeRoIHead")
"""The RoI heads whose parts take nothing but RoI features; others (HTC, PointRend, ...) exchange more."""

_MAP_HEADS = ("rpn_head", "bbox_head", "mask_head", "semantic_head")
_KNOWN_PARTS = ("data_preprocessor", "backbone", "neck", *_MAP_HEADS, "roi_head", "decode_head", "auxiliary_head")


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        name: Its path in the model, such as "roi_head.bbox_head".
        parameters: Its parameters.
        counts: Operations by kind (`KINDS`), for one image.
        note: What the counts hold for where that isn't one image, such as "1000 proposals".
    """

    name: str
    parameters: int
    counts: dict[str, int] = field(default_factory=dict)
    note: str = ""

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions, linear layers, matrix products and attention."""
        return sum(self.counts.get(kind, 0) for kind in MAC_KINDS)

    @property
    def operations(self) -> int:
        """The MACs plus norms, resizes, poolings and attention biases: what papers call FLOPs."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Cost:
    """A model's parts, for one image of `height` x `width` pixels."""

    height: int
    width: int
    parts: tuple[Part, ...]

    @property
    def total(self) -> Part:
        """All parts together."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            counts.update(part.counts)
        return Part("total", sum(part.parameters for part in self.parts), dict(counts))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every part and the total, with counts as plain numbers."""
        rows = {part.name: _as_dict(part) for part in self.parts}
        return {"height": self.height, "width": self.width, "parts": rows, "total": _as_dict(self.total)}

    def as_table(self) -> Table:
        """For a terminal, in 10^6 parameters and 10^9 operations."""
        notes = [f"{part.name}: {part.note}" for part in self.parts if part.note]
        table = Table(title=f"one image of {self.height} x {self.width} pixels", caption=", ".join(notes))
        table.add_column("part", no_wrap=True)
        for column in ("params (M)", "GMACs", "of which na2d", "other (G)", "total (G)"):
            table.add_column(column, justify="right")
        for part in (*self.parts, self.total):
            if part.name == "total":
                table.add_section()
            extra = part.operations - part.macs
            numbers = (part.macs, part.counts.get("na2d", 0), extra, part.operations)
            table.add_row(part.name, f"{part.parameters / 1e6:.2f}", *(f"{n / 1e9:.2f}" for n in numbers))
        return table


def _as_dict(part: Part) -> dict[str, Any]:
    figures: dict[str, Any] = dict(parameters=part.parameters, macs=part.macs, operations=part.operations)
    figures["by_kind"] = {kind: part.counts.get(kind, 0) for kind in KINDS}
    return figures | ({"note": part.note} if part.note else {})


def count_config(cfg: Config, height: int, width: int) -> Cost:
    """Counts a config's model.

    Args:
        cfg: A config of MMDetection or MMSegmentation.
        height, width: Of the image that reaches the backbone, in pixels.

    Raises:
        ValueError: The config has no model, or `count_model` can't take it.
    """
    node = model_of(cfg)
    init_default_scope(cfg.get("default_scope", "mmengine"))
    with naming_parts(node):
        model = build_on_meta(node)
    return count_model(model, height, width)


def count_model(model: nn.Module, height: int, width: int) -> Cost:
    """Counts a model that lies on the meta device; leaves it in eval mode.

    Args:
        model: A single-stage detector, a two-stage detector with one of `ROI_HEADS`, or a segmentor.
        height, width: Of the image that reaches the backbone, in pixels.

    Raises:
        ValueError: The image has no pixels, or the model has parts that can't be counted on their own or without data.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image of {height} x {width} pixels: expected a height and a width of at least 1")
    _check_parts(model)
    model.eval()
    with torch.no_grad():
        return Cost(height, width, tuple(_parts(model, height, width)))


def _check_parts(model: nn.Module) -> None:
    roi_head = getattr(model, "roi_head", None)
    kind = type(roi_head).__name__
    if roi_head is not None and kind not in ROI_HEADS:
        raise ValueError(f"roi_head is a {kind}; the RoI heads that can be counted are {', '.join(ROI_HEADS)}")
    if roi_head is not None and getattr(model, "rpn_head", None) is None:
        raise ValueError(f"{type(model).__name__} has no rpn_head, so the number of its RoIs is not known")
    unknown = [name for name in _weighty(model) if name not in _KNOWN_PARTS]
    if roi_head is not None:
        unknown += [f"roi_head.{name}" for name in _weighty(roi_head) if name not in ("bbox_head", "mask_head")]
    if unknown or not hasattr(model, "backbone"):
        found = ", ".join(unknown) or "no backbone"
        raise ValueError(
            f"{type(model).__name__} has {found}: only segmentors can be counted part by part, and detectors whose "
            "heads take only feature maps or RoI features"
        )


def _weighty(model: nn.Module) -> list[str]:
    """Names of the direct parts that have parameters."""
    return [name for name, part in model.named_children() if _parameters(part)]


def _parts(model: Any, height: int, width: int) -> Iterator[Part]:
    image = torch.empty(1, image_channels(model), height, width, device="meta")
    part, maps = _count("backbone", model.backbone, lambda: model.backbone(image))
    yield part
    if getattr(model, "neck", None) is not None:
        part, maps = _count("neck", model.neck, lambda: model.neck(maps))
        yield part
    for name in _MAP_HEADS:
        head = getattr(model, name, None)
        if head is not None:
            yield _count(name, head, partial(head, maps))[0]
    if getattr(model, "roi_head", None) is not None:
        yield from _roi_parts(model.roi_head, model.test_cfg)
    if hasattr(model, "decode_head"):
        yield _count("decode_head", model.decode_head, lambda: _segment(model, maps, height, width))[0]
    if getattr(model, "auxiliary_head", None) is not None:
        yield Part("auxiliary_head", _parameters(model.auxiliary_head), note="training only")


def _roi_parts(roi_head: Any, test_cfg: Any) -> Iterator[Part]:
    """RoI heads on as many RoIs as the test configuration lets through at most.

    Every stage of a cascade sees every proposal, and every mask head every detection.
    """
    for kind, rois, what in (
        ("bbox", test_cfg.rpn.max_per_img, "proposals"),
        ("mask", test_cfg.rcnn.max_per_img, "detections"),
    ):
        heads = getattr(roi_head, f"{kind}_head", None)
        if heads is None:
            continue
        extractors = getattr(roi_head, f"{kind}_roi_extractor")
        stages = list(zip(_as_list(extractors), _as_list(heads), strict=True))

        run = partial(_run_on_rois, stages, rois)
        yield _count(f"roi_head.{kind}_head", heads, run, note=f"{rois} {what}")[0]


def _run_on_rois(stages: list[tuple[Any, Any]], rois: int) -> None:
    for extractor, head in stages:
        size = extractor.roi_layers[0].output_size
        head(torch.empty(rois, extractor.out_channels, *size, device="meta"))


def _as_list(modules: nn.Module) -> list[Any]:
    return list(modules) if isinstance(modules, nn.ModuleList) else [modules]


def _segment(model: Any, maps: tuple[Tensor, ...], height: int, width: int) -> Tensor:
    """The decode head as in inference: its logits are resized to the image. The heads of a cascade feed each other."""
    *first, last = _as_list(model.decode_head)
    inputs: tuple = (maps,)
    for head in first:
        inputs = (maps, head(*inputs))
    return last.predict(*inputs, [dict(img_shape=(height, width))], model.test_cfg)


def _count(name: str, module: nn.Module, run: Callable[[], Any], note: str = "") -> tuple[Part, Any]:
    try:
        with OperationCounter() as counter:
            output = run()
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} ({type(module).__name__}) can't be run on shapes alone: {error}") from error
    return Part(name, _parameters(module), dict(counter.counts), note), output


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class OperationCounter(TorchDispatchMode):
    """Counts the operations of everything that runs inside it, in eval mode, by kind (`KINDS`).

    Attributes:
        counts: Operations by kind; a multiply-add is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operator = func.overloadpacket
        if operator not in flop_registry and operator not in _EXTRAS:
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        output = func(*args, **kwargs)
        if operator in flop_registry:
            flops = flop_registry[operator](*args, **kwargs, out_val=output)
            self.counts[_MAC_KIND.get(operator, "matmul")] += flops // 2
        if operator in _EXTRAS:
            kind, count = _EXTRAS[operator]
            self.counts[kind] += count(args, output)
        return output


_aten = torch.ops.aten
_na2d, _na2d_qkv = torch.ops.nat_dense.na2d, torch.ops.nat_dense.na2d_qkv

_MAC_KIND = {_aten.convolution: "convolution", _na2d: "na2d", _na2d_qkv: "na2d"}


def _na2d_bias(rpb: Tensor | None, kernel_size: Sequence[int], output: tuple[Tensor, Tensor]) -> int:
    return 0 if rpb is None else bias_additions(output[0].shape, kernel_size)


_EXTRAS: dict[Any, tuple[str, Callable[[tuple, Any], int]]] = {
    _na2d: ("na2d_bias", lambda args, output: _na2d_bias(args[3], args[6], output)),
    _na2d_qkv: ("na2d_bias", lambda args, output: _na2d_bias(args[1], args[4], output)),
    _aten.native_layer_norm: ("norm", lambda args, _: args[0].numel() * (4 if args[2] is None else 5)),
    _aten.native_group_norm: ("norm", lambda args, _: args[0].numel() * (4 if args[1] is None else 5)),
    # In eval mode a scale and a shift are all that a batch norm is.
    _aten.native_batch_norm: ("norm", lambda args, _: args[0].numel() * (1 if args[1] is None else 2)),
    _aten.upsample_bilinear2d: ("resize", lambda _, output: 4 * output.numel()),
    _aten.upsample_nearest2d: ("resize", lambda _, output: output.numel()),
    _aten._adaptive_avg_pool2d: ("pool", lambda args, _: args[0].numel()),
    # What adaptive pooling to one pixel becomes.
    _aten.mean: ("pool", lambda args, _: args[0].numel()),
}
