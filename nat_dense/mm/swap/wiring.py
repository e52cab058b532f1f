"""Who reads the backbone's maps, and how their `in_channels`, `in_index` and `start_level` follow the new ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nat_dense.mm.fields import as_list, type_name
from nat_dense.mm.swap.refusals import SwapRefusedError, segments

SEGMENTATION_HEADS = ("decode_head", "auxiliary_head")


@dataclass
class Reader:
    """A part of the model that reads maps of the backbone.

    Attributes:
        path: Where it is, for messages.
        node: Its config; `rewire` changes it.
        key: The field with the widths it expects: an int, or a list in the order of `positions`.
        positions: The maps it reads, by their place among the old backbone's; None for what comes from elsewhere.
        default_index: What it reads if it has no `in_index`; None for parts that have no such field.
    """

    path: str
    node: dict
    key: str
    positions: Sequence[int | None]
    default_index: int | None = None

    def check(self, widths: Sequence[int]) -> None:
        """Raises SwapRefusedError where the field doesn't describe the old backbone's maps."""
        found = self.node[self.key]
        expected = self._widths(widths, as_list(found))
        if as_list(found) != expected:
            raise SwapRefusedError(
                f"{self.path}.{self.key} is {found}, but the maps of the old backbone that it seems to read have "
                f"{expected} channels (all maps: {list(widths)})."
            )

    def follow(self, widths: Sequence[int], kept: Sequence[int]) -> None:
        """Describes the new maps: `widths` by old position, of which only `kept` are still returned."""
        old = self.node[self.key]
        new = self._widths(widths, as_list(old))
        # A head without convolutions of its own works in the width that it reads.
        if self.key == "in_channels" and self.node.get("num_convs") == 0:
            self.node["channels"] = sum(new)
        self.node[self.key] = type(old)(new) if isinstance(old, (list, tuple)) else new[0]
        if self.default_index is None:
            return
        places = [list(kept).index(i) for i in self.positions if i is not None]
        index = self.node.get("in_index", self.default_index)
        if isinstance(index, (list, tuple)):
            self.node["in_index"] = type(index)(places)
        elif index % len(kept) != places[0] or index >= len(kept):
            self.node["in_index"] = places[0]

    def _widths(self, widths: Sequence[int], otherwise: Sequence[int]) -> list[int]:
        """Of the maps it reads; of what comes from elsewhere, those of `otherwise`."""
        return [
            width if i is None else widths[i]
            for i, width in itertools.zip_longest(self.positions, otherwise[: len(self.positions)])
        ]


def rewire(model: dict, old: Sequence[int], new: Sequence[int]) -> list[int]:
    """Makes everything that reads the backbone expect the new maps.

    Maps that nothing reads are dropped: their output norms would have no gradient, which distributed training refuses.

    Args:
        model: The model's config; changed in place (all but `backbone`).
        old: Channels of the old backbone's maps.
        new: Channels of the maps that take their places.

    Returns:
        The places among the old maps that are still read, ascending.

    Raises:
        SwapRefusedError: A part doesn't describe the old maps, or nothing that reads them was found.
    """
    readers = list(_readers(model, old))
    if not readers:
        raise SwapRefusedError("no neck or head was found that reads the backbone's maps by in_channels.")
    for reader in readers:
        reader.check(old)
    kept = sorted({i for reader in readers for i in reader.positions if i is not None})
    for reader in readers:
        reader.follow(new, kept)
    return kept


def _readers(model: dict, widths: Sequence[int]) -> Iterator[Reader]:
    necks = as_list(model.get("neck"))
    if necks and type_name(necks[0]) == "Feature2Pyramid":
        # It makes a pyramid out of maps of one resolution; here it is one already.
        model["neck"] = None
        necks = []
    if necks:
        yield from _neck_readers(model, necks[0], widths)
    elif segments(model):
        yield from _segmentation_readers(model, len(widths))
    else:
        yield from _detector_readers(model, widths)


def _neck_readers(model: dict, neck: dict, widths: Sequence[int]) -> Iterator[Reader]:
    path = "model.neck[0]" if isinstance(model["neck"], (list, tuple)) else "model.neck"
    if "in_channels" not in neck:
        raise SwapRefusedError(f"{path} ({type_name(neck)}) has no in_channels that says what it reads.")
    if type_name(neck) == "MultiLevelNeck":
        neck["scales"] = [1] * len(neck["in_channels"])
    positions = _find(neck["in_channels"], widths, path)
    if neck.get("start_level", 0) > 0:
        positions = _drop_unread_levels(neck, positions)
    yield Reader(path, neck, "in_channels", positions)
    if type_name(neck) == "JPU":
        # All its outputs but the last are the backbone's own maps, in their old places.
        for reader in _segmentation_readers(model, len(widths)):
            reader.positions = [None if i == len(widths) - 1 else i for i in reader.positions]
            reader.default_index = None
            yield reader


def _find(in_channels: Any, widths: Sequence[int], path: str) -> list[int]:
    """The maps that a neck reads: the last one, all, the last ones, or all from the last to the first."""
    count = len(widths)
    if not isinstance(in_channels, (list, tuple)):
        return [count - 1]
    candidates = [list(range(count - len(in_channels), count)), list(range(len(in_channels)))]
    candidates.append(list(reversed(candidates[0])))
    for positions in candidates:
        if len(in_channels) <= count and [widths[i] for i in positions] == list(in_channels):
            return positions
    raise SwapRefusedError(
        f"{path}.in_channels is {in_channels}, but the old backbone's maps have {list(widths)} channels."
    )


def _drop_unread_levels(neck: dict, positions: list[int]) -> list[int]:
    start = neck["start_level"]
    neck["in_channels"] = type(neck["in_channels"])(neck["in_channels"][start:])
    neck["start_level"] = 0
    if neck.get("end_level", -1) > 0:
        neck["end_level"] -= start
    return positions[start:]


def _segmentation_readers(model: dict, count: int) -> Iterator[Reader]:
    for name in SEGMENTATION_HEADS:
        part = model.get(name)
        for i, head in enumerate(as_list(part)):
            path = f"model.{name}[{i}]" if isinstance(part, (list, tuple)) else f"model.{name}"
            yield from _segmentation_head_readers(path, head, count)


def _segmentation_head_readers(path: str, head: dict, count: int) -> Iterator[Reader]:
    nested = head.get("kernel_generate_head")
    if nested:
        yield from _segmentation_head_readers(f"{path}.kernel_generate_head", nested, count)
    if "in_channels" not in head:
        return
    if type_name(head) == "EncHead" and not head.get("add_lateral") and "in_index" in head:
        # Without lateral connections it takes only the last of the maps that it is given.
        head.update({key: type(head[key])(head[key][-1:]) for key in ("in_channels", "in_index")})
    in_channels = head["in_channels"]
    if "in_index" not in head and isinstance(in_channels, (list, tuple)):
        yield Reader(path, head, "in_channels", list(range(count)))
        return
    index = head.get("in_index", -1)
    indices = as_list(index)
    if any(not -count <= i < count for i in indices):
        raise SwapRefusedError(f"{path}.in_index is {index}, but the old backbone returns {count} maps.")
    yield Reader(path, head, "in_channels", [i % count for i in indices], default_index=-1)
    if "c1_in_channels" in head:
        yield Reader(path, head, "c1_in_channels", [0])


def _detector_readers(model: dict, widths: Sequence[int]) -> Iterator[Reader]:
    everything = list(range(len(widths)))
    for name, head in model.items():
        if name.endswith("head") and isinstance(head, dict) and isinstance(head.get("in_channels"), (list, tuple)):
            yield Reader(f"model.{name}", head, "in_channels", everything)
    if len(widths) != 1:
        return
    if (model.get("roi_head") or {}).get("shared_head"):
        # The shared head is a stage of the old backbone: a projection gives it the width that it is built for.
        model["neck"] = dict(type="ChannelMapper", in_channels=[widths[0]], out_channels=widths[0], kernel_size=1)
        yield Reader("model.neck", model["neck"], "in_channels", [0])
        return
    for path, node, key in _single_map_fields(model):
        if node.get(key) == widths[0]:
            yield Reader(path, node, key, [0])


def _single_map_fields(model: dict) -> Iterator[tuple[str, dict, str]]:
    for name in ("rpn_head", "bbox_head", "mask_head"):
        for head in as_list(model.get(name)):
            yield f"model.{name}", head, "in_channels"
    for name, part in (model.get("roi_head") or {}).items():
        for node in as_list(part) if isinstance(part, (dict, list)) else []:
            if isinstance(node, dict):
                key = "out_channels" if name.endswith("extractor") else "in_channels"
                yield f"model.roi_head.{name}", node, key
