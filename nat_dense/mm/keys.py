"""The keys of a config, and of `--cfg-options`, that nothing reads: MMEngine takes them for variables of the file."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from nat_dense.listing import listing
from nat_dense.mm.errors import did_you_mean, nearly
from nat_dense.mm.fields import dicts_in

OUR_KEYS = {"runner_type", "tta_model", "tta_pipeline", "data_checks"}
"""Top-level keys of a config that the tools read and that are not arguments of `Runner`."""

RUNNER_KEYS = {
    "activation_checkpointing",
    "compile",
    "custom_imports",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "init_weights_for_test_or_val",
    "model_wrapper_cfg",
    "strategy",
    "sync_bn",
}
"""Top-level keys of a config that MMEngine reads and that are not arguments of `Runner` either."""

PARTS = ("model", "train_dataloader", "val_dataloader", "test_dataloader", "default_hooks", "env_cfg", "data_checks")
"""Top-level keys whose values are dicts."""

OLD_KEYS = {
    "checkpoint_config": "default_hooks.checkpoint",
    "data": "train_dataloader, val_dataloader and test_dataloader",
    "evaluation": "val_evaluator and train_cfg.val_interval",
    "log_config": "default_hooks.logger and visualizer",
    "lr_config": "param_scheduler",
    "optimizer": "optim_wrapper.optimizer",
    "optimizer_config": "optim_wrapper.clip_grad",
    "resume_from": "load_from with resume=True",
    "runner": "train_cfg",
    "workflow": "train_cfg and val_cfg",
}
"""Top-level keys of MMDetection 2 and MMSegmentation 0, and what replaced them."""


def check_keys(cfg: Config) -> list[str]:
    """Checks a config's top-level keys; MMEngine takes one that it doesn't know for a variable of the file.

    Returns:
        Notes for the user on unused keys that are from older releases, or that look like one that MMEngine reads.

    Raises:
        ValueError: a value of the wrong kind, for example where a dict is expected.
    """
    for name in PARTS:
        if not isinstance(cfg.get(name) or {}, dict):
            raise ValueError(f"{name} is {cfg[name]!r}: expected a dict.")
    if not isinstance(cfg.get("work_dir", ""), (str, Path)):
        raise ValueError(f"work_dir is {cfg.work_dir!r}: expected a folder's name.")
    for place, node in dicts_in(cfg._cfg_dict):
        for field, value in node.items() if not place.startswith((".visualizer", ".vis_backends")) else ():
            if isinstance(value, str) and value in ("True", "False"):
                raise ValueError(f"{place}.{field}"[1:] + f" is the text {value!r}: write it without quotes.")
    read = _read_keys()
    rest = {name: value for name, value in cfg.items() if name in read}
    used = _names_used(cfg.text or "")
    notes = []
    for key, value in cfg.items():
        # What was made from a variable may be gone because another config changed it.
        if key in read or key in used or list(_places_of(value, key, rest)):
            continue
        if key in OLD_KEYS and value is not None:
            notes.append(f"{key!r} is a key from older releases that nothing reads any more; set {OLD_KEYS[key]}.")
        elif close := nearly(key, read):
            notes.append(f"nothing reads the config's {key!r}; did you mean {close!r}?")
    return notes


def _names_used(text: str) -> set[str]:
    """The variables that the text of a config and its bases reads; MMEngine puts a line with its name before each."""
    names: set[str] = set()
    for part in re.split(r"^\S*\.\w+\n", text, flags=re.MULTILINE):
        try:
            nodes = ast.walk(ast.parse(part))
        except SyntaxError:  # YAML or JSON, or a placeholder such as {{_base_.name}}
            names.update(re.findall(r"[=(\[,+*{:]\s*(?:_base_\.)?(\w+)\b(?!\s*=)", part))
            continue
        names.update(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return names


def _read_keys() -> set[str]:
    """The top-level keys that something reads."""
    return OUR_KEYS | RUNNER_KEYS | set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"}


def check_option_names(cfg: Config, options: dict[str, Any]) -> list[str]:
    """Refuses options that nothing reads; returns notes on those that only the user's own code can read."""
    read = _read_keys()
    rest = {name: value for name, value in cfg.items() if name in read}
    notes = []
    for option in options:
        key = option.split(".")[0]
        if key not in read and key not in cfg:
            hint = did_you_mean(key, {*cfg, *read})
            raise ValueError(f"--cfg-options {option}: the config has no key {key!r}.{hint}")
        if key in read:
            continue
        places = [place for place in _places_of(cfg[key], key, rest) if place not in options]
        if _is_copied(cfg[key], key, places):
            raise ValueError(
                f"--cfg-options {option}: {key!r} is a variable of the config file, and nothing reads it any more. Set "
                f"what was made from it: {listing(places)}."
            )
        notes.append(
            f"--cfg-options {option}: MMEngine doesn't read {key!r}; it has an effect only if your own code reads it."
        )
    return notes


def _is_copied(value: Any, key: str, places: list[str]) -> bool:
    """Whether a variable's value is in these places because they were made from it, and not by accident."""
    distinct = "/" in value if isinstance(value, str) else isinstance(value, (dict, list)) and bool(value)
    return bool(places) and (distinct or any(place.rpartition(".")[2] == key for place in places))


def _places_of(value: Any, key: str, node: Any, path: str = "") -> Iterator[str]:
    """Where a config has a variable's value, or a path that begins with it; numbers count only under their own name."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for name, child in children:
        below = f"{path}.{name}" if path else str(name)
        of_any_name = isinstance(value, (str, dict, list, tuple)) and bool(value)
        begins = isinstance(value, str) and "/" in value and isinstance(child, str) and child.startswith(value)
        if begins or (type(child) is type(value) and child == value and (of_any_name or name == key)):
            yield below
        else:
            yield from _places_of(value, key, child, below)


def note_of_new_key(cfg: Config, option: str) -> str | None:
    """A note if an option adds a key that looks like an existing one."""
    node: Any = cfg._cfg_dict
    for key in option.split("."):
        if not isinstance(node, dict):
            return None
        if key not in node:
            close = nearly(key, node)
            return f"--cfg-options {option} adds {key!r} beside {close!r}: is it misspelt?" if close else None
        node = node[key]
    return None
