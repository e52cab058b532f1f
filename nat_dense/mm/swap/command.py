"""The options `--backbone` and `--optimizer` of the command lines, and the files that tools/swap_backbone.py writes."""

from __future__ import annotations

import argparse
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from mmengine.config import Config

from nat_dense.files import atomic, check_free
from nat_dense.mm.config import load_config, merge_options
from nat_dense.mm.keys import OLD_KEYS
from nat_dense.mm.swap.changes import as_text, changes_between, differences
from nat_dense.mm.swap.plan import BACKBONES, plan_swap
from nat_dense.mm.swap.training import use_adamw


def add_swap_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--backbone` and `--optimizer` to a command line that has a `config`."""
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        help="put another backbone under the model: FAMILY-ARCH with one of "
        + "; ".join(f"{family}: {archs}" for family, archs in _archs().items()),
    )
    parser.add_argument("--optimizer", choices=["adamw"], help="train with the published AdamW settings")


def load_swapped(args: argparse.Namespace) -> Config:
    """The config that a command line names: read, then `--backbone` and `--optimizer`, then `--cfg-options`.

    What the first two change is printed.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: As `load_config` and `plan_swap`.
    """
    cfg = load_config(args.config)
    notes, changes = [], None
    if args.backbone:
        swap = plan_swap(cfg, args.backbone, args.optimizer)
        cfg, changes, notes = swap.cfg, swap.changes, swap.notes
    elif args.optimizer:
        original = load_config(args.config)
        notes = use_adamw(cfg)
        changes = list(changes_between(original._cfg_dict, cfg._cfg_dict))
    if changes is not None:
        print(as_text(changes), flush=True)
    notes += merge_options(cfg, args.cfg_options)
    for note in notes:
        print(f"note: {note}", flush=True)
    return cfg


def check_new_config(out: Path, overwrite: bool) -> None:
    """Checks that a config can be written.

    Raises:
        OSError: the file or folder exists.
        ValueError: the name is not that of a config in Python.
    """
    if out.suffix != ".py":
        raise ValueError(f"{out}: expected a name that ends in .py")
    check_free(out, overwrite)


def write_expanded(cfg: Config, out: Path) -> None:
    """Writes a whole config that inherits from nothing, so that any tool can read it anywhere.

    What its files import stays out, as do variables that would pass for settings of older releases.

    Raises:
        ValueError: A value can't be written down as text.
    """
    imported = {key for key, value in cfg._cfg_dict.items() if callable(value)}
    whole = Config({key: value for key, value in cfg.to_dict().items() if key not in imported.union(OLD_KEYS)})
    _write(whole.pretty_text, out, whole)


def write_inheriting(cfg: Config, config: str, out: Path) -> None:
    """Writes only what differs from the config that it came from.

    Args:
        cfg: The new config.
        config: The old one, as the command line named it.
        out: The file to write.

    Raises:
        ValueError: MMEngine by itself can't find the old config, or a value can't be written down as text.
    """
    base = _base_path(config, out)
    changed = Config(differences(load_config(config)._cfg_dict, cfg._cfg_dict))
    _write(f"_base_ = {base!r}\n{changed.pretty_text}", out, cfg)


def _archs() -> dict[str, str]:
    families = sorted({name.partition("-")[0] for name in BACKBONES}, key=len)
    return {
        family: ", ".join(name.partition("-")[2] for name in BACKBONES if name.partition("-")[0] == family)
        for family in families
    }


def _base_path(config: str, out: Path) -> str:
    if "::" not in config:
        return Path(os.path.relpath(config, out.parent)).as_posix()
    if config.startswith("mmseg::"):
        try:
            distribution("mmsegmentation")
        except PackageNotFoundError:
            raise ValueError(
                f"--inherit: MMEngine finds {config!r} only if the distribution is called mmsegmentation, which the "
                "installed one is not; leave --inherit out to write the whole config."
            ) from None
    return config


def _write(text: str, out: Path, cfg: Config) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out, out.suffix) as draft:  # beside it: its base is found by a relative path
        draft.write_text(text, encoding="utf-8")
        try:
            written = _without_scopes(Config.fromfile(str(draft), import_custom_modules=False)._cfg_dict)
        except NameError as error:  # as of `nan` and `inf`
            raise ValueError(f"a value can't be written down as text: {error}.") from None
        unequal = [change.path for change in changes_between(_without_scopes(cfg._cfg_dict), written)]
        if unequal:
            raise ValueError(f"these fields can't be written down as text: {', '.join(unequal)}.")


def _without_scopes(value: Any) -> Any:
    """Without the `_scope_` that MMEngine adds to what a config inherits from `mmdet::`."""
    if isinstance(value, dict):
        return {key: _without_scopes(field) for key, field in value.items() if key != "_scope_"}
    return type(value)(map(_without_scopes, value)) if isinstance(value, (list, tuple)) else value
