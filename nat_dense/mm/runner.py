"""From a config to a Runner that may start: the one way that every command takes."""

import os
import time
from pathlib import Path
from typing import Any, Literal

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer

from nat_dense.checkpoints import fetch, read
from nat_dense.checkpoints.download import check_source
from nat_dense.mm.checkpoints import check_classes, check_fits, refuse_pickled_code
from nat_dense.mm.config import LOADERS
from nat_dense.mm.data_checks import check_data, read_choices
from nat_dense.mm.fields import check_node
from nat_dense.mm.first_batch import TryValidation
from nat_dense.mm.keys import check_keys
from nat_dense.mm.machine import fit_to_machine, keep_freed_memory
from nat_dense.mm.model_checks import check_last_batch, check_model, fetch_initial_weights
from nat_dense.mm.options import enable_tta
from nat_dense.mm.pipelines import check_transforms
from nat_dense.mm.processes import join_on_cpus, let_first_write_metrics
from nat_dense.mm.resuming import StayInWorkDir, check_work_dir
from nat_dense.mm.training_checks import check_training


def build_runner(
    cfg: Config, mode: Literal["train", "test"] = "train", *, tta: bool = False, trust: bool = False
) -> Runner:
    """Checks a config, fits it to this machine and builds its Runner.

    Every check comes before the Runner, which is the first to write into `work_dir`. What the user should know is
    printed, one line each, before that.

    Args:
        cfg: a complete config with `work_dir`; changed in place by what the machine demands (`fit_to_machine`).
        mode: "train" checks the training and validation data and the work-dir; "test" the test data and that
            `load_from` fits.
        tta: whether to test with test-time augmentation.
        trust: whether the checkpoint of `load_from` or `resume` may run code.

    Returns:
        The Runner, to be called as `runner.train()`, which raises FirstBatchError where validation would fail, or
        `runner.test()`.

    Raises:
        FileNotFoundError: data, annotations or checkpoints are missing.
        ValueError: a part of the config, the data or the checkpoint is wrong.
    """
    refuse_pickled_code(trust=trust)
    init_default_scope(cfg.get("default_scope", "mmengine"))
    training = mode == "train"
    if cfg.get("load_from"):
        check_source(cfg.load_from)  # it is read after the data, which takes longer to check
    notices = check_keys(cfg) + fit_to_machine(cfg, training=training)
    if training and get_device() == "cpu":
        keep_freed_memory()
    model, warnings = check_model(cfg, training=training)
    notices += warnings
    if training:
        notices += check_training(cfg, model)
    if tta:
        check_transforms(cfg.get("tta_pipeline") or [], "tta_pipeline")
        if cfg.get("tta_model"):
            check_node("tta_model", cfg.tta_model, MODELS)
    notices += check_data(cfg, tuple(name for name in LOADERS[mode] if cfg.get(name)))
    if training:
        check_last_batch(cfg, model)
        notices += check_work_dir(cfg, model, trust=trust)
        fetch_initial_weights(model)
    elif cfg.get("load_from"):
        cfg.load_from = str(fetch(cfg.load_from))
        checkpoint = read(cfg.load_from, trust=trust)
        notices += check_fits(model, checkpoint) + check_classes(cfg, "test_dataloader", checkpoint)
    del model
    if tta:
        notices += enable_tta(cfg)
    # Every process of a launcher checks for itself; only the first one prints. The process group does not exist yet.
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        for notice in notices:
            print(f"note: {notice}", flush=True)
    cfg = _spare_config_file(cfg, training)
    _name_visualizer(cfg)
    join_on_cpus(cfg)
    runner: Any = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    runner.register_hook(StayInWorkDir())
    if training and read_choices(cfg)["validation"] == "try":
        runner.register_hook(TryValidation())
    let_first_write_metrics(runner)
    return runner


def _spare_config_file(cfg: Config, training: bool) -> Config:
    """Makes MMEngine name the expanded config after the time if it would overwrite another one.

    That is the user's own, if it lies in the work-dir, or, in testing, the one that a training left there.
    """
    in_work_dir = cfg.filename and Path(cfg.filename).resolve().parent == Path(cfg.work_dir).resolve()
    if not cfg.filename or (training and not in_work_dir):
        return cfg
    experiment = cfg.get("experiment_name") or Path(cfg.filename).stem
    return Config(cfg.to_dict() | dict(experiment_name=experiment))


def _name_visualizer(cfg: Config) -> None:
    """Gives the run a visualizer of its own.

    MMEngine keeps visualizers by name for the whole process: a second run would log into the first one's directory.
    """
    name = (cfg.get("visualizer") or {}).get("name")
    if name and Visualizer.check_instance_created(name):
        cfg.visualizer.name = f"{name}_{time.time_ns()}"
