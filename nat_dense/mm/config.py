"""Reading configs: files, and those that MMDetection and MMSegmentation ship (`mmdet::...`, `mmseg::...`)."""

import ast
import inspect
import re
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from nat_dense.listing import listing
from nat_dense.mm.errors import describe, did_you_mean, nearly
from nat_dense.mm.fields import as_list, dicts_in

DISTRIBUTIONS = {"mmdet": "onedl-mmdetection", "mmseg": "onedl-mmsegmentation"}
"""The library behind each scope, by the name it is installed under."""

CONFIG_SUFFIXES = (".py", ".yml", ".yaml", ".json")
"""The file name suffixes of configs that MMEngine reads."""

LOADERS = {"train": ("train_dataloader", "val_dataloader"), "test": ("test_dataloader",)}
"""The dataloaders that a training and a test use."""

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


def evaluators(cfg: Config, loader: str) -> list[Any]:
    """The evaluators that go with a dataloader: a config has one, a list of them (in MMEngine's Evaluator) or none."""
    found = cfg.get(loader.replace("dataloader", "evaluator")) or []
    return as_list(found["metrics"] if isinstance(found, dict) and "metrics" in found else found)


def model_of(cfg: Config) -> ConfigDict:
    """A config's model; raises ValueError if it has none."""
    if not cfg.get("model"):
        raise ValueError(f"{cfg.filename or 'the config'} has no model: expected a config of a detector or a segmentor")
    return cfg.model


def load_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Reads a config and merges the values of `--cfg-options` into it.

    Args:
        path: a file, or `mmdet::FOLDER/NAME.py` / `mmseg::FOLDER/NAME.py` for a config that the library ships.
        options: dotted keys and their new values, as `mmengine.DictAction` parses them.

    Returns:
        The merged config.

    Raises:
        FileNotFoundError: there is no such config; similar names are listed.
        ModuleNotFoundError: the library behind `mmdet::` or `mmseg::` is not installed.
        ValueError: an unknown scope, a file that is not a config or fails when it is run, or an option that
            `merge_options` refuses.
    """
    _find_libraries_by_module()
    file = _shipped_config(path) if "::" in path else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no config {path!r}.{_similar_files(file)}")
    if file.suffix not in CONFIG_SUFFIXES:
        raise ValueError(f"{path!r} is not a config: expected a name that ends in {', '.join(CONFIG_SUFFIXES)}")
    try:
        cfg = Config.fromfile(str(file))
    except Exception as error:  # it runs the file
        reason, _, _ = describe(error).partition(", the current sys.path is:")
        raise ValueError(f"{path!r} can't be read: {reason}") from error
    merge_options(cfg, options or {})
    return cfg


def merge_options(cfg: Config, options: dict[str, Any]) -> list[str]:
    """Merges the values of `--cfg-options` into a config, in place, and imports what they add to `custom_imports`.

    Returns:
        Notes for the user on new keys that look like existing ones, and on keys that MMEngine doesn't read.

    Raises:
        ImportError: there is no such module.
        ValueError: an option whose first key neither the config nor the Runner knows, that sets a field of
            something other than a dict, or that sets a variable of the file, which nothing reads any more.
    """
    notes = _check_option_names(cfg, options)
    notes += filter(None, (_note_of_new_key(cfg, option) for option in options))
    _open_parents(cfg, options)
    cfg.merge_from_dict(options)
    if any(option.split(".")[0] == "custom_imports" for option in options):
        import_modules_from_strings(**cfg.custom_imports)
    return notes


def _find_libraries_by_module() -> None:
    """Makes MMEngine find MMSegmentation's configs whatever the installed distribution is called.

    MMEngine looks for a distribution named `mmsegmentation`, which the maintained forks are not. Under the name of the
    module it falls back to the import system, which finds both. Configs with `_base_ = 'mmseg::...'` need it.
    """
    MODULE2PACKAGE["mmseg"] = "mmseg"


def _shipped_config(path: str) -> Path:
    scope, _, name = path.partition("::")
    if scope not in DISTRIBUTIONS:
        raise ValueError(f"{path!r}: unknown library {scope!r}; configs can be read from: {', '.join(DISTRIBUTIONS)}.")
    spec = find_spec(scope)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{path!r} is a config of {DISTRIBUTIONS[scope]}, which is not installed; `pip install "
            f"--no-build-isolation {DISTRIBUTIONS[scope]}` installs it."
        )
    return Path(spec.submodule_search_locations[0], ".mim", "configs", name)


def _similar_files(file: Path) -> str:
    folder = file.parent
    if not folder.is_dir():
        return f" There is no folder {str(folder)!r} either."
    close = get_close_matches(file.name, [entry.name for entry in folder.glob("*.py")], n=3)
    return f" In the same folder: {', '.join(close)}." if close else ""


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


def _check_option_names(cfg: Config, options: dict[str, Any]) -> list[str]:
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


def _open_parents(cfg: Config, options: dict[str, Any]) -> None:
    """Makes room for options that set fields of None, and refuses those that set fields of what can't have any.

    MMEngine refuses both, without naming the option.
    """
    earlier: dict[str, Any] = {}
    for option, value in options.items():
        node: Any = cfg._cfg_dict
        keys = option.split(".")
        earlier[option] = value
        for i, key in enumerate(keys):
            place, path = ".".join(keys[:i]), ".".join(keys[: i + 1])
            if isinstance(node, (list, tuple)):
                if not key.isdigit() or int(key) >= len(node):
                    raise ValueError(
                        f"--cfg-options {option}: {place} is a list; expected an index, 0 to {len(node) - 1}."
                    )
                node = node[int(key)]
            elif not isinstance(node, dict):
                raise ValueError(f"--cfg-options {option}: {place} is {node!r}, which has no fields to set.")
            elif path in earlier:  # a later option for the whole of it would win
                node = earlier[path]
            elif key not in node:
                break
            else:
                if node[key] is None:
                    node[key] = ConfigDict()
                node = node[key]


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


def _note_of_new_key(cfg: Config, option: str) -> str | None:
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
