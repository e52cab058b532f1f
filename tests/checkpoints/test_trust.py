"""`--trust`: the one way to let a checkpoint run code, for every command that reads one."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend, register_backend
from mmengine.runner import CheckpointLoader
from torch import nn

from nat_dense.checkpoints import read, runner_files
from nat_dense.mm.checkpoints import refuse_pickled_code
from nat_dense.mm.resuming import check_work_dir
from nat_dense.models import NAT
from tests.checkpoints.files import TINY, modules, tiny, write_mm2
from tests.mm.small import SEGMENTOR, ade_options, load_tool, write_ade

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Own:
    """An object of the user's own; reading it runs this class."""

    read = 0

    def __setstate__(self, state):
        type(self).read += 1


def write(path: Path, weights: dict[str, torch.Tensor]) -> str:
    note = Own()
    note.text = "mine"
    torch.save(dict(meta=dict(note=note, experiment_name="ours"), optimizer={}, state_dict=weights), path)
    return str(path)


@pytest.fixture(autouse=True)
def mmengine_as_it_was(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, "_schemes", CheckpointLoader._schemes.copy())
    monkeypatch.setenv(FORCED, "0")
    monkeypatch.setattr(Own, "read", 0)
    yield
    register_backend("local", LocalBackend, force=True, prefixes="")


@pytest.mark.parametrize("trust", [False, True])
def test_what_mmengine_loads(tmp_path, trust):
    """Also where the whole process has been told to load data only, for everything else."""
    path = write(tmp_path / "mine.pth", tiny().state_dict())
    refuse_pickled_code(trust=trust)
    if trust:
        assert CheckpointLoader.load_checkpoint(path, logger="silent")["meta"]["note"].read == 1
    else:
        with pytest.raises(ValueError, match=r"asks for tests.checkpoints.test_trust.Own.*use --trust on the command"):
            CheckpointLoader.load_checkpoint(path, logger="silent")
    assert Own.read == trust
    assert os.environ[FORCED] == "1"
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=False)


def test_threads_that_read_leave_nothing_behind(tmp_path):
    """What a file may name is one list for the process, which reading narrows for a moment."""
    torch.save(dict(state_dict=tiny().state_dict(), meta=dict(epoch=1)), tmp_path / "x.pth")
    admitted = torch.serialization.get_safe_globals()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: len(read(tmp_path / "x.pth").tensors), range(120)))
    assert set(found) == {len(tiny().state_dict())}
    assert torch.serialization.get_safe_globals() == admitted


@pytest.mark.parametrize("fields", [dict(resume=True), dict(resume=False)])
def test_checks_before_a_training(tmp_path, fields):
    model = nn.Sequential(nn.Linear(2, 3))
    path = write(tmp_path / "mine.pth", model.state_dict())
    cfg = Config(dict(work_dir=str(tmp_path / "run"), load_from=path, **fields))
    with pytest.raises(ValueError, match="refused: reading it would run code"):
        check_work_dir(cfg, model)
    assert check_work_dir(cfg, model, trust=True) == []


def test_initial_weights(tmp_path):
    path = write(tmp_path / "mine.pth", tiny().state_dict())
    refuse_pickled_code()
    pretrained = dict(type="Pretrained", checkpoint=path)
    with pytest.raises(ValueError, match="trust=True in Python and in init_cfg"):
        NAT(**TINY, init_cfg=pretrained).init_weights()
    model = NAT(**TINY, init_cfg=pretrained | dict(trust=True))
    model.init_weights()
    assert torch.equal(model.norm3.bias, tiny().norm3.bias)


def test_trust_runs_nothing_that_can_be_read_without(tmp_path):
    """An old training state names mmcv's classes, which are not installed: its stand-ins do, trusted or not."""
    path = write_mm2(tmp_path / "old.pth", tiny().state_dict())
    assert read(path, trust=True).tensors.keys() == tiny().state_dict().keys()
    assert runner_files.load_from_nat_dense(str(path), trust=True)["meta"]["CLASSES"] == ("person", "bicycle")


def test_trusted_objects_need_their_modules(tmp_path):
    class Gone:
        pass

    with modules(gone=dict(Gone=Gone)):
        torch.save(dict(state_dict=tiny().state_dict(), config=Gone()), tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=r"theirs.pth refused: it holds objects of 'gone', which is not installed"):
        read(tmp_path / "theirs.pth", trust=True)


def test_commands(tmp_path, capsys):
    """train.py starts from such a file and test.py tests one: with --trust, and not without."""
    options = ["--cfg-options", *ade_options(write_ade(tmp_path / "data", train=2, val=1), iterations=1)]
    load_tool("train").main([SEGMENTOR, "--work-dir", str(tmp_path / "first"), *options])
    mine = write(tmp_path / "mine.pth", read(tmp_path / "first" / "iter_1.pth").tensors)
    start = [SEGMENTOR, "--work-dir", str(tmp_path / "second"), *options, f"load_from={mine}"]
    test = [SEGMENTOR, mine, "--work-dir", str(tmp_path / "tested"), *options]
    for name, arguments in (("train", start), ("test", test)):
        with pytest.raises(SystemExit):
            load_tool(name).main(arguments)
        assert "test_trust.Own. If you made this file" in capsys.readouterr().err
        assert Own.read == 0
    load_tool("train").main([*start, "--trust"])
    assert (tmp_path / "second" / "iter_1.pth").is_file()
    started, Own.read = Own.read, 0
    assert "mIoU" in load_tool("test").main([*test, "--trust"])
    assert (started, Own.read) == (2, 2)  # once by the check, once by MMEngine
