"""Misspelt fields that nothing declares: those of a model's `train_cfg` and `test_cfg`, and of their samplers.

Detectors, segmentors and their heads ask these for fields by name, many with a default where there is none: a misspelt
`nms_pre` is a default, silently. What a model's classes ask for stands in their sources.
"""

import inspect
import itertools
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NoReturn

from mmengine.registry import MODELS, TASK_UTILS

from nat_dense.mm.errors import nearly
from nat_dense.mm.fields import OF_ANY_OBJECT, class_of, dicts_in, is_foreign, parameters_of

_IS_FREE = re.compile(r"(train|test)_cfg$")
"""Whether the place of a part of a model is one whose fields are free."""

_IN_FREE = re.compile(r"(train|test)_cfg(\.|$)")
"""Whether it is one, or lies in one."""

USUAL = ("debug", "mask_size")
"""Fields of all MMDetection's configs: the first has no use any more, a module of functions asks for the second."""

_ASKED = re.compile(
    r"""cfg((?:\.(?:get|pop)\(\s*['"]\w+['"][^)]*\)|\.\w+|\[['"]\w+['"]\])+)  # cfg.rpn.get("nms_pre", -1)
    | ['"](\w+)['"]\s+(?:not\s+)?in\s+\S*cfg\b                             # "nms_pre" in cfg""",
    re.VERBOSE,
)
"""What is asked of a config that is called so."""

_WORDS = re.compile(r"['\"](\w+)['\"]|\.(\w+)")
"""All that could be asked for, whatever the config is called where it is."""


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
        if _IN_FREE.search(name) and inspect.isclass(cls) and not is_foreign(cls):
            _check_parameters(name, node, parameters_of(cls))
    free = list(_free(model))
    notes: list[str] = []
    if not free:
        return notes
    asked, words = _asked_for(cls for _, _, cls in classes if inspect.isclass(cls))
    foreign = any(is_foreign(cls) for _, _, cls in classes if inspect.isclass(cls))
    for name, node in free:
        strangers = [field for field in node if field not in words and field not in USUAL]
        if not _IS_FREE.search(name) and not asked.intersection(node):  # it is handed on as a whole
            continue
        for field in strangers:
            close = nearly(field, asked)
            if close and not foreign:
                _refuse(name, field, close)
            hint = f" Is {close!r} meant?" if close else ""
            notes.append(f"{name}.{field}: the classes of this model ask for no field of this name.{hint}")
    return notes


def _check_parameters(name: str, node: dict, known: Collection[str]) -> None:
    """Of a class that takes any field, which its registry hands over."""
    for field in node:
        if field not in known and field not in OF_ANY_OBJECT and (close := nearly(field, known)):
            _refuse(name, field, close)


def _refuse(name: str, field: str, close: str) -> NoReturn:
    raise ValueError(f"{name}: nothing asks for a field {field!r}. Did you mean {close!r}?")


def _asked_for(classes: Iterable[type]) -> tuple[set[str], set[str]]:
    """What the modules of these classes, and of their base classes, ask any config for; and all that they name."""
    asked: set[str] = set()
    words: set[str] = set()
    for module in {base.__module__ for cls in classes for base in cls.__mro__}:
        try:
            source = inspect.getsource(sys.modules[module])
        except (OSError, TypeError):  # built in, or without source
            continue
        for chain, word in _ASKED.findall(source):
            asked.update(re.findall(r"\w+", chain), filter(None, [word]))
        words.update(filter(None, itertools.chain(*_WORDS.findall(source))))
    return asked, words | asked


def _free(model: dict) -> Iterator[tuple[str, dict]]:
    """A model's dicts without a type that are a `train_cfg` or `test_cfg` or lie in one; and their places."""

    def enters(place: str, inner: Any) -> bool:
        return not (_IN_FREE.search(place) and ("type" in inner or place.endswith(".nms")))  # nms has a type if need be

    for name, node in dicts_in(model, "model", enters):
        if _IN_FREE.search(name) and "type" not in node and not name.endswith(".nms"):
            yield name, node
