"""What mmengine loads by itself: training states that resume, old files, and no code."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_checkpoint, save_checkpoint

from nat_dense.checkpoints import runner_files
from nat_dense.checkpoints.writing import save
from tests.checkpoints.files import tiny, write_mm2


@pytest.fixture(autouse=True)
def loader():
    """mmengine as `install` leaves it, and as it was afterwards."""
    before = CheckpointLoader._schemes
    CheckpointLoader._schemes = before.copy()
    runner_files.install()
    yield
    CheckpointLoader._schemes = before
    register_backend("local", LocalBackend, force=True, prefixes="")


def load(path):
    return CheckpointLoader.load_checkpoint(str(path), map_location="cpu", logger="silent")


def test_training_state_comes_back_whole(tmp_path):
    history = HistoryBuffer([1.0, 3.0, 0.5], [1, 1, 2])
    hub = dict(log_scalars={"train/loss": history}, runtime_info=dict(iter=np.int64(7), seed=np.uint32(5), lr=0.1))
    content = dict(
        meta=dict(epoch=3, experiment_name="x", scores=np.arange(3.0), done=np.bool_(True)),
        state_dict=tiny().state_dict(),
        message_hub=hub,
        optimizer=dict(state={0: dict(exp_avg=torch.ones(2))}, param_groups=[dict(lr=0.1, params=[0])]),
    )
    torch.save(content, tmp_path / "iter_7.pth")
    found = load(tmp_path / "iter_7.pth")
    again = found["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(again, HistoryBuffer)
    assert again.statistics("mean") == history.mean()
    assert [again.min(), again.max(), again.current()] == [0.5, 3.0, 0.5]
    assert found["message_hub"]["runtime_info"] == hub["runtime_info"]
    assert np.array_equal(found["meta"]["scores"], np.arange(3.0))
    assert found["meta"]["done"] is np.True_
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], torch.ones(2))


def test_the_file_can_be_overwritten_while_its_tensors_live(tmp_path):
    torch.save(dict(state_dict=dict(a=torch.ones(100_000))), tmp_path / "x.pth")
    found = load(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"")
    assert found["state_dict"]["a"].sum() == 100_000


def test_old_training_state(tmp_path):
    weights = {f"backbone.{name}": value for name, value in tiny().state_dict().items()}
    found = load(write_mm2(tmp_path / "old.pth", weights))
    assert found["state_dict"].keys() == weights.keys()
    assert found["meta"]["CLASSES"] == ("person", "bicycle")
    assert found["meta"]["hook_msgs"]["best_score"] == 0.51


def test_safetensors_through_mmengine(tmp_path):
    save(tiny().state_dict(), tmp_path / "x.safetensors")
    model = tiny()
    with torch.no_grad():
        model.norm0.bias.zero_()
    load_checkpoint(model, str(tmp_path / "x.safetensors"), strict=True)
    assert torch.equal(model.norm0.bias, tiny().norm0.bias)


class _Reads:
    """getattr on what these files may hold, for what they may not have."""

    def __init__(self, owner, name):
        self.args = owner, name

    def __reduce__(self):
        return getattr, self.args


class _Runs:
    def __reduce__(self):
        return os.system, ("touch code-was-run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_Runs(), "refused: reading it would run code, it asks for posix.system"),
        (_Reads(HistoryBuffer, "__init__"), "it asks for attribute '__init__' of .*HistoryBuffer"),
        (_Reads(np.ndarray, "tofile"), "it asks for attribute 'tofile' of .*numpy.ndarray"),
        (eval, "refused: reading it would run code, it asks for eval"),
    ],
)
def test_code_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict={}, meta=dict(x=content)), "x.pth")
    with pytest.raises(ValueError, match=message):
        load("x.pth")
    assert not Path("code-was-run").exists()


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'gone\.pth'"):
        load("gone.pth")


def test_saving_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run" / "epoch_1.pth"
    save_checkpoint(dict(state_dict=dict(a=torch.ones(3))), str(path))
    assert torch.equal(load(path)["state_dict"]["a"], torch.ones(3))

    def half(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(dict(state_dict=dict(a=torch.zeros(3))), str(path))
    assert [file.name for file in path.parent.iterdir()] == ["epoch_1.pth"]
    assert torch.equal(load(path)["state_dict"]["a"], torch.ones(3))


def test_a_checkpoint_is_removed_when_the_one_that_replaces_it_is_there(tmp_path, monkeypatch):
    """MMEngine removes it before."""
    old, new, other = (tmp_path / f"iter_{i}.pth" for i in (1, 2, 3))
    for path in (old, other):
        save_checkpoint(dict(state_dict=dict(a=torch.ones(3))), str(path))
    backend = get_file_backend(str(old))
    backend.remove(str(old))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(dict(state_dict={}), str(new))
    assert torch.equal(load(old)["state_dict"]["a"], torch.ones(3))
    save_checkpoint(dict(state_dict={}), str(tmp_path / "another run" / "iter_1.pth"))
    assert old.is_file()
    shutil.rmtree(tmp_path / "another run")
    save_checkpoint(dict(state_dict={}), str(new))
    assert sorted(tmp_path.iterdir()) == [new, other]
    backend.remove(str(new))
    save_checkpoint(dict(state_dict={}), str(new))  # the same name again
    assert sorted(tmp_path.iterdir()) == [new, other]
    (tmp_path / "log.txt").touch()
    backend.remove(str(tmp_path / "log.txt"))
    assert not (tmp_path / "log.txt").exists()


def test_what_a_killed_process_left_is_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    here, elsewhere = f".iter_1.pth.{platform.node()}-", ".iter_1.pth.elsewhere-"
    for part in (f"{here}{dead.pid}.part", f"{here}{os.getppid()}.part", f"{elsewhere}{dead.pid}.part"):
        (tmp_path / part).write_bytes(b"half")
    save_checkpoint(dict(state_dict={}), str(tmp_path / "iter_1.pth"))
    left = {f"{here}{os.getppid()}.part", f"{elsewhere}{dead.pid}.part", "iter_1.pth"}
    assert {path.name for path in tmp_path.iterdir()} == left
