"""Several processes, and how they work without GPUs: MMEngine's own process group gives each of them a device."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.hooks import LoggerHook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets in the environment of each process."""


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """MMEngine's wrapper for a model on the CPU, which has no device to name."""

    def __init__(self, module: torch.nn.Module, device_ids: list[int] | None = None, **settings: Any):
        super().__init__(module=module, **settings)


def process_count(cfg: Config) -> int:
    """How many processes the config's launcher started."""
    variable = {"pytorch": "WORLD_SIZE", "slurm": "SLURM_NTASKS"}.get(cfg.get("launcher", "none"), "")
    return int(os.environ.get(variable, "1"))


def use_cpus(cfg: Config) -> None:
    """Makes a config's processes train on the CPU; changes it in place.

    Raises:
        ValueError: this process was not started by torchrun.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"launcher 'pytorch' without {', '.join(missing)} in the environment: start the processes with "
            "tools/dist_train.sh or tools/dist_test.sh, or leave --launcher out for a single one."
        )
    # What MMEngine passes where the config has nothing.
    settings = dict(broadcast_buffers=False, find_unused_parameters=bool(cfg.get("find_unused_parameters")))
    settings = dict(cfg.get("model_wrapper_cfg") or settings)
    cfg.model_wrapper_cfg = settings | dict(type=CPUDistributedDataParallel.__name__)


def join_on_cpus(cfg: Config) -> None:
    """If `use_cpus` was called, joins the process group, which MMEngine then finds. Waits for the other processes."""
    wrapper = (cfg.get("model_wrapper_cfg") or {}).get("type")
    if wrapper == CPUDistributedDataParallel.__name__ and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")


def let_first_write_metrics(runner: Runner) -> None:
    """Makes only the first process write the metrics of a test, before the Runner's `test` is called.

    MMEngine's hook writes them from all processes, at once and into one file, but with each one's own durations: where
    these differ in length, the end of the longer text is left after the shorter one, and the file is not JSON.
    """
    for hook in runner.hooks:
        if isinstance(hook, LoggerHook):
            hook.after_test_epoch = master_only(hook.after_test_epoch)  # type: ignore[method-assign]


def leave_group() -> None:
    """Leaves the process group, if there is one; to be called when the Runner has been dropped.

    A thread of gloo keeps its last reduction until the group ends, and needs Python to release it. If the interpreter
    simply exits, the process aborts in about one of four cases (PyTorch 2.13). The group ends only when no
    DistributedDataParallel holds it: hence the garbage collection, since a Runner refers to itself.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
