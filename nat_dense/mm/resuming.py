"""Resuming a run: from which checkpoint, with which settings, and without losing what is there."""

import re
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from torch import nn

from nat_dense.checkpoints import fetch, read
from nat_dense.files import check_can_be_folder
from nat_dense.mm.checkpoints import check_classes, check_fits, check_start
from nat_dense.mm.errors import naming
from nat_dense.mm.saved_settings import notes_of_settings

EXPERIMENT_TIME = re.compile(r"_\d{8}_\d{6}$")
"""MMEngine names an experiment after its config file and the time of its start."""

STEP = re.compile(r"(?:iter|epoch)_(\d+)\.pth")
"""How MMEngine names the checkpoints of a run."""


class StayInWorkDir(Hook):
    """Keeps a resumed run to its own folder, and its checkpoint to data."""

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Drops `meta.config`, which MMEngine's own checkpoints don't have, before MMEngine runs it as Python."""
        checkpoint.get("meta", {}).pop("config", None)

    def before_train(self, runner: Any) -> None:
        """Looks for the best checkpoint in the folder of this run.

        MMEngine notes its absolute path, and deletes that file when there is a better one: of a folder that was copied,
        or resumed into another, the original's.
        """
        outs = [hook.out_dir for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.out_dir]
        folder = Path(outs[0], Path(runner.work_dir).name) if outs else Path(runner.work_dir)
        noted = runner.message_hub.runtime_info
        for key in [key for key in noted if key.startswith("best_ckpt")]:
            path = str(noted[key])
            if "://" in path:
                continue
            if (here := folder / Path(path).name).is_file():
                noted[key] = str(here)
            else:
                del noted[key]


def latest_checkpoint(work_dir: str | Path, *, elsewhere: bool = False) -> Path | None:
    """The checkpoint that a run in this directory resumes from, or None.

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
        Notes for the user, such as that there is nothing to resume, or what of `load_from` is not used.

    Raises:
        FileNotFoundError: the checkpoint to resume or start from is gone.
        ValueError: the directory or the checkpoint belongs to another config or model, or a fresh run would overwrite
            checkpoints.
    """
    work_dir, resume, named = Path(cfg.work_dir), cfg.get("resume"), cfg.get("load_from")
    hook = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    for name, folder in (("work_dir", work_dir), ("default_hooks.checkpoint.out_dir", hook.get("out_dir"))):
        if folder and "://" not in str(folder):
            with naming(f"{name}={str(folder)!r}"):
                check_can_be_folder(Path(folder))
    present = sorted(path.name for path in work_dir.glob("*.pth"))
    if not resume:
        if present:
            raise ValueError(
                f"{_holding(work_dir, present)}, which a new run could overwrite. Resume it (--resume), or choose "
                "another --work-dir."
            )
        if not named:
            return []
        checkpoint = read(fetch(named), trust=trust)
        return check_start(model, checkpoint) + check_classes(cfg, "train_dataloader", checkpoint, keeps_order=False)
    if named and present and Path(named).resolve().parent != work_dir.resolve():
        raise ValueError(
            f"{_holding(work_dir, present)}, which a run resumed from {str(named)!r} could overwrite. Choose another "
            "--work-dir."
        )
    source = named or latest_checkpoint(work_dir, elsewhere=bool(hook.get("out_dir")))
    if source is None and present:
        raise ValueError(
            f"{_holding(work_dir, present)}, but no checkpoint named iter_N.pth or epoch_N.pth; pass one explicitly: "
            "--resume FILE."
        )
    if source is None:
        cfg.resume = False  # or MMEngine would look for itself, also elsewhere
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
    return [
        *check_fits(model, checkpoint),
        *check_classes(cfg, "train_dataloader", checkpoint),
        *notes_of_settings(cfg, checkpoint),
        *_notice_of_end(cfg, checkpoint.extras["meta"], source),
    ]


def _notice_of_end(cfg: Config, meta: dict, source: str) -> list[str]:
    loop = cfg.get("train_cfg") or {}
    unit, field = ("iter", "max_iters") if "max_iters" in loop else ("epoch", "max_epochs")
    done, whole = meta.get(unit), loop.get(field)
    if done is None or whole is None or done < whole:
        return []
    end = f"{source!r} is the end of its run ({unit} {done} of {whole})"
    return [
        f"{end}: nothing is left to train. With a larger train_cfg.{field} it continues at the learning rate at which "
        f"its schedules ended; a new run can start from its weights: --cfg-options load_from={source}."
    ]


def _holding(work_dir: Path, present: list[str]) -> str:
    return f"work-dir {str(work_dir)!r} already holds {len(present)} checkpoint(s), such as {present[0]!r}"


def _check_same_experiment(cfg: Config, experiment: str, source: str) -> None:
    found = EXPERIMENT_TIME.sub("", experiment)
    expected = cfg.get("experiment_name") or Path(cfg.filename or "").stem
    if found and expected and found != expected:
        raise ValueError(
            f"work-dir {cfg.work_dir!r} holds checkpoints of the config {found!r}, not of {expected!r}. Choose another "
            f"--work-dir, or, to resume from it on purpose, pass the file: --resume {source}"
        )
