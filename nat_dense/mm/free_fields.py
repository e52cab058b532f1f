"""Misspelt fields that nothing declares: those of a model's `train_cfg` and `test_cfg`, and of their samplers.

Detectors, segmentors and their heads ask these for fields by name, many with a default where there is
none: a misspelt `nms_pre` is a default, silently. What a model's classes ask for stands in their sources.
"""

import inspect
import re
import sys
from collections.abc import Collection, Iterable, Iterator

from mmengine.registry import MODELS, TASK_UTILS

from nat_dense.mm.errors import nearly
from nat_dense.mm.fields import OF_ANY_OBJECT, class_of, dicts_in, parameters_of

_IN_FREE = re.compile(r"(train|test)_cfg(\.|$)")
"""Whether the place of a part of a model is, or lies in, one whose fields are free."""

USUAL = (".debug", ".mask_size")
"""Fields of all MMDetection's configs: the first has no use any more, a module of functions asks for the second."""

_ASKED = re.compile(
    r"""cfg(?:\.get\(\s*|\.pop\(\s*|\[)['"](\w+)['"]  # cfg.get("nms_pre", -1), cfg["nms_pre"]
    | cfg\.(\w+)\b(?!\s*\()                           # cfg.nms_pre
    | ['"](\w+)['"]\s+(?:not\s+)?in\s+\S*cfg\b        # "nms_pre" in cfg""",
    re.VERBOSE,
)


def check_free_fields(model: dict, parts: Iterable[tuple[str, dict]]) -> list[str]:
    """Checks that what `train_cfg` and `test_cfg` hold isn't what a model's classes ask for, misspelt.

    Args:
        model: the model's config.
        parts: its objects, and where they stand in it.

    Returns:
        A sentence for the user about each field that none of these classes asks for by name.

    Raises:
        ValueError: one of these is so like a field that they do ask for that this may be meant.
    """
    classes = [(name, node, class_of(node, MODELS) or class_of(node, TASK_UTILS)) for name, node in parts]
    for name, node, cls in classes:
        if _IN_FREE.search(name) and inspect.isclass(cls):
            _strangers(name, node, parameters_of(cls))
    free = list(_free(model))
    asked = _asked_for(cls for _, _, cls in classes if inspect.isclass(cls)) if free else set()
    strangers = [f"{name}.{field}" for name, node in free for field in _strangers(name, node, asked)]
    return [
        f"{place}: the classes of this model ask for no field of this name."
        for place in strangers
        if not place.endswith(USUAL)
    ]


def _strangers(name: str, node: dict, known: Collection[str]) -> list[str]:
    """The fields that are not known, of which none may be like one that is."""
    strangers = [field for field in node if field not in known and field not in OF_ANY_OBJECT]
    for field in strangers:
        if close := nearly(field, known):
            raise ValueError(f"{name}: nothing asks for a field {field!r}. Did you mean {close!r}?")
    return strangers


def _asked_for(classes: Iterable[type]) -> set[str]:
    """The names that the modules of these classes, and of their base classes, ask any config for."""
    found: set[str] = set()
    for module in {base.__module__ for cls in classes for base in cls.__mro__}:
        try:
            source = inspect.getsource(sys.modules[module])
        except (OSError, TypeError):  # built in, or without source
            continue
        for match in _ASKED.finditer(source):
            found.update(filter(None, match.groups()))
    return found


def _free(model: dict) -> Iterator[tuple[str, dict]]:
    """A model's dicts without a type that are a `train_cfg` or `test_cfg` or lie in one; and their places."""
    for name, node in dicts_in(model, "model", lambda place, inner: not (_IN_FREE.search(place) and "type" in inner)):
        if _IN_FREE.search(name) and "type" not in node:
            yield name, node
