"""Misspelt fields that nothing declares: those of a model's `train_cfg` and `test_cfg`, and of their samplers.

Detectors, segmentors and their heads read these fields by name, many with a default: a misspelt `nms_pre` silently
means the default. What a model's classes read is found in their sources.
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
"""Fields of all MMDetection's configs: the first is no longer used, a module of functions reads the second."""

_ASKED = re.compile(
    r"""cfg((?:\.(?:get|pop)\(\s*['"]\w+['"][^)]*\)|\.\w+|\[['"]\w+['"]\])+)  # cfg.rpn.get("nms_pre", -1)
    | ['"](\w+)['"]\s+(?:not\s+)?in\s+\S*cfg\b                             # "nms_pre" in cfg""",
    re.VERBOSE,
)
"""What is read from a config with a name like `cfg`."""

_WORDS = re.compile(r"['\"](\w+)['\"]|\.(\w+)")
"""All that could be read, whatever name the config has there."""


def check_free_fields(model: dict, parts: Iterable[tuple[str, dict]]) -> list[str]:
    """Checks `train_cfg` and `test_cfg` for misspellings of fields that a model's classes read.

    Args:
        model: the model's config.
        parts: its objects, with their places in it.

    Returns:
        A note for the user on each field that none of these classes reads by name.

    Raises:
        ValueError: one of these is so close to a field that they do read that it may be a misspelling.
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
            hint = f" Did you mean {close!r}?" if close else ""
            notes.append(f"{name}.{field}: no class of this model reads a field of this name.{hint}")
    return notes


def _check_parameters(name: str, node: dict, known: Collection[str]) -> None:
    """Checks the fields of a class that accepts any from its registry."""
    for field in node:
        if field not in known and field not in OF_ANY_OBJECT and (close := nearly(field, known)):
            _refuse(name, field, close)


def _refuse(name: str, field: str, close: str) -> NoReturn:
    raise ValueError(f"{name}: nothing reads a field {field!r}. Did you mean {close!r}?")


def _asked_for(classes: Iterable[type]) -> tuple[set[str], set[str]]:
    """What the modules of these classes and of their base classes read from any config; and all that they name."""
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
