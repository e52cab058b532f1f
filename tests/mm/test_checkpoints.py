"""Checkpoints are read as data, must fit, and are never overwritten."""

from pathlib import Path

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.runner.checkpoint import load_from_http, load_from_local
from torch import nn

from nat_dense.checkpoints import Checkpoint
from nat_dense.mm.checkpoints import check_classes, check_fits, refuse_pickled_code
from nat_dense.mm.resuming import StayInWorkDir, check_work_dir, latest_checkpoint


class Payload:
    """Unpickling this creates a file: the proof that a checkpoint ran code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def save(path: Path, model: nn.Module, experiment: str = "ours_20250101_120000", **changes) -> str:
    checkpoint = dict(meta=dict(experiment_name=experiment), state_dict=model.state_dict(), optimizer={})
    torch.save(checkpoint | changes, path)
    return str(path)


def config(work_dir: Path, **fields) -> Config:
    return Config(dict(work_dir=str(work_dir), experiment_name="ours") | fields)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.fixture
def malicious(tmp_path, monkeypatch):
    """A checkpoint with code, and the file that its code would create; MMEngine loads as it does by itself."""
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    own = {"": load_from_local, "http://": load_from_http, "https://": load_from_http}
    monkeypatch.setattr(CheckpointLoader, "_schemes", CheckpointLoader._schemes | own)
    proof = tmp_path / "ran"
    torch.save(dict(state_dict={}, meta=Payload(proof)), tmp_path / "bad.pth")
    return str(tmp_path / "bad.pth"), proof


@pytest.mark.parametrize("load_from", [True, False])
def test_a_checkpoint_with_code_is_not_resumed(malicious, tmp_path, model, load_from):
    path, proof = malicious
    (tmp_path / "last_checkpoint").write_text(path)
    with pytest.raises(ValueError, match="refused: reading it would run code"):
        check_work_dir(config(tmp_path, resume=True, **(dict(load_from=path) if load_from else {})), model)
    assert not proof.exists()


def test_weights_to_start_from_with_code_do_not_run(malicious):
    path, proof = malicious
    refuse_pickled_code()
    with pytest.raises(ValueError, match="refused: reading it would run code"):
        load_checkpoint(nn.Linear(1, 1), path)  # what Runner.load_checkpoint calls
    assert not proof.exists()


def test_initial_weights_with_code_are_refused_and_do_not_run(malicious):
    path, proof = malicious
    refuse_pickled_code()
    backbone = BaseModule(init_cfg=dict(type="Pretrained", checkpoint=path))
    with pytest.raises(ValueError, match="refused: reading it would run code"):
        backbone.init_weights()
    assert not proof.exists()


def test_the_same_checkpoint_runs_its_code_without_us(malicious):
    """The tests above can fail: MMEngine on its own falls back to full unpickling."""
    path, proof = malicious
    BaseModule(init_cfg=dict(type="Pretrained", checkpoint=path)).init_weights()
    assert proof.exists()


def test_an_environment_that_demands_pickles_is_refused(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match="lets checkpoints run code"):
        refuse_pickled_code()


def test_config_text_in_a_checkpoint_is_dropped():
    checkpoint = dict(meta=dict(config="import os", epoch=3))
    StayInWorkDir().after_load_checkpoint(None, checkpoint)
    assert checkpoint == dict(meta=dict(epoch=3))


def test_weights_must_be_all_there_in_their_shape(model):
    def fits(weights):
        return check_fits(model, Checkpoint(Path("theirs.pth"), "torch", weights))

    weights = dict(model.state_dict())
    assert fits(weights) == []
    assert fits({f"module.{key}": value for key, value in weights.items()}) == []
    (warning,) = fits(weights | {"head.weight": torch.zeros(1)})
    assert "1 weights are not used by this model, such as 'head.weight'" in warning
    with pytest.raises(ValueError, match=r"lacks 1 of 7 weights, such as '0.bias'"):
        fits({key: value for key, value in weights.items() if key != "0.bias"})
    with pytest.raises(ValueError, match=r"'0.bias' has shape \(4,\), this config's model needs \(3,\)"):
        fits(weights | {"0.bias": torch.zeros(4)})


def test_a_new_run_does_not_overwrite_checkpoints(tmp_path, model):
    assert check_work_dir(config(tmp_path / "new"), model) == []
    save(tmp_path / "epoch_1.pth", model)
    with pytest.raises(ValueError, match=r"already holds 1 checkpoint\(s\), such as 'epoch_1.pth'"):
        check_work_dir(config(tmp_path), model)


def test_resume_from_the_work_dir(tmp_path, model):
    cfg = config(tmp_path, resume=True)
    (tmp_path / "last_checkpoint").write_text(save(tmp_path.parent / "iter_1.pth", model))  # of another folder
    (notice,) = check_work_dir(cfg, model)
    assert "Nothing to resume" in notice
    assert not cfg.resume  # or MMEngine would go on with that one
    last = save(tmp_path / "epoch_1.pth", model)
    (tmp_path / "last_checkpoint").write_text(last)
    assert check_work_dir(config(tmp_path, resume=True), model) == []


def test_a_copied_work_dir_goes_on_with_its_own_checkpoint(tmp_path, model):
    """The note is an absolute path, which counts only where the config says that checkpoints go elsewhere."""
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
    (here / "last_checkpoint").write_text(save(there / "iter_2.pth", model))
    assert latest_checkpoint(here) is None
    assert latest_checkpoint(here, elsewhere=True) == there / "iter_2.pth"
    save(here / "iter_2.pth", model)
    cfg = config(here, resume=True)
    assert check_work_dir(cfg, model) == []
    assert cfg.load_from == str(here / "iter_2.pth")


def test_a_run_killed_between_a_checkpoint_and_the_note_of_it(tmp_path, model):
    for step in (2, 10):
        save(tmp_path / f"iter_{step}.pth", model)
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_10.pth"
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_1.pth"))  # deleted since
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_10.pth"


def test_resuming_does_not_overwrite_another_runs_checkpoints(tmp_path, model):
    (tmp_path / "full").mkdir()
    other, last = save(tmp_path / "iter_2.pth", model), save(tmp_path / "full" / "iter_3.pth", model)
    with pytest.raises(ValueError, match=r"'iter_3.pth', which a run resumed from .*iter_2.pth' could overwrite"):
        check_work_dir(config(tmp_path / "full", resume=True, load_from=other), model)
    assert check_work_dir(config(tmp_path / "full", resume=True, load_from=last), model) == []
    assert check_work_dir(config(tmp_path / "empty", resume=True, load_from=other), model) == []
    Path(last).rename(tmp_path / "full" / "best.pth")
    with pytest.raises(ValueError, match=r"but no checkpoint named iter_N.pth or epoch_N.pth"):
        check_work_dir(config(tmp_path / "full", resume=True), model)


def test_another_configs_checkpoints_are_not_resumed(tmp_path, model):
    last = save(tmp_path / "epoch_1.pth", model, experiment="theirs_20250101_120000")
    (tmp_path / "last_checkpoint").write_text(last)
    with pytest.raises(ValueError, match="holds checkpoints of the config 'theirs', not of 'ours'"):
        check_work_dir(config(tmp_path, resume=True), model)
    # Named on purpose, the file is taken, as long as it fits.
    assert check_work_dir(config(tmp_path, resume=True, load_from=last), model) == []


def test_folders_that_can_not_be_made(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"work_dir=.*file/below': '.*file' is a file; choose a folder\."):
        check_work_dir(config(tmp_path / "file" / "below"), model)
    cfg = config(tmp_path / "new" / "below")
    cfg.default_hooks = dict(checkpoint=dict(out_dir=str(tmp_path / "file")))
    with pytest.raises(NotADirectoryError, match=r"default_hooks\.checkpoint\.out_dir="):
        check_work_dir(cfg, model)
    cfg.default_hooks.checkpoint.out_dir = str(tmp_path / "other" / "below")
    assert check_work_dir(cfg, model) == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_models_checkpoints_are_not_resumed(tmp_path, model):
    last = save(tmp_path / "epoch_1.pth", nn.Linear(2, 4))
    (tmp_path / "last_checkpoint").write_text(last)
    for changes in ({}, {"load_from": last}):
        with pytest.raises(ValueError, match="belongs to another model"):
            check_work_dir(config(tmp_path, resume=True, **changes), model)


def test_weights_alone_are_no_run_to_resume(tmp_path, model):
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="no training state to resume"):
        check_work_dir(config(tmp_path, resume=True, load_from=str(tmp_path / "weights.pth")), model)


def test_weights_to_start_from_are_accounted_for(tmp_path, model):
    other = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(4), nn.Linear(1, 1))
    source = save(tmp_path / "theirs.pth", other)
    fresh, unused = check_work_dir(config(tmp_path / "new", load_from=source), model)
    assert "4 of 7 weights keep their initial values: 1.weight, 1.bias, 1.running_mean, 1.running_var." in fresh
    assert "2 of its weights are not used: 2.weight, 2.bias." in unused
    assert check_work_dir(config(tmp_path / "new", load_from=save(tmp_path / "ours.pth", model)), model) == []


def test_nothing_to_start_from_is_an_error(tmp_path, model):
    torch.save({"levels.0.weight": torch.zeros(3)}, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match=r"none of its 1 weights, .* in model.backbone.init_cfg"):
        check_work_dir(config(tmp_path / "new", load_from=str(tmp_path / "backbone.pth")), model)


SETTINGS = """
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01), clip_grad=dict(max_norm=1.0, norm_type=float('inf')),
    paramwise_cfg=dict(custom_keys={'backbone.a': dict(lr_mult=0.1)}))
param_scheduler = [dict(type='LinearLR', begin=0, by_epoch=False, end=4)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4)
"""


def test_settings_that_a_resumed_run_does_not_take_from_the_config(tmp_path, model):
    saved = Config.fromstring(SETTINGS, ".py").pretty_text  # as MMEngine keeps it
    last = save(tmp_path / "iter_4.pth", model, meta=dict(experiment_name="ours", cfg=saved))

    def resume(*changes):
        cfg = Config.fromstring(SETTINGS, ".py")
        for key, value in changes:
            cfg.merge_from_dict({key: value})
        return check_work_dir(config(tmp_path, resume=True, **cfg._cfg_dict), model)

    optimizer = "optim_wrapper.optimizer"
    assert resume() == resume(("optim_wrapper.clip_grad.max_norm", 2.0), ("train_cfg.max_iters", 8)) == []
    assert resume((f"{optimizer}.type", torch.optim.SGD), ("optim_wrapper.type", "AmpOptimWrapper")) == []
    rate, end = resume(
        ("optim_wrapper.type", "AmpOptimWrapper"), (f"{optimizer}.lr", 0.02), ("param_scheduler.0.end", 8)
    )
    assert rate.startswith("optim_wrapper.optimizer.lr is 0.02 now, but the resumed run keeps its old value, 0.01")
    assert end.startswith("param_scheduler.0.end is 8 now, but the resumed run keeps its old value, 4")
    assert f"load_from={last}" in rate
    (rules,) = resume(("optim_wrapper.paramwise_cfg", dict(custom_keys={"backbone.a": dict(lr_mult=0.5)})))
    assert rules.startswith("optim_wrapper.paramwise_cfg has changed")
    (schedules,) = resume(("param_scheduler", [dict(type="ConstantLR")] * 2))
    assert schedules.startswith("param_scheduler was ['LinearLR'] and is ['ConstantLR', 'ConstantLR'] now")
    with pytest.raises(ValueError, match=r"was trained with SGD, but optim_wrapper.optimizer is AdamW now"):
        resume((f"{optimizer}.type", "AdamW"))


def test_settings_of_several_optimizers(tmp_path, model):
    def wrappers(kind):
        return dict(optim_wrapper=dict(constructor="Mine", a=dict(optimizer=dict(type="SGD")), b=dict(optimizer=kind)))

    saved = Config(wrappers(dict(type="Adam", lr=1.0))).pretty_text
    save(tmp_path / "iter_4.pth", model, meta=dict(experiment_name="ours", cfg=saved))
    (note,) = check_work_dir(config(tmp_path, resume=True, **wrappers(dict(type="AdamW", lr=2.0))), model)
    assert note.startswith("optim_wrapper.b.optimizer.lr is 2.0 now")
    with pytest.raises(ValueError, match=r"optim_wrapper.b.optimizer is SGD now"):
        check_work_dir(config(tmp_path, resume=True, **wrappers(dict(type="SGD", lr=1.0))), model)


def test_classes_of_a_checkpoint(coco):
    cfg, _ = coco
    names = list(CocoDataset.METAINFO["classes"])

    def check(classes, key="classes", **options):
        extras = dict(meta=dict(dataset_meta={key: classes}))
        return check_classes(cfg, "test_dataloader", Checkpoint(Path("x.pth"), "torch", {}, extras=extras), **options)

    assert check(tuple(names)) == check(names, key="CLASSES") == check(None) == []
    permuted = [*names[:3], names[4], names[3], *names[5:]]
    with pytest.raises(ValueError, match=r"another order of classes .*: class 3 is 'airplane' there and 'motorcycle'"):
        check(permuted)
    (note,) = check(permuted, keeps_order=False)
    assert "another order" in note
    (note,) = check(["cat", *names[1:]])
    assert "was trained with different classes than test_dataloader.dataset has: class 0 is 'cat' there" in note
    cfg.model.language_model = dict(type="BertModel")
    assert check(permuted) == []
