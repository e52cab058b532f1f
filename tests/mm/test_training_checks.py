"""Misspelt fields of what trains a model are refused before anything is written, and those that fit pass."""

import logging
from pathlib import Path

import mmdet
import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, init_default_scope
from torch import nn

from nat_dense.mm import pipelines
from nat_dense.mm.build_errors import parts_of
from nat_dense.mm.config import load_config
from nat_dense.mm.fields import fields_of
from nat_dense.mm.free_fields import check_free_fields
from nat_dense.mm.pipelines import check_datasets
from nat_dense.mm.training_checks import check_training
from tests.mm.small import DETECTOR, SEGMENTOR, load_tool, parse_options

ON_A_CPU = ["optim_wrapper.type=OptimWrapper"]


def load(config: str, *options: str) -> Config:
    cfg = load_config(config, parse_options([*ON_A_CPU, *options]))
    init_default_scope(cfg.default_scope)
    return cfg


@pytest.mark.parametrize("config", [DETECTOR, SEGMENTOR])
def test_a_config_passes_in_silence(config, capsys):
    cfg, model = load(config), nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    check_training(cfg, model)
    capsys.readouterr()  # the libraries print when they are imported
    check_training(cfg, model)
    assert not any(capsys.readouterr())
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("train_cfg.max_itrs=5", "train_cfg: IterBasedTrainLoop has no field 'max_itrs'. Did you mean 'max_iters'?"),
        ("val_cfg.fp17=True", "val_cfg: ValLoop has no field 'fp17'. Did you mean 'fp16'?"),
        ("train_cfg.type=IterBasedTrainLop", "train_cfg: there is no loop 'IterBasedTrainLop'. Did you mean"),
        ("param_scheduler.0.begn=1", "param_scheduler.0: LinearLR has no field 'begn'. Did you mean 'begin'?"),
        ("default_hooks.checkpoint.intervall=3", "CheckpointHook has no field 'intervall'. Did you mean 'interval'?"),
        ("default_hooks.logger.type=LogerHook", "default_hooks.logger: there is no hook 'LogerHook'. Did you mean"),
        ("optim_wrapper.clip_grd=3", "optim_wrapper: OptimWrapper has no field 'clip_grd'. Did you mean 'clip_grad'?"),
        ("optim_wrapper.optimizer.lrr=1", "optim_wrapper.optimizer: AdamW has no field 'lrr'. Did you mean 'lr'?"),
        ("param_scheduler.0.end=abc", "param_scheduler.0.end is 'abc': expected int, without quotes."),
        ("param_scheduler.0.start_factor=0", "param_scheduler.0: ZeroDivisionError"),
        ("param_scheduler.0.begin=1500", "param_scheduler.0: end should be larger than begin"),
        ("param_scheduler.1.power=two", "param_scheduler.1.power is 'two': expected float, without quotes."),
        ("param_scheduler.1.by_epoch=True", "param_scheduler.1 counts epochs (by_epoch=True, the default),"),
        ("default_hooks.checkpoint.max_keep_ckpts=many", "max_keep_ckpts is 'many': expected int, without quotes."),
        ("optim_wrapper.paramwise_cfg.custom_keys.rpb.lr_mul=0", "custom_keys['rpb'] has no field 'lr_mul'. Did you"),
        ("log_level=INFOO", "log_level is 'INFOO': expected a level of Python's logging, such as"),
        ("randomness.seed=abc", "randomness.seed is 'abc': expected a whole number, or None"),
        ("env_cfg.cudnn_bench=True", "env_cfg: Runner has no field 'cudnn_bench'. Did you mean 'cudnn_benchmark'?"),
        ("train_cfg.max_iters=0", "train_cfg.max_iters is 0: expected a whole number, 1 or more."),
        ("train_cfg.max_iters=abc", "train_cfg.max_iters is 'abc': expected int, without quotes."),
        ("train_cfg.max_iters=1.5", "train_cfg.max_iters is 1.5: expected a whole number"),
        ("train_cfg.val_interval=0", "train_cfg.val_interval is 0: expected"),
        ("train_cfg.val_begin=-1", "train_cfg.val_begin is -1: expected a whole number, 0 or more."),
        ("default_hooks.checkpoint.interval=0", "interval is 0: expected a whole number, 1 or more (-1: never)."),
        ("default_hooks.logger.interval=None", "default_hooks.logger.interval is None: expected"),
        ("optim_wrapper.optimizer.lr=fast", "optim_wrapper.optimizer.lr is 'fast': expected a number."),
        ("optim_wrapper.optimizer.weight_decay=None", "has no weight_decay, which optim_wrapper.paramwise_cfg"),
        ("optim_wrapper.paramwise_cfg.custom_keys.rpb=0", "{'decay_mult': 0.0}}: expected a dict such as dict(head="),
        ("optim_wrapper.optimizer.lr=-1.0", "optim_wrapper: Invalid learning rate: -1.0"),
        ("optim_wrapper.optimizer.type=Adamw", "optim_wrapper.optimizer: there is no optimizer 'Adamw'. Did"),
        ("optim_wrapper.optimizer.type=None", "optim_wrapper.optimizer has no type: expected the optimizer's name"),
        ("optim_wrapper.paramwise_cfg.norm_decay_mul=0", "no field 'norm_decay_mul'. Did you mean 'norm_decay_mult'?"),
    ],
)
def test_what_is_misspelt_is_named(option, expected):
    with pytest.raises(ValueError, match=r".") as raised:
        check_training(load(SEGMENTOR, option), nn.Linear(16, 16))
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (dict(type="StepLR", step_size=0, by_epoch=False, begin=10**9, end=2 * 10**9), "ZeroDivisionError"),
        (dict(type="StepLR", step_size=4, gamma="0.1", by_epoch=False), "gamma is '0.1': expected float"),
        (dict(type="MultiStepLR", milestones=["8"], by_epoch=False), "milestones is ['8']: expected List[int]"),
        (dict(type="MultiStepLR", milestones=3, by_epoch=False), "'int' object is not iterable"),
        (dict(type="MultiStepLR", milestones=[3]), "counts epochs"),
        (dict(type="MultiStepLR", milestones=[3], by_epoch="False"), "by_epoch is 'False': expected bool"),
    ],
)
def test_schedules_that_would_fail_or_never_act(scheduler, expected):
    cfg = load(SEGMENTOR)
    cfg.param_scheduler = scheduler
    with pytest.raises(ValueError, match=r"param_scheduler") as raised:
        check_training(cfg, nn.Linear(16, 16))
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    "scheduler",
    [
        dict(type="ReduceOnPlateauLR", monitor="acc", rule="greater", patience=1),
        dict(type="OneCycleLR", eta_max=0.1, total_steps=10, pct_start=0.1, convert_to_iter_based=True),
        dict(type="OneCycleLR", eta_max=0.1, total_steps=1, by_epoch=False),
        dict(type="CosineAnnealingLR", begin=5, end=9, T_max=4, by_epoch=False),
        dict(type="MultiStepLR", milestones=[8, 11], convert_to_iter_based=True),
    ],
)
def test_schedules_that_fit(scheduler, recwarn):
    cfg = load(SEGMENTOR)
    cfg.param_scheduler = [scheduler]
    check_training(cfg, nn.Linear(16, 16))
    assert not [warning for warning in recwarn if "scheduler.step" in str(warning.message)]


@HOOKS.register_module()
class Described(Hook):
    """Whose annotations are words, and which takes fields that it doesn't name."""

    def __init__(self, lr: "the learning rate" = 0, **kwargs):  # noqa: F722
        self.extra = kwargs.pop("extra", None)
        super().__init__(**kwargs)


def test_constructors_of_other_kinds():
    cfg = load(SEGMENTOR)
    cfg.custom_hooks = [dict(type="Described", lr="high", extra=3)]
    check_training(cfg, nn.Linear(16, 16))
    assert fields_of(Described) is None


@HOOKS.register_module()
class InSeconds(Hook):
    """What an interval is, is a hook's own business."""

    def __init__(self, interval: float):
        self.interval = interval


@pytest.mark.parametrize("interval", [0.5, 0, (1, 5)])
def test_intervals_of_other_hooks(interval):
    cfg = load(SEGMENTOR)
    cfg.custom_hooks = [dict(type="InSeconds", interval=interval)]
    check_training(cfg, nn.Linear(16, 16))


def test_rules_that_need_no_weight_decay():
    cfg = load(SEGMENTOR)
    cfg.optim_wrapper.paramwise_cfg = dict(flat_decay_mult=0.0, custom_keys=dict(bias=dict(lr_mult=2.0)))
    del cfg.optim_wrapper.optimizer["weight_decay"]
    check_training(cfg, nn.Linear(16, 16))


def test_loops_without_a_type_are_the_runners():
    by_epoch = dict(by_epoch=True, max_epochs=3, val_interval=1)
    cfg = load(DETECTOR)
    cfg.train_cfg = by_epoch
    check_training(cfg, nn.Linear(16, 16))
    cfg.train_cfg = by_epoch | dict(max_iters=3)
    with pytest.raises(ValueError, match="EpochBasedTrainLoop has no field 'max_iters'"):
        check_training(cfg, nn.Linear(16, 16))
    cfg.train_cfg, cfg.param_scheduler = dict(by_epoch=False, max_iters=3), None
    check_training(cfg, nn.Linear(16, 16))


def test_the_model_is_left_alone():
    model = nn.Linear(16, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cfg = load(SEGMENTOR)
    text = cfg.pretty_text
    check_training(cfg, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert cfg.pretty_text == text


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("default_hooks.loger", dict(interval=1), "default_hooks.loger has no type: .* Did you mean 'logger'"),
        ("default_hooks.visualization", None, "default_hooks.visualization is None, which only removes runtime_info"),
        ("custom_hooks", dict(type="EMAHook"), "custom_hooks is a dict: expected a list"),
        (
            "custom_hooks",
            [dict(type="EMAHook", priority="HIHG")],
            r"custom_hooks.0.priority is 'HIHG': .* one of HIGHEST",
        ),
        ("randomness", dict(sed=3), "randomness: Runner has no field 'sed'. Did you mean 'seed'"),
        (
            "visualizer.line_widh",
            3,
            "visualizer: DetLocalVisualizer has no field 'line_widh'. Did you mean 'line_width'",
        ),
        ("log_processor.window_sise", 3, "log_processor: LogProcessor has no field 'window_sise'. Did you mean"),
        ("visualizer.vis_backends", [dict(type="LocalVisBackend", sav_dir="x")], r"visualizer.vis_backends.0: Local"),
    ],
)
def test_what_reports_and_hooks_in(field, value, expected):
    cfg = load(DETECTOR)
    cfg.merge_from_dict({field: value})
    with pytest.raises(ValueError, match=expected):
        check_training(cfg, nn.Linear(16, 16))


@pytest.mark.parametrize(
    ("schedule", "note"),
    [
        (dict(type="CosineAnnealingLR", T_max=9, begin=4, by_epoch=False), "param_scheduler.0 begins at iteration 4, "),
        (
            dict(type="LinearLR", start_factor=0.1, end=9, by_epoch=False),
            "warms up until iteration 9, but training ends",
        ),
        (dict(type="LinearLR", start_factor=0.1, end=4, by_epoch=False), ""),
        (dict(type="LinearLR", start_factor=1.0, end_factor=0.01, end=9, by_epoch=False), ""),
        (dict(type="ConstantLR", end=9, by_epoch=False), "warms up until iteration 9, but"),
        (dict(type="ConstantLR", factor=1.0, end=9, by_epoch=False), ""),
        (dict(type="MultiStepLR", milestones=[2], end=9, by_epoch=False), ""),
        (dict(type="CosineAnnealingLR", T_max=9, begin=3, by_epoch=False), ""),
    ],
)
def test_schedules_that_a_short_training_does_not_reach(schedule, note):
    cfg = load(SEGMENTOR, "optim_wrapper.paramwise_cfg=None")
    cfg.train_cfg.max_iters = 4
    cfg.param_scheduler = [schedule]
    notes = check_training(cfg, nn.Linear(16, 16))
    assert len(notes) == bool(note)
    assert all(note in found for found in notes)


def test_rules_that_no_parameter_follows():
    cfg = load(DETECTOR)
    rules = dict(bakbone=dict(lr_mult=0.1), weight=dict(decay_mult=0.5))
    cfg.optim_wrapper.paramwise_cfg = dict(custom_keys=rules)
    (note,) = check_training(cfg, nn.Linear(16, 16))
    assert note == "optim_wrapper.paramwise_cfg.custom_keys['bakbone']: no parameter name contains 'bakbone'."


def test_fields_are_those_of_base_classes_too():
    class Open(Hook):
        def __init__(self, own: int, **others):
            pass

    class Closed(CheckpointHook):
        def __init__(self, own: int, **others):
            super().__init__(**others)

    assert fields_of(Open) is None
    assert {"own", "interval", "max_keep_ckpts", "save_optimizer"} <= set(fields_of(Closed) or ())
    assert fields_of(EMAHook) is None  # hands others to a class that its fields name
    assert fields_of(HOOKS.get("IterTimerHook")) == []
    assert fields_of(lambda **others: None) is None


def test_train_refuses_it_and_writes_nothing(tmp_path, capsys):
    """At the end of this training, CheckpointHook itself would notice."""
    options = ["default_hooks.checkpoint.intervall=3", "model.backbone.init_cfg=None"]
    with pytest.raises(SystemExit) as stopped:
        load_tool("train").main([SEGMENTOR, "--work-dir", str(tmp_path / "run"), "--cfg-options", *options])
    assert stopped.value.code == 2
    assert not (tmp_path / "run").exists()
    assert "train.py: error: default_hooks.checkpoint: CheckpointHook has no" in capsys.readouterr().err


NEED_MORE = (
    "Albu",
    "InstaBoost",
    "LoadMultipleRSImageFromFile",
    "LoadPanopticAnnotations",
    "LoadSingleRSImageFromFile",
    "RandomSamplingNegPos",
)
"""Transforms that other packages make, or that fetch a tokenizer."""


@pytest.mark.slow
@pytest.mark.parametrize("library", [mmdet, mmseg])
def test_configs_of_the_libraries_pass(library, monkeypatch):
    """All that load here: none of them has a field that a check of ours doesn't know."""
    optimizer = torch.optim.SGD(nn.Linear(16, 16).parameters(), lr=1.0)
    monkeypatch.setattr("nat_dense.mm.training_checks.build_optim_wrapper", lambda *_: OptimWrapper(optimizer))
    build = pipelines._build
    monkeypatch.setattr(pipelines, "_build", lambda node, name: node["type"] in NEED_MORE or build(node, name))
    checked = 0
    for path in sorted((Path(library.__file__).parent / ".mim/configs").rglob("*.py")):
        if "_base_" in path.parts:
            continue
        try:
            cfg = load_config(str(path))
        except ValueError as error:  # mmpretrain, which we don't install; a base that isn't there
            if not isinstance(error.__cause__, (ImportError, FileNotFoundError)):
                raise
            continue
        if "train_cfg" in cfg:
            init_default_scope(cfg.get("default_scope", "mmengine"))
            check_training(cfg, nn.Linear(16, 16))
            model = cfg.get("model") or {}
            check_free_fields(model, parts_of(model))
            for loader in ("train_dataloader", "val_dataloader"):
                check_datasets((cfg.get(loader) or {}).get("dataset"), f"{loader}.dataset")
            checked += 1
    assert checked > 300
