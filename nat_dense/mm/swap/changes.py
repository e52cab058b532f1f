"""What differs between two configs: as data, as text for people, and as a config of differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ABSENT = "(absent)"
SHOWN_CHARACTERS = 500


@dataclass(frozen=True)
class Change:
    """One field that differs.

    Attributes:
        path: Dotted, from the top of the config; places in lists are numbers.
        old, new: The values; `ABSENT` where there is none.
    """

    path: str
    old: Any
    new: Any


def changes_between(old: Any, new: Any, path: str = "") -> Iterator[Change]:
    """The fields that differ, depth first; a part whose `type` differs and all `custom_keys` count as one field."""
    same_kind = isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("type") == new.get("type")
    if same_kind and not path.endswith("custom_keys"):
        for key in [*old, *(key for key in new if key not in old)]:
            below = f"{path}.{key}" if path else key
            yield from changes_between(old.get(key, ABSENT), new.get(key, ABSENT), below)
    elif _are_parts(old) and _are_parts(new) and len(old) == len(new):
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from changes_between(before, after, f"{path}.{i}")
    elif old is not new and old != new:
        yield Change(path, old, new)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What a config that inherits from `old` must say to equal `new` (mmengine's `_base_` and `_delete_`)."""
    result: dict[str, Any] = {}
    for key, value in new.items():
        before = old.get(key, ABSENT)
        if before == value:
            continue
        if not (isinstance(value, Mapping) and isinstance(before, Mapping)):
            result[key] = value
        elif set(before) - set(value):
            result[key] = dict(_delete_=True, **value)
        else:
            result[key] = differences(before, value)
    return result


def as_text(changes: Sequence[Change]) -> str:
    """The changes, three lines each, long values cut; no line is broken, so paths and addresses stay whole."""
    return "\n".join(f"{c.path}\n    was {_short(c.old)}\n    is  {_short(c.new)}" for c in changes)


def _are_parts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(part, Mapping) for part in value)


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("type"), str):
        fields = ", ".join(f"{key}={_plain(field)!r}" for key, field in value.items() if key != "type")
        text = f"{value['type']}({fields})"
    else:
        text = str(value) if isinstance(value, str) else repr(_plain(value))
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _plain(value: Any) -> Any:
    """Plain dicts instead of mmengine's, whose text is longer."""
    if isinstance(value, Mapping):
        return {key: _plain(field) for key, field in value.items()}
    return type(value)(_plain(part) for part in value) if isinstance(value, (list, tuple)) else value
