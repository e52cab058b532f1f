"""Checkpoints around a Runner: read without running their code, fitting the model, and never overwritten."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from torch import nn

from nat_dense.checkpoints import Checkpoint, fetch, read, runner_files
from nat_dense.checkpoints.layout import unwrap
from nat_dense.checkpoints.origin import origin_of
from nat_dense.listing import listing
from nat_dense.models.backbone import NeighborhoodBackbone

EXPERIMENT_TIME = re.compile(r"_\d{8}_\d{6}$")
"""MMEngine names an experiment after its config file and the time of its start."""

STEP = re.compile(r"(?:iter|epoch)_(\d+)\.pth")
"""How MMEngine names the checkpoints of a run."""


class DropEmbeddedConfig(Hook):
    """Removes the config text from a loaded checkpoint: on resuming, MMEngine would run it as Python."""

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Drops `meta.config`, which MMEngine's own checkpoints don't have, before anything reads it."""
        checkpoint.get("meta", {}).pop("config", None)


def refuse_pickled_code(*, trust: bool = False) -> None:
    """Makes this process refuse checkpoints that hold more than data, whoever loads them.

    MMEngine falls back to full unpickling, which runs whatever code a file brings along. Its files and URLs go through
    `nat_dense.checkpoints` from now on; for every other `torch.load` an environment variable of PyTorch stops it.

    Args:
        trust: whether the files that MMEngine loads are exempt (`--trust`).

    Raises:
        ValueError: the environment demands the opposite.
    """
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        raise ValueError(
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, which lets checkpoints run code; unset it (nat_dense loads data "
            "only)."
        )
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    runner_files.install(trust=trust)


def check_fits(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Checks that a checkpoint holds every weight of a model, in its shape.

    Args:
        model: the model that the weights are for.
        checkpoint: what `nat_dense.checkpoints.read` returned.

    Returns:
        Warnings where the checkpoint holds more than the model needs, or was trained with other dilations.

    Raises:
        ValueError: weights are missing or have another shape; the first ones are named.
    """
    source = str(checkpoint.path)
    found, _ = unwrap(checkpoint.tensors)
    expected = model.state_dict()
    advice = "Use the config that it was trained with."
    unused = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    if missing and all(f"backbone.{name}" in expected for name in found):
        raise ValueError(f"{source!r} holds a backbone alone; expected the weights of the whole model.")
    if missing:
        instead = f", and has {unused[0]!r} instead" if unused else ""
        raise ValueError(
            f"{source!r} is of another model: it lacks {len(missing)} of {len(expected)} weights, such as "
            f"{missing[0]!r}{instead}. {advice}"
        )
    for name, weight in expected.items():
        if found[name].shape != weight.shape:
            raise ValueError(
                f"{source!r} is of another model: {name!r} has shape {tuple(found[name].shape)}, this config's model "
                f"needs {tuple(weight.shape)}. {advice}"
            )
    notices = (
        [f"{source!r}: {len(unused)} weights are not used by this model, such as {unused[0]!r}."] if unused else []
    )
    return notices + _notes_of_dilations(model, checkpoint)


def _notes_of_dilations(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Tells where a backbone of ours has other dilations than the weights were trained with, which fit all the same."""
    backbones = [module for module in model.modules() if isinstance(module, NeighborhoodBackbone)]
    origin = origin_of(checkpoint)
    if len(backbones) != 1 or origin is None:
        return []
    trained, ours = origin.resolved(backbones[0].depths), backbones[0].dilations
    if trained in (None, ours):
        return []
    return [
        f"{str(checkpoint.path)!r} was trained as {origin.family} with dilations {_readable(trained)}, and this model "
        f"has {_readable(ours)}: its results will be others."
    ]


def _readable(dilations: Sequence[Sequence[int]]) -> str:
    return str([list(row) for row in dilations])


def check_start(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Tells what weights to start from (`load_from`) leave untouched: MMEngine loads those that fit and goes on.

    Args:
        model: the model that the weights are for.
        checkpoint: what `nat_dense.checkpoints.read` returned.

    Returns:
        Sentences for the user, about weights that start afresh and about those that are not used.

    Raises:
        ValueError: no weight fits.
    """
    source = str(checkpoint.path)
    found, _ = unwrap(checkpoint.tensors)
    expected = model.state_dict()
    fresh = [name for name, value in expected.items() if name not in found or found[name].shape != value.shape]
    unused = [name for name in found if name not in expected]
    if len(fresh) == len(expected):
        raise ValueError(
            f"load_from={source!r}: none of its {len(found)} weights, such as {next(iter(found))!r}, is one of this "
            "model's. Weights of a backbone alone belong into model.backbone.init_cfg=dict(type='Pretrained', "
            "checkpoint=...)."
        )
    notices = [f"{len(fresh)} of {len(expected)} weights start afresh: {listing(fresh)}"] if fresh else []
    notices += [f"{len(unused)} of its weights are not used: {listing(unused)}"] if unused else []
    return [f"load_from={source!r}: {notice}." for notice in notices] + _notes_of_dilations(model, checkpoint)


def latest_checkpoint(work_dir: str | Path, *, elsewhere: bool = False) -> Path | None:
    """The checkpoint that a run in this directory goes on from, or None.

    MMEngine notes it in `last_checkpoint`, as an absolute path and after it has deleted an older one: the note can name
    a file of the directory that this one was copied from, or one that is gone. A file of that name here comes first,
    then the furthest one here.

    Args:
        work_dir: the directory.
        elsewhere: whether the run writes its checkpoints to another directory (`out_dir` of MMEngine's hook).
    """
    work_dir = Path(work_dir)
    note = work_dir / "last_checkpoint"
    noted = Path(note.read_text().strip()) if note.is_file() else None
    if noted and (work_dir / noted.name).is_file():
        return work_dir / noted.name
    if noted and elsewhere and noted.is_file():
        return noted
    steps = {int(found[1]): path for path in work_dir.glob("*.pth") if (found := STEP.fullmatch(path.name))}
    return steps[max(steps)] if steps else None


def check_work_dir(cfg: Config, model: nn.Module, *, trust: bool = False) -> list[str]:
    """Checks that a training run neither continues another config's run nor overwrites one.

    Args:
        cfg: the config of the run, with `work_dir`, `resume` and `load_from` set; to resume from the latest checkpoint,
            `load_from` is set to it.
        model: the model that the config builds.
        trust: whether the checkpoint may run code.

    Returns:
        Sentences for the user, such as that there is nothing to resume, or what of `load_from` is not used.

    Raises:
        FileNotFoundError: the checkpoint to resume or start from is gone.
        ValueError: the directory or the checkpoint belongs to another config or model, or a fresh run would overwrite
            checkpoints.
    """
    work_dir, resume, named = Path(cfg.work_dir), cfg.get("resume"), cfg.get("load_from")
    hook = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    for name, folder in (("work_dir", work_dir), ("default_hooks.checkpoint.out_dir", hook.get("out_dir"))):
        if folder and "://" not in str(folder):
            _check_can_be_folder(name, Path(folder))
    present = sorted(path.name for path in work_dir.glob("*.pth"))
    if not resume:
        if present:
            raise ValueError(
                f"{_holding(work_dir, present)}, that a new run could overwrite. Go on with it (--resume), or choose "
                "another --work-dir."
            )
        return check_start(model, read(fetch(named), trust=trust)) if named else []
    if named and present and Path(named).resolve().parent != work_dir.resolve():
        raise ValueError(
            f"{_holding(work_dir, present)}, that a run resumed from {str(named)!r} could overwrite. Choose another "
            "--work-dir."
        )
    source = named or latest_checkpoint(work_dir, elsewhere=bool(hook.get("out_dir")))
    if source is None and present:
        raise ValueError(
            f"{_holding(work_dir, present)}, but none that says how far it is (iter_N.pth, epoch_N.pth): name it, "
            "--resume FILE."
        )
    if source is None:
        return [f"Nothing to resume in {str(work_dir)!r}: training starts from the beginning."]
    source = cfg.load_from = str(source)
    checkpoint = read(fetch(source), trust=trust)
    if not {"meta", "optimizer"} <= set(checkpoint.extras):
        raise ValueError(
            f"{source!r} holds weights but no training state to resume; start from it with --cfg-options "
            f"load_from={source}."
        )
    if not named:
        _check_same_experiment(cfg, checkpoint.extras["meta"].get("experiment_name", ""), source)
    return check_fits(model, checkpoint) + _notice_of_end(cfg, checkpoint.extras["meta"], source)


def _check_can_be_folder(name: str, folder: Path) -> None:
    """Finds a folder that can't be written to, or made, before training."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{name}={str(folder)!r}: {str(nearest)!r} is a file; name a folder.")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"{name}={str(folder)!r}: {str(nearest)!r} may not be written to; name another folder.")


def _notice_of_end(cfg: Config, meta: dict, source: str) -> list[str]:
    loop = cfg.get("train_cfg") or {}
    unit, field = ("iter", "max_iters") if "max_iters" in loop else ("epoch", "max_epochs")
    done, whole = meta.get(unit), loop.get(field)
    if done is None or whole is None or done < whole:
        return []
    end = f"{source!r} is the end of its run ({unit} {done} of {whole})"
    return [f"{end}: nothing is left to train; raise train_cfg.{field}."]


def _holding(work_dir: Path, present: list[str]) -> str:
    return f"work-dir {str(work_dir)!r} already holds {len(present)} checkpoint(s), such as {present[0]!r}"


def _check_same_experiment(cfg: Config, experiment: str, source: str) -> None:
    found = EXPERIMENT_TIME.sub("", experiment)
    expected = cfg.get("experiment_name") or Path(cfg.filename or "").stem
    if found and expected and found != expected:
        raise ValueError(
            f"work-dir {cfg.work_dir!r} holds checkpoints of the config {found!r}, not of {expected!r}. Choose another "
            f"--work-dir, or, to go on with those weights on purpose, name the file: --resume {source}"
        )
