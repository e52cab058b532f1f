"""Reading configs: files, and those that MMDetection and MMSegmentation ship (`mmdet::...`, `mmseg::...`)."""

import inspect
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import Runner

from nat_dense.mm.errors import did_you_mean

DISTRIBUTIONS = {"mmdet": "onedl-mmdetection", "mmseg": "onedl-mmsegmentation"}
"""The library behind each scope, by the name it is installed under."""

OUR_KEYS = {"runner_type", "tta_model", "tta_pipeline", "data_checks"}
"""Top-level keys of a config that the tools read and that are no argument of `Runner`."""


def evaluators(cfg: Config, loader: str) -> list[Any]:
    """The evaluators that go with a dataloader: a config has one, a list of them or none."""
    found = cfg.get(loader.replace("dataloader", "evaluator")) or []
    return list(found) if isinstance(found, (list, tuple)) else [found]


def load_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Reads a config and merges the values of `--cfg-options` into it.

    Args:
        path: a file, or `mmdet::FOLDER/NAME.py` / `mmseg::FOLDER/NAME.py` for a config that the library ships.
        options: dotted keys and their new values, as `mmengine.DictAction` parses them.

    Returns:
        The merged config.

    Raises:
        FileNotFoundError: there is no such config; names that come close are listed.
        ModuleNotFoundError: the library behind `mmdet::` or `mmseg::` is not installed.
        ValueError: an unknown scope, or an option whose first key neither the config nor the Runner knows.
    """
    _find_libraries_by_module()
    file = _shipped_config(path) if "::" in path else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no config {path!r}.{_similar_files(file)}")
    cfg = Config.fromfile(str(file))
    merge_options(cfg, options or {})
    return cfg


def merge_options(cfg: Config, options: dict[str, Any]) -> None:
    """Merges the values of `--cfg-options` into a config, in place.

    Raises:
        ValueError: an option whose first key neither the config nor the Runner knows, or that sets a field of what is
            no dict.
    """
    _check_option_names(cfg, options)
    try:
        cfg.merge_from_dict(options)
    except TypeError as error:  # MMEngine's names no option
        fields = ", ".join(key for key in options if "." in key)
        raise ValueError(f"--cfg-options: one of {fields} is a field of what is None or no dict ({error}).") from error


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


def _check_option_names(cfg: Config, options: dict[str, Any]) -> None:
    known = set(cfg) | OUR_KEYS | set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"}
    for option in options:
        key = option.split(".")[0]
        if key not in known:
            raise ValueError(f"--cfg-options {option}: the config has no key {key!r}.{did_you_mean(key, known)}")
