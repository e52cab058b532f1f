"""What a resumed run takes from its checkpoint, whatever the config says: the optimizer's settings and the schedules.

MMEngine keeps the config of a run as text in its checkpoints. It is parsed, never run.
"""

import ast
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from nat_dense.checkpoints import Checkpoint
from nat_dense.mm.fields import as_list, type_name
from nat_dense.mm.swap.changes import changes_between

NAMES = {"optim_wrapper", "param_scheduler"}
"""The variables of a config that hold these settings."""

INTERCHANGEABLE = {"Adam", "AdamW"}
"""Optimizers that take over each other's state."""


def notes_of_settings(cfg: Config, checkpoint: Checkpoint) -> list[str]:
    """Reports settings that a resumed run doesn't take from the config.

    Args:
        cfg: the config.
        checkpoint: the one to resume from.

    Returns:
        Notes for the user; none if the checkpoint doesn't have its config.

    Raises:
        ValueError: an optimizer is another one, so its state can't be restored.
    """
    text = (checkpoint.extras.get("meta") or {}).get("cfg")
    before = _settings(text) if isinstance(text, str) else {}
    if not before:
        return []
    now = _settings(cfg.pretty_text)
    instead = f"To change it, start from the weights: --cfg-options load_from={checkpoint.path}."
    notes = []
    old, new = dict(_wrappers(before)), dict(_wrappers(now))
    for path in sorted(old.keys() & new.keys()):
        kinds = [_kind(wrapper["optimizer"]) for wrapper in (old[path], new[path])]
        if kinds[0] != kinds[1] and not set(kinds) <= INTERCHANGEABLE:
            raise ValueError(
                f"{str(checkpoint.path)!r} was trained with {kinds[0]}, but {path}.optimizer is {kinds[1]} now. Resume "
                "with the config (and --optimizer) that it was trained with, or start only from its weights: "
                f"--cfg-options load_from={checkpoint.path}."
            )
        notes += _notes_of_fields(old[path]["optimizer"], new[path]["optimizer"], f"{path}.optimizer", instead)
        if old[path].get("paramwise_cfg") != new[path].get("paramwise_cfg"):
            notes.append(
                f"{path}.paramwise_cfg has changed, but the resumed run keeps the old settings of each parameter "
                f"group, and fails if the groups differ. {instead}"
            )
    schedules = as_list(before.get("param_scheduler")), as_list(now.get("param_scheduler"))
    return notes + _notes_of_schedules(schedules[0], schedules[1], instead)


def _notes_of_fields(old: dict, new: dict, path: str, instead: str) -> list[str]:
    """Reports fields that differ, other than how the type is written."""
    return [
        f"{change.path} is {change.new!r} now, but the resumed run keeps its old value, {change.old!r}. {instead}"
        for change in changes_between(old | dict(type=""), new | dict(type=""), path)
    ]


def _notes_of_schedules(old: list[dict], new: list[dict], instead: str) -> list[str]:
    kinds = [[type_name(schedule) for schedule in schedules] for schedules in (old, new)]
    if kinds[0] != kinds[1]:
        return [
            f"param_scheduler was {kinds[0]} and is {kinds[1]} now: MMEngine loads the saved states in order, and "
            f"starts those that have none anew. {instead}"
        ]
    return [
        note
        for i, (before, now) in enumerate(zip(old, new, strict=True))
        for note in _notes_of_fields(before, now, f"param_scheduler.{i}", instead)
    ]


def _wrappers(settings: dict[str, Any]) -> Iterator[tuple[str, dict]]:
    """The wrapper of an optimizer, or those of several, with their places."""
    whole = settings.get("optim_wrapper")
    parts = whole.items() if isinstance(whole, dict) else ()
    for path, part in (("optim_wrapper", whole), *((f"optim_wrapper.{name}", part) for name, part in parts)):
        if isinstance(part, dict) and isinstance(part.get("optimizer"), dict):
            yield path, part


def _kind(optimizer: dict) -> str:
    kind = type_name(optimizer)
    return type_name(dict(type=optimizer.get("optimizer_type"))) if kind == "ZeroRedundancyOptimizer" else kind


def _settings(text: str) -> dict[str, Any]:
    """What the text of a config, as MMEngine writes it, says about optimizers and schedules."""
    try:
        statements = ast.parse(text).body
    except SyntaxError:  # not written by MMEngine, or holds what has no text
        return {}
    found: dict[str, Any] = {}
    for statement in statements:
        if isinstance(statement, ast.Assign):
            targets = {target.id for target in statement.targets if isinstance(target, ast.Name)}
            found |= {name: _value(statement.value) for name in targets & NAMES}
    return found


def _value(node: ast.expr) -> Any:
    """Dicts and lists as such, in whichever way they are written; of all else that isn't plain, its text."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        given = [_value(argument) for argument in node.args]
        named = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
        return {key: value for part in (*given, named) if isinstance(part, dict) for key, value in part.items()}
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element) for element in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
