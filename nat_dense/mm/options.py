"""What the command lines' options change in a config."""

import argparse
from pathlib import Path

from mmengine.config import Config, ConfigDict, DictAction

from nat_dense.files import check_can_be_folder, check_empty_folder
from nat_dense.mm.config import evaluators
from nat_dense.mm.errors import naming
from nat_dense.mm.fields import is_of, type_name
from nat_dense.mm.pipelines import datasets_of, is_wrapper
from nat_dense.mm.processes import process_count

FLIP_META = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")
"""What MMDetection's test-time augmentation needs to know of each view to merge it."""


class KeyValues(DictAction):
    """`--cfg-options KEY=VALUE ...`, as MMEngine reads it; what has no value is a usage error."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in [values] if isinstance(values, str) else values or ():
            if "=" not in value:
                raise argparse.ArgumentError(self, f"{value!r}: expected KEY=VALUE, without spaces around the =")
            key, _, given = value.partition("=")
            if given.startswith(("dict(", "{")):
                raise argparse.ArgumentError(
                    self, f"{key}: a dict can't be given here; set its fields, {key}.FIELD=VALUE"
                )
        super().__call__(parser, namespace, values, option_string)


def set_work_dir(cfg: Config, work_dir: str | None) -> None:
    """Chooses where a run writes: the option, else the config's own, else `work_dirs/` and the config's name."""
    cfg.work_dir = work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(cfg.filename).stem))


def set_resume(cfg: Config, resume: str | None) -> None:
    """`--resume`: "auto" resumes from the latest checkpoint in the work-dir, a path from that checkpoint."""
    if resume is not None:
        cfg.resume = True
        cfg.load_from = None if resume == "auto" else resume


def set_randomness(cfg: Config, seed: int | None, deterministic: bool) -> None:
    """`--seed` and `--deterministic`; what is not given stays as the config has it."""
    randomness = dict(cfg.get("randomness") or {})
    if seed is not None:
        randomness["seed"] = seed
    if deterministic:
        randomness["deterministic"] = True
    if randomness:
        cfg.randomness = randomness


def enable_amp(cfg: Config) -> None:
    """`--amp`: mixed precision with a dynamic loss scale.

    Raises:
        ValueError: the config's optimizer wrapper is neither the plain nor the mixed-precision one.
    """
    found = cfg.optim_wrapper.get("type")
    if found and not is_of(cfg.optim_wrapper, "mmengine", "OptimWrapper", "AmpOptimWrapper"):
        raise ValueError(
            f"--amp replaces OptimWrapper, but the config's optim_wrapper.type is {found!r}; set AMP in the config."
        )
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def enable_auto_scale_lr(cfg: Config) -> None:
    """`--auto-scale-lr`: scales the learning rate by the batch size over `auto_scale_lr.base_batch_size`.

    Raises:
        ValueError: the config doesn't say for which batch size its learning rate is.
    """
    if not (cfg.get("auto_scale_lr") or {}).get("base_batch_size"):
        raise ValueError(
            "--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=N) in the config: the batch size its lr is for."
        )
    cfg.auto_scale_lr.enable = True


def set_show_dir(cfg: Config, show_dir: str) -> None:
    """`--show-dir`: draws every tested image, prediction beside ground truth, into this directory.

    Raises:
        OSError: the directory holds something, is a file, or can't be created.
        ValueError: the config has no visualization hook to draw with, or there are several processes.
    """
    hook = (cfg.get("default_hooks") or {}).get("visualization")
    if hook is None:
        raise ValueError(
            "--show-dir needs default_hooks.visualization in the config (DetVisualizationHook or SegVisualizationHook)."
        )
    if process_count(cfg) > 1:
        raise ValueError(
            "--show-dir: only the first process draws, and only the images that it tests; test in one process."
        )
    with naming("--show-dir"):
        check_empty_folder(Path(show_dir))
    hook.draw = True
    folder = str(Path(show_dir).absolute())
    if type_name(hook) == "DetVisualizationHook":
        hook.test_out_dir = folder
    else:
        cfg.visualizer.vis_backends = [dict(type="LocalVisBackend", img_save_dir=folder)]


def set_out(cfg: Config, out: str) -> None:
    """`--out`: writes predictions, a pickle of MMDetection's results or a folder of MMSegmentation's index PNGs.

    Raises:
        OSError: the file exists, or the directory isn't empty or can't be written to.
        ValueError: the path doesn't fit the task, or no evaluator can be added to the config's.
    """
    written, own = evaluators(cfg, "test_dataloader"), cfg.get("test_evaluator")
    is_pickle = Path(out).suffix in (".pkl", ".pickle")
    if cfg.get("default_scope") == "mmseg":
        if is_pickle:
            raise ValueError(f"--out {out}: predictions of a segmentor are PNG files; give a directory.")
        with naming("--out"):
            check_empty_folder(Path(out))
        written[0].output_dir = out
    elif not is_pickle:
        raise ValueError(f"--out {out}: predictions of a detector are a pickle; give a .pkl file.")
    elif isinstance(own, dict) and type_name(own) not in ("", "Evaluator") and "metrics" in own:
        raise ValueError(
            f"--out {out}: {type_name(own)} has one metric per dataset, and takes none for the predictions on all of "
            "them; test the datasets separately."
        )
    elif Path(out).exists():
        raise FileExistsError(f"--out {out}: the file exists and is not overwritten; choose another name.")
    else:
        with naming("--out"):
            check_can_be_folder(Path(out).parent)
        written.append(dict(type="DumpDetResults", out_file_path=out))
        cfg.test_evaluator = written


def enable_tta(cfg: Config) -> list[str]:
    """`--tta`: test-time augmentation, by the config's recipe or, for detectors without one, with a horizontal flip.

    Returns:
        Notes for the user: MMDetection merges boxes only, so masks are left out.

    Raises:
        ValueError: the config has no recipe and its task no default, or a tested dataset has no pipeline.
    """
    notices = []
    named = datasets_of(cfg.test_dataloader.dataset, "test_dataloader.dataset")
    tested = [(name, config) for name, config in named if not is_wrapper(config)]
    for name, config in tested:
        if not config.get("pipeline"):
            raise ValueError(f"--tta: {name} has no pipeline to put the augmentation into.")
    has_recipe = cfg.get("tta_model") and cfg.get("tta_pipeline")
    if not has_recipe:
        if cfg.get("default_scope") != "mmdet":
            raise ValueError("--tta needs tta_model and tta_pipeline in the config.")
        nms = dict(type="nms", iou_threshold=0.5)
        cfg.tta_model = dict(type="DetTTAModel", tta_cfg=dict(nms=nms, max_per_img=100))
    for _, config in tested:
        config["pipeline"] = cfg.tta_pipeline if has_recipe else [*config["pipeline"][:-1], _flip_and_pack()]
    if type_name(cfg.tta_model) == "DetTTAModel":
        has_masks = bool(cfg.model.get("roi_head", {}).get("mask_head"))
        if has_masks:
            cfg.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
        for evaluator in evaluators(cfg, "test_dataloader"):
            if "segm" in (evaluator.get("metric") or []):
                has_masks = True
                evaluator.metric = "bbox"
        if has_masks:
            notices.append("--tta: MMDetection merges boxes only; masks are not evaluated.")
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    return notices


def _flip_and_pack() -> dict:
    flips = [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)]
    return dict(type="TestTimeAug", transforms=[flips, [dict(type="PackDetInputs", meta_keys=FLIP_META)]])
