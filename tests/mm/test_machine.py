"""What the machine can't run is replaced, and said."""

import platform
import subprocess
import sys

import pytest
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from nat_dense.mm import machine, runner
from nat_dense.mm.config import load_config
from nat_dense.mm.machine import fit_to_machine
from nat_dense.mm.options import enable_amp
from nat_dense.mm.processes import VARIABLES
from tests.mm.small import DETECTOR, SEGMENTOR


@pytest.fixture
def device(monkeypatch):
    """Sets the device that MMEngine would find."""
    return lambda name: monkeypatch.setattr(machine, "get_device", lambda: name)


def test_mixed_precision_without_an_accelerator(device):
    device("cpu")
    cfg = load_config(DETECTOR, {"optim_wrapper.loss_scale": "dynamic", "optim_wrapper.dtype": "float16"})
    notices = fit_to_machine(cfg)
    assert any("AmpOptimWrapper is replaced by OptimWrapper" in notice for notice in notices)
    assert cfg.optim_wrapper.type == "OptimWrapper"
    assert not {"loss_scale", "dtype"} & set(cfg.optim_wrapper)
    assert cfg.optim_wrapper.optimizer.lr == 1e-4


def test_mixed_precision_stays_on_a_gpu(device):
    device("cuda")
    cfg = load_config(DETECTOR)
    fit_to_machine(cfg)
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"


def test_sync_batch_norm_of_one_process(device):
    device("cpu")
    cfg = load_config(SEGMENTOR, {"model.backbone.init_cfg": None})
    assert any("SyncBN is replaced by BN" in notice for notice in fit_to_machine(cfg))
    init_default_scope("mmseg")
    model = MODELS.build(cfg.model)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) > 5


def test_sync_batch_norm_of_several_processes_stays(device):
    device("cuda")
    cfg = load_config(SEGMENTOR, {"launcher": "pytorch"})
    fit_to_machine(cfg)
    assert cfg.model.decode_head.norm_cfg.type == "SyncBN"


def test_classes_in_place_of_their_names(device):
    """As configs hold them that import what they use."""
    device("cpu")
    evaluator = dict(type=CocoMetric, ann_file="x.json")
    norm = dict(type=nn.SyncBatchNorm)
    cfg = Config(dict(default_scope="mmdet", optim_wrapper=dict(type=AmpOptimWrapper, loss_scale="dynamic")))
    cfg.merge_from_dict(dict(model=dict(norm_cfg=norm), val_evaluator=evaluator))
    notices = fit_to_machine(cfg)
    assert [cfg.optim_wrapper, cfg.model.norm_cfg.type] == [dict(type="OptimWrapper"), "BN"]
    assert cfg.val_evaluator.type == "FasterCocoMetric"
    assert len(notices) == 2
    cfg.optim_wrapper.type = OptimWrapper
    enable_amp(cfg)
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"


def test_classes_of_the_same_name(device):
    """Of a user's, which stay."""
    device("cpu")

    class CocoMetric:
        pass

    for metric in (CocoMetric, "mypose.CocoMetric"):
        cfg = Config(dict(default_scope="mmdet", model=dict(type="mypose.SyncBN"), val_evaluator=dict(type=metric)))
        assert fit_to_machine(cfg) == []
        assert cfg.val_evaluator.type == metric
        assert cfg.model.type == "mypose.SyncBN"


def test_slurm_needs_gpus(device):
    device("cpu")
    with pytest.raises(ValueError, match="launcher 'slurm' runs one process per GPU"):
        fit_to_machine(Config(dict(launcher="slurm")))


def test_several_processes_without_gpus(device, monkeypatch):
    device("cpu")
    for name in VARIABLES:
        monkeypatch.setenv(name, "1")
    cfg = load_config(SEGMENTOR, {"launcher": "pytorch"})
    cfg.find_unused_parameters = True
    notices = fit_to_machine(cfg)
    assert any("exchange gradients through gloo" in notice for notice in notices)
    assert any("separate statistics in each process" in notice for notice in notices)
    assert cfg.model.decode_head.norm_cfg.type == "BN"
    assert cfg.model_wrapper_cfg == dict(
        type="CPUDistributedDataParallel", broadcast_buffers=False, find_unused_parameters=True
    )


def test_persistent_workers_without_workers(device):
    device("cpu")
    cfg = load_config(DETECTOR, {"val_dataloader.num_workers": 0})
    assert "val_dataloader: no workers, so persistent_workers is off." in fit_to_machine(cfg)
    assert not cfg.val_dataloader.persistent_workers
    assert cfg.train_dataloader.persistent_workers


@pytest.mark.parametrize("installed", [True, False])
def test_faster_evaluation_where_it_is_installed(device, monkeypatch, installed):
    device("cpu")
    monkeypatch.setattr(machine, "find_spec", lambda name: object() if installed else None)
    cfg = load_config(DETECTOR)
    notices = fit_to_machine(cfg)
    assert cfg.val_evaluator.type == ("FasterCocoMetric" if installed else "CocoMetric")
    assert any("pip install faster-coco-eval" in notice for notice in notices) != installed
    cfg = load_config(DETECTOR)
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = None  # annotations come out of the pipeline
    fit_to_machine(cfg)
    assert cfg.val_evaluator.type == "CocoMetric"


FAULTS = """
import ctypes, resource, sys
from nat_dense.mm.machine import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        blocks = [libc.malloc(256 << 20) for _ in range(10)]  # together more than an int counts
        for block in blocks:
            ctypes.memset(block, 1, 1 << 20)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults(2)
print(faults(4))
"""
"""How many pages of memory the system hands out for blocks that are freed and allocated again."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library isn't glibc")
def test_freed_memory_is_kept():
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "give back")
    )
    assert given_back > 4 * 10  # pages may be huge ones
    assert kept < given_back / 10


@pytest.mark.parametrize(
    ("mode", "name", "kept"), [("train", "cpu", True), ("test", "cpu", False), ("train", "cuda", False)]
)
def test_training_on_a_cpu_keeps_memory(mode, name, kept, monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "get_device", lambda: name)
    monkeypatch.setattr(runner, "keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(runner, "check_model", lambda *_, **__: 1 / 0)  # all that is asked here lies before
    with pytest.raises(ZeroDivisionError):
        runner.build_runner(load_config(SEGMENTOR), mode)
    assert len(calls) == kept
