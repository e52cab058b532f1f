"""Reading configs: files, and those that MMDetection and MMSegmentation ship (`mmdet::...`, `mmseg::...`)."""

from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import import_modules_from_strings

from nat_dense.mm.errors import describe
from nat_dense.mm.fields import as_list
from nat_dense.mm.keys import check_option_names, note_of_new_key

DISTRIBUTIONS = {"mmdet": "onedl-mmdetection", "mmseg": "onedl-mmsegmentation"}
"""The library behind each scope, by the name it is installed under."""

CONFIG_SUFFIXES = (".py", ".yml", ".yaml", ".json")
"""The file name suffixes of configs that MMEngine reads."""

LOADERS = {"train": ("train_dataloader", "val_dataloader"), "test": ("test_dataloader",)}
"""The dataloaders that a training and a test use."""


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
    notes = check_option_names(cfg, options)
    notes += filter(None, (note_of_new_key(cfg, option) for option in options))
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
