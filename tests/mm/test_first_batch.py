"""What would fail at the first validation fails before training, which otherwise goes as it would without the trial."""

import copy
import os
import random
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS, LOOPS, METRICS, TRANSFORMS
from mmengine.runner import IterBasedTrainLoop, ValLoop
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset

from nat_dense.mm.config import load_config
from nat_dense.mm.errors import describe, place_of
from nat_dense.mm.first_batch import FirstBatchError, first_batch_errors
from nat_dense.mm.runner import build_runner
from tests.mm.small import (
    DETECTOR,
    SEGMENTOR,
    ade_options,
    coco_options,
    load_tool,
    parse_options,
    scalars,
    write_ade,
    write_coco,
)


def fails(config: str, options: list[str], tmp_path, capsys) -> str:
    """What train.py says of a validation that fails; nothing may have been trained."""
    with pytest.raises(SystemExit, match="2"):
        load_tool("train").main([config, "--work-dir", str(tmp_path / "run"), "--cfg-options", *options])
    assert not list((tmp_path / "run").rglob("*.pth"))
    assert not list((tmp_path / "run").rglob("scalars.json"))
    line, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert line.startswith("train.py: error: the first validation batch, tried before training, fails: ")
    assert line.endswith("(--cfg-options data_checks.validation=none skips this trial)")
    assert hint == "(traceback: NAT_DENSE_DEBUG=1)"
    return line


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.test_cfg.mode=slied", "test mode are supported, but got slied"),
        ("model.test_cfg.mode=slide", "stride"),
        ("val_dataloader.dataset.pipeline.3.meta_keys=(img_path,)", "KeyError: ori_shape"),
    ],
)
def test_what_a_segmentor_is_tested_with(tmp_path, capsys, option, expected):
    assert expected in fails(SEGMENTOR, [*ade_options(write_ade(tmp_path / "ade")), option], tmp_path, capsys)


def test_what_a_detector_is_tested_with(tmp_path, capsys):
    options = [*coco_options(write_coco(tmp_path / "coco")), "model.test_cfg.rcnn.nms.iou_treshold=0.5"]
    assert "unexpected keyword argument 'iou_treshold'" in fails(DETECTOR, options, tmp_path, capsys)


def test_validation_images_of_several_sizes_in_a_batch(tmp_path, capsys):
    root = write_ade(tmp_path / "ade")
    for folder, suffix in (("images", ".jpg"), ("annotations", ".png")):
        file = root / folder / "validation" / f"1{suffix}"
        Image.open(file).resize((64, 64)).save(file)
    options = [*ade_options(root), "val_dataloader.batch_size=2"]
    assert "size in a batch should be the same" in fails(SEGMENTOR, options, tmp_path, capsys)


def states() -> list:
    """Of all that draws random numbers."""
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


@TRANSFORMS.register_module()
class DrawNumbers(BaseTransform):
    """Draws numbers of every kind, and notes in which process."""

    def __init__(self, pids: str):
        self.pids = Path(pids)

    def transform(self, results: dict) -> dict:
        random.random(), np.random.random(), torch.rand(1)
        with self.pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return results


@HOOKS.register_module()
class Spy(Hook):
    """Notes what a trial could leave behind."""

    found: ClassVar[list] = []

    def before_train_epoch(self, runner):
        results = [metric.results for metric in runner.val_loop.evaluator.metrics]
        self.found.append([states(), runner.model.training, copy.deepcopy(results)])


@METRICS.register_module()
class CountImages(BaseMetric):
    """Keeps more than results."""

    seen = 0

    def process(self, data_batch, data_samples):
        self.seen += len(data_samples)
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(seen=self.seen)


def test_training_and_validation_go_as_without_the_trial(tmp_path):
    options = ade_options(write_ade(tmp_path / "ade", val=3))
    options.append("val_dataloader.batch_size=2")
    found = []
    for choice in ("try", "none"):
        cfg = load_config(SEGMENTOR, parse_options([*options, f"data_checks.validation={choice}"]))
        cfg.work_dir, cfg.randomness = str(tmp_path / choice), dict(seed=3)
        cfg.val_dataloader.dataset.pipeline.insert(1, dict(type="DrawNumbers", pids=str(tmp_path / f"{choice}.pids")))
        cfg.val_evaluator = [cfg.val_evaluator, dict(type="CountImages")]
        cfg.custom_hooks = [dict(type="Spy")]
        build_runner(cfg).train()
        steps, metrics = scalars(tmp_path / choice)[:-1], scalars(tmp_path / choice)[-1]
        losses = [line["loss"] for line in steps]
        found.append([losses, metrics["mIoU"], metrics["seen"], Spy.found.pop(), states()])
    assert found[0] == found[1]
    assert found[0][2] == 3
    assert found[0][3][1:] == [True, [[], []]]
    assert [len((tmp_path / f"{choice}.pids").read_text().split()) for choice in ("try", "none")] == [5, 3]


def test_a_process_of_its_own_loads_the_batch_where_the_validation_has_processes(tmp_path, capsys):
    """A file that a dataset opens in this process would be shared by all processes of the validation."""
    options = [*ade_options(write_ade(tmp_path / "ade")), "val_dataloader.num_workers=1", "model.test_cfg.mode=slied"]
    cfg = load_config(SEGMENTOR, parse_options([*options, "val_dataloader.persistent_workers=False"]))
    cfg.work_dir = str(tmp_path / "run")
    cfg.val_dataloader.dataset.pipeline.insert(1, dict(type="DrawNumbers", pids=str(tmp_path / "pids")))
    with pytest.raises(FirstBatchError, match="slied"):
        build_runner(cfg).train()
    (pid,) = (tmp_path / "pids").read_text().split()
    assert int(pid) != os.getpid()


@LOOPS.register_module()
class OwnLoop(ValLoop):
    """A loop that may do anything."""


@DATA_SAMPLERS.register_module()
class OwnSampler(DefaultSampler):
    """Images in any order."""


@DATA_SAMPLERS.register_module()
class OwnBatches(BatchSampler):
    """Batches of any kind."""


@HOOKS.register_module()
class Prepares(Hook):
    """A hook that may prepare anything."""

    def before_val_epoch(self, runner):
        pass


@pytest.mark.parametrize(
    "change",
    [
        dict(val_cfg=dict(type="OwnLoop")),
        dict(custom_hooks=[dict(type="Prepares")]),
        {"val_dataloader.sampler.type": "OwnSampler"},
        {"val_dataloader.batch_sampler": dict(type="OwnBatches", drop_last=False)},
        dict(data_checks=dict(validation="none")),
    ],
    ids=["loop", "hook", "sampler", "batches", "choice"],
)
def test_what_is_not_usual_is_not_tried(tmp_path, change):
    """The validation itself then fails, with its own error, when the training is over."""
    options = [*ade_options(write_ade(tmp_path / "ade")), "model.test_cfg.mode=slied"]
    cfg = load_config(SEGMENTOR, parse_options(options))
    cfg.work_dir = str(tmp_path / "run")
    cfg.merge_from_dict(change)
    with pytest.raises(AssertionError, match="slied"):
        build_runner(cfg).train()
    assert [line["step"] for line in scalars(tmp_path / "run")] == [1, 2]


def test_the_trial_writes_no_predictions(tmp_path):
    options = [*ade_options(write_ade(tmp_path / "ade")), f"val_evaluator.output_dir={tmp_path / 'maps'}"]
    cfg = load_config(SEGMENTOR, parse_options(options))
    cfg.work_dir = str(tmp_path / "run")
    runner = build_runner(cfg)
    runner.register_hook(Stops())
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert not list(tmp_path.glob("maps/*"))


class Stops(Hook):
    """Stops a training when all is ready."""

    def before_train_epoch(self, runner):
        raise KeyboardInterrupt


def test_a_validation_that_never_comes_is_not_tried(tmp_path):
    options = [*ade_options(write_ade(tmp_path / "ade")), "model.test_cfg.mode=slied", "train_cfg.val_begin=3"]
    load_tool("train").main([SEGMENTOR, "--work-dir", str(tmp_path), "--cfg-options", *options])
    assert (tmp_path / "iter_2.pth").is_file()


def test_a_run_without_validation(tmp_path):
    options = [*ade_options(write_ade(tmp_path / "ade"), iterations=1), "val_dataloader=None", "val_evaluator=None"]
    load_tool("train").main([SEGMENTOR, "--work-dir", str(tmp_path), "--cfg-options", *options, "val_cfg=None"])
    assert (tmp_path / "iter_1.pth").is_file()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("optim_wrapper.clip_grad.max_nrm=1.0", r"unexpected .* 'max_nrm' \[.+optimizer_wrapper.py:\d+: "),
        ("model.train_cfg=None", r"no attribute 'get' \[.+two_stage.py:\d+: proposal_cfg = self.train_cfg.get"),
    ],
)
def test_a_first_batch_that_can_not_be_trained_is_told_in_one_line(tmp_path, capsys, option, expected):
    options = [*coco_options(write_coco(tmp_path / "coco")), "optim_wrapper.clip_grad.max_norm=1.0", option]
    with pytest.raises(SystemExit, match="2"):
        load_tool("train").main([DETECTOR, "--work-dir", str(tmp_path / "run"), "--cfg-options", *options])
    line, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert re.match(r"train.py: error: before the first batch was trained: (Type|Attribute)Error: .*" + expected, line)
    assert hint == "(traceback: NAT_DENSE_DEBUG=1)"


class FailsAt(Hook):
    """Fails after a number of batches."""

    def __init__(self, batches: int):
        self.batches = batches

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.batches:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize(("batches", "expected"), [(1, FirstBatchError), (2, RuntimeError)])
def test_what_fails_after_a_batch_keeps_its_traceback(tmp_path, batches, expected):
    cfg = load_config(SEGMENTOR, parse_options(ade_options(write_ade(tmp_path / "ade"))))
    cfg.work_dir = str(tmp_path / "run")
    runner = build_runner(cfg)
    runner.register_hook(FailsAt(batches))
    with pytest.raises(expected, match="out of memory"), first_batch_errors(runner, "trained"):
        runner.train()


def test_a_first_batch_that_can_not_be_tested_is_told_in_one_line(tmp_path, capsys):
    options = ade_options(write_ade(tmp_path / "ade"), iterations=1)
    load_tool("train").main([SEGMENTOR, "--work-dir", str(tmp_path / "run"), "--cfg-options", *options])
    options.append("model.test_cfg.mode=slied")
    checkpoint = str(tmp_path / "run" / "iter_1.pth")
    with pytest.raises(SystemExit, match="2"):
        load_tool("test").main([SEGMENTOR, checkpoint, "--work-dir", str(tmp_path / "test"), "--cfg-options", *options])
    line = capsys.readouterr().err.strip().splitlines()[-2]
    assert line.startswith("test.py: error: before the first batch was tested: AssertionError: Only ")
    assert "got slied." in line


@LOOPS.register_module()
class Silent(IterBasedTrainLoop):
    """A loop of the user's that calls no hooks for a batch."""

    def run_iter(self, data_batch):
        self.runner.model.train_step(data_batch, optim_wrapper=self.runner.optim_wrapper)
        self._iter += 1
        if self._iter == 2:
            raise RuntimeError("out of memory")


def test_loops_that_call_no_hooks_keep_their_tracebacks(tmp_path):
    cfg = load_config(SEGMENTOR, parse_options(ade_options(write_ade(tmp_path / "ade"))))
    cfg.work_dir = str(tmp_path / "run")
    cfg.train_cfg.type = "Silent"
    runner = build_runner(cfg)
    with pytest.raises(RuntimeError, match="out of memory"), first_batch_errors(runner, "trained"):
        runner.train()


class Broken(Dataset):
    """Raises an error in place of an item."""

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyError("mask"), "KeyError: 'mask'"),
        (ValueError("of\ntwo lines"), "of two lines"),
        (AssertionError(), "AssertionError: raise self.error"),
        (OSError(2, "No such file", "a.jpg"), "No such file: 'a.jpg'"),
        (ValueError("1 error for Blur\nlimit\n  must be odd"), "1 error for Blur limit must be odd"),
        (RuntimeError("Given:\n  a: 3\n  b: 4\nno fit"), "RuntimeError: Given: a: 3 b: 4 no fit"),
    ],
)
def test_what_a_worker_raises_is_told_without_its_traceback(error, expected):
    with pytest.raises(type(error)) as raised:
        next(iter(DataLoader(Broken(error), num_workers=1)))
    text = describe(raised.value)
    assert text.endswith(expected)
    assert len(text) < 50
    assert re.fullmatch(r".+test_first_batch.py:\d+: raise self.error", place_of(raised.value))


def test_masks_that_a_model_does_not_predict(tmp_path, capsys):
    """Which COCO's metric would miss after an epoch, or a whole test."""
    options = [*coco_options(write_coco(tmp_path / "coco")), "model.roi_head.mask_head=None"]
    options += ["model.roi_head.mask_roi_extractor=None", "train_dataloader.dataset.pipeline.1.with_mask=False"]
    expected = "the evaluator's metric 'segm' compares masks, but this model predicts none"
    assert expected in fails(DETECTOR, options, tmp_path, capsys)
    options.append("val_evaluator.metric=bbox")
    load_tool("train").main([DETECTOR, "--work-dir", str(tmp_path / "boxes"), "--cfg-options", *options])
    with pytest.raises(SystemExit):
        load_tool("test").main([DETECTOR, str(tmp_path / "boxes" / "epoch_1.pth"), "--cfg-options", *options])
    assert f"before the first batch was tested: {expected}" in capsys.readouterr().err
