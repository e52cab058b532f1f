"""Finds the part of a model's config that can't be built; MMEngine names the type or the field, but not its place."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.registry import MODELS, TASK_UTILS

from nat_dense.mm.errors import describe
from nat_dense.mm.fields import check_fields, class_of, dicts_in, fields_of, known_class

OF_NO_REGISTRY = ("init_cfg", "nms", "roi_layer")
"""Parts of models whose types are functions, or which are built later."""


LAYERS = ("norm_cfg", "conv_cfg", "act_cfg", "upsample_cfg")
"""How the names of the parts end that MMCV builds layers from."""


@contextmanager
def naming_parts(model: dict) -> Iterator[None]:
    """If the block fails to build this model, says which part of its config is at fault, where that is known.

    Raises:
        ValueError: the block raised any exception.
    """
    try:
        yield
    except Exception as error:  # constructors raise what they like
        _blame_part(model, str(error.args[0]) if error.args else "")
        raise ValueError(f"model: {describe(error)}") from error


def _blame_part(model: dict, message: str) -> None:
    """Raises ValueError if a part has the type that was not found, or the field that was not expected."""
    registry = TASK_UTILS if "task util" in message else MODELS
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", message)
    for name, node in parts_of(model):
        cls = class_of(node, MODELS) or class_of(node, TASK_UTILS)
        if cls is None and _says_unknown(message, name, node["type"]):
            known_class(name, node, registry)
        known = fields_of(cls)
        if unexpected and unexpected[1] in node and known is not None:
            check_fields(name, cls.__name__, [unexpected[1]], known)


def _says_unknown(message: str, name: str, given: Any) -> bool:
    """Whether a message is MMEngine's, which names the type, or MMCV's about a layer, which doesn't."""
    return message.startswith(f"{given} is not in the ") or (
        message.startswith("Cannot find None in registry") and name.endswith(LAYERS)
    )


def parts_of(model: dict) -> Iterator[tuple[str, dict]]:
    """The parts of a model that have a type, with their places; not those that no registry builds."""
    for name, node in dicts_in(model, "model", lambda place, _: _is_built(place)):
        if "type" in node and _is_built(name):
            yield name, node


def _is_built(place: str) -> bool:
    return place.rpartition(".")[2] not in OF_NO_REGISTRY
