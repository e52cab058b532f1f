"""The fields of a config's objects: which ones exist, and which ones in a config don't."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mmengine.hooks import CheckpointHook
from mmengine.registry import Registry
from mmengine.runner import Runner

from nat_dense.mm.errors import did_you_mean

PASSED_ON: dict[type, Callable] = {CheckpointHook: Runner.save_checkpoint}
"""Where classes pass the fields that they don't name themselves."""

LIBRARIES = ("mmengine", "mmcv", "mmdet", "mmseg", "nat_dense", "torch")
"""The libraries whose classes are known to do what is assumed here."""

OF_ANY_OBJECT = ("type", "_scope_")
"""Fields that any object may have; its registry reads them."""


def dicts_in(
    node: Any, name: str = "", enters: Callable[[str, Any], bool] = lambda place, node: True
) -> Iterator[tuple[str, dict]]:
    """Every dict in a part of a config, itself included, at any depth, and its place.

    Args:
        node: the part.
        name: its place, such as "model".
        enters: whether to look into a dict or list, given its place and itself.
    """
    if isinstance(node, dict):
        yield name, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    if children and enters(name, node):
        for key, child in children:
            yield from dicts_in(child, f"{name}.{key}", enters)


def as_list(part: Any) -> list[Any]:
    """A part of a config that may be absent, one thing or a list of them, as a list."""
    if part is None:
        return []
    return list(part) if isinstance(part, (list, tuple)) else [part]


def type_name(node: Mapping[str, Any]) -> str:
    """The name of the class that a part of a config names or holds, without its scope; empty if there is none."""
    found = node.get("type") or ""
    return (found if isinstance(found, str) else getattr(found, "__name__", "")).rpartition(".")[2]


def is_of(node: Mapping[str, Any], library: str, *names: str) -> bool:
    """Whether a part of a config has one of a library's classes, given with or without scope or as the class itself."""
    found = node.get("type")
    if isinstance(found, str):
        return found.removeprefix(f"{library}.") in names
    return getattr(found, "__name__", "") in names and _top(found) == library


def is_foreign(cls: Any) -> bool:
    """Whether a class is neither the libraries' nor ours."""
    return _top(cls) not in LIBRARIES


def _top(cls: Any) -> str:
    return getattr(cls, "__module__", "").partition(".")[0]


def default_loop(name: str, node: dict) -> dict:
    """The config of a loop, such as "train_cfg", with the type that the Runner uses if none is given."""
    if name == "train_cfg":
        usual = "EpochBasedTrainLoop" if node.get("by_epoch", True) else "IterBasedTrainLoop"
    else:
        usual = "ValLoop" if name == "val_cfg" else "TestLoop"
    return {"type": usual, **node}


def class_of(node: dict, registry: Registry) -> Any:
    """What the `type` of a config stands for in the active scope, or None."""
    found = node.get("type")
    if not isinstance(found, str):
        return found
    with registry.switch_scope_and_registry(node.get("_scope_")) as scoped:
        return scoped.get(found)


def check_node(name: str, node: dict, registry: Registry, others: Iterable[str] = ()) -> Any:
    """Checks the type and the fields of a config.

    Args:
        name, node, others: As in `check_object`.
        registry: where its `type` is looked up.

    Returns:
        What its `type` stands for.

    Raises:
        ValueError: there is no such type, or it has no such field.
    """
    cls = known_class(name, node, registry)
    check_object(name, node, cls, others)
    return cls


def known_class(name: str, node: dict, registry: Registry) -> Any:
    """What the `type` of the config of this name stands for in the active scope.

    Raises:
        ValueError: there is no such type, or it is neither a name nor a class.
    """
    kind, given = registry.name.replace("_", " "), node.get("type")
    if given is None or given == "":
        raise ValueError(f"{name} has no type: expected the {kind}'s name")
    if not isinstance(given, str) and not callable(given):
        raise ValueError(f"{name}: type={given!r}: expected the {kind}'s name, or its class")
    cls = class_of(node, registry)
    if cls is None:
        others = [f"{scope}.{key}" for scope, part in registry.children.items() for key in part.module_dict]
        with registry.switch_scope_and_registry(node.get("_scope_")) as scoped:
            known = [*scoped.module_dict, *registry.module_dict, *others]
        bare = str(given).rpartition(".")[2]
        same = [bare] * (bare in registry.module_dict) or [key for key in others if key.endswith(f".{given}")]
        hint = f" Did you mean {same[0]!r}?" if same else did_you_mean(str(given), known)
        raise ValueError(f"{name}: there is no {kind} {given!r}.{hint} Is it in custom_imports?")
    return cls


def check_object(name: str, node: dict, cls: Any, others: Iterable[str] = ()) -> None:
    """Checks the fields of a config against its class, if that names all that it can be built with.

    Args:
        name: of the config, for the message.
        node: the config.
        cls: what its `type` stands for.
        others: fields that are removed before it is built.

    Raises:
        ValueError: an unknown field is set, or a field is text where the class annotates numbers.
    """
    known = fields_of(cls)
    if known is not None:
        check_fields(name, cls.__name__, [field for field in node if field not in OF_ANY_OBJECT], [*known, *others])
    expected = _annotations(cls)
    for field, value in node.items():
        if field in expected and any(isinstance(v, str) for v in as_list(value)) and not _takes_text(expected[field]):
            raise ValueError(f"{name}.{field} is {value!r}: expected {_readable(expected[field])}, without quotes.")


def check_fields(name: str, owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Checks the fields that a config of this name gives `owner` against those that exist.

    Raises:
        ValueError: one doesn't exist.
    """
    for field in given:
        if field not in known:
            hint, fields = did_you_mean(field, known), ", ".join(dict.fromkeys(known)) or "none"
            raise ValueError(f"{name}: {owner} has no field {field!r}.{hint} Its fields: {fields}.")


def fields_of(cls: Any) -> list[str] | None:
    """What a class and its base classes can be built with; None if nothing says what they do with other names."""
    if not inspect.isclass(cls):
        return None
    constructors = _constructors(cls)
    names: list[str] = []
    for constructor in constructors:
        found, is_open = _parameters(constructor)
        names += found
        if not is_open:
            return names
        if _takes_from_the_rest(constructor):
            return None
    for owner, function in PASSED_ON.items():
        if issubclass(cls, owner):
            return names + _parameters(function)[0]
    return None if constructors else names


def parameters_of(cls: type) -> list[str]:
    """What the constructors of a class and of its base classes name, whatever else they take."""
    return [name for constructor in _constructors(cls) for name in _parameters(constructor)[0]]


def _constructors(cls: type) -> list[Callable]:
    return [vars(base)["__init__"] for base in cls.__mro__[:-1] if "__init__" in vars(base)]


def _takes_from_the_rest(constructor: Callable) -> bool:
    """Whether a constructor reads some of the fields that it doesn't name, besides passing them all on."""
    rest = next(p.name for p in inspect.signature(constructor).parameters.values() if p.kind is p.VAR_KEYWORD)
    try:
        return re.search(rf"\b{rest}\s*(\.(pop|get)\b|\[)", inspect.getsource(constructor)) is not None
    except (OSError, TypeError):  # without source
        return True


def _parameters(function: Callable) -> tuple[list[str], bool]:
    """Names of a method's parameters, and whether it takes any others."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"]
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _annotations(cls: Any) -> dict[str, Any]:
    """How a class annotates its fields; its own annotations take precedence over those of its base classes."""
    found: dict[str, Any] = {}
    for constructor in reversed(_constructors(cls)) if inspect.isclass(cls) else ():
        try:
            own = _parameters(constructor)[0]
            found = {field: kind for field, kind in found.items() if field not in own}
            found |= get_type_hints(constructor)
        except Exception:  # annotations may be any text, and name what only type checkers know
            continue
    return found


def _takes_text(kind: Any) -> bool:
    """Whether an annotation allows text, or may: only those made of numbers are known not to."""
    parts = [part for part in get_args(kind) if part is not Ellipsis]
    if parts:
        return get_origin(kind) is Literal or any(_takes_text(part) for part in parts)
    return kind not in (int, float, bool, complex, type(None))


def _readable(kind: Any) -> str:
    return kind.__name__ if inspect.isclass(kind) and not get_args(kind) else str(kind).replace("typing.", "")
