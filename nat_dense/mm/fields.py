"""The fields of a config's objects: which there are, and which of a config's are none of them."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.registry import Registry
from mmengine.runner import Runner

from nat_dense.mm.errors import did_you_mean

PASSED_ON: dict[type, Callable] = {CheckpointHook: Runner.save_checkpoint}
"""Whom classes hand the fields to that they don't name."""


def class_of(node: dict, registry: Registry) -> Any:
    """What the `type` of a config stands for in the active scope, or None."""
    found = node.get("type")
    if not isinstance(found, str):
        return found
    with registry.switch_scope_and_registry(node.get("_scope_")) as scoped:
        return scoped.get(found)


def check_fields(name: str, owner: str, node: dict, known: Iterable[str]) -> None:
    """Checks a config against all the fields that there are; those that begin with an underscore are MMEngine's.

    Args:
        name: of the config, for the message.
        owner: what it configures.
        node: the config.
        known: the fields; `type` is always one.

    Raises:
        ValueError: another field is set.
    """
    for field in node:
        if field not in known and field != "type" and not field.startswith("_"):
            fields = ", ".join(dict.fromkeys(known)) or "none"
            raise ValueError(
                f"{name}: {owner} has no field {field!r}.{did_you_mean(field, known)} Its fields: {fields}."
            )


def fields_of(cls: Any) -> list[str] | None:
    """What a class can be built with, its base classes' too; None where nothing says what it makes of other names."""
    if not inspect.isclass(cls):
        return None
    constructors = [vars(base)["__init__"] for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    names: list[str] = []
    for constructor in constructors:
        found, is_open = _parameters(constructor)
        names += found
        if not is_open:
            return names
    for owner, function in PASSED_ON.items():
        if issubclass(cls, owner):
            return names + _parameters(function)[0]
    return None if constructors else names


def _parameters(function: Callable) -> tuple[list[str], bool]:
    """Names of a method's parameters, and whether it takes any others."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"]
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)
