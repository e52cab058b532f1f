"""Fits a config to the machine it runs on, and returns notes for the user on what was replaced."""

import ctypes
import platform
from importlib.util import find_spec
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device

from nat_dense.mm.config import LOADERS
from nat_dense.mm.fields import dicts_in, is_of
from nat_dense.mm.processes import use_cpus

AMP_DEVICES = ("cuda", "npu", "mlu", "musa")
"""The devices on which MMEngine's AmpOptimWrapper runs; it asserts one of them."""

AMP_ARGUMENTS = ("loss_scale", "dtype", "use_fsdp")
"""What AmpOptimWrapper takes and OptimWrapper does not."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


def fit_to_machine(cfg: Config, *, training: bool = True) -> list[str]:
    """Replaces, in place, what this machine can't run by what does the same work on it.

    Mixed precision without an accelerator, SyncBN in a single process or without GPUs, MMEngine's distributed model
    without GPUs, persistent data workers if there are no workers, and pycocotools' mAP if faster-coco-eval is
    installed (the same numbers, faster).

    Args:
        cfg: the config; changed in place.
        training: whether it is to be trained; testing has no optimizer.

    Returns:
        One note for each replacement.

    Raises:
        ValueError: on a machine without a GPU, the launcher is slurm, or torchrun didn't start this process.
    """
    device = get_device()
    launcher = cfg.get("launcher", "none")
    notices = []
    if launcher != "none" and device not in AMP_DEVICES:
        if launcher != "pytorch" or device != "cpu":
            raise ValueError(
                f"launcher {launcher!r} runs one process per GPU and this machine has none; use tools/dist_train.sh "
                "for several processes on the CPU, or leave --launcher out for one."
            )
        use_cpus(cfg)
        notices.append("No GPU: each process trains on the CPU, and they exchange gradients through gloo.")
        if replace_sync_norms(cfg.get("model", {})):
            notices.append("No GPU: SyncBN is replaced by BN, with separate statistics in each process.")
    wrapper = cfg.get("optim_wrapper") or {}
    if training and is_of(wrapper, "mmengine", "AmpOptimWrapper") and device not in AMP_DEVICES:
        wrapper["type"] = "OptimWrapper"
        for argument in AMP_ARGUMENTS:
            wrapper.pop(argument, None)
        notices.append("No accelerator: AmpOptimWrapper is replaced by OptimWrapper; training runs in float32.")
    if launcher == "none" and replace_sync_norms(cfg.get("model", {})):
        notices.append("One process: SyncBN is replaced by BN, which computes the same.")
    for name in LOADERS["train" if training else "test"]:
        loader = cfg.get(name) or {}
        if loader.get("num_workers") == 0 and loader.get("persistent_workers"):
            loader["persistent_workers"] = False
            notices.append(f"{name}: no workers, so persistent_workers is off.")
    return notices + _prefer_faster_coco(cfg)


def keep_freed_memory() -> bool:
    """Asks the C library to keep what this process frees for what it allocates next; returns whether it does (glibc).

    A training step allocates the same large blocks as the one before. If they are returned in between, the system maps
    and clears each again: up to a tenth of a step on a CPU. The process then stays at its largest size.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))  # -1: never, of any size


SYNC_NORMS = (("mmengine", "SyncBN"), ("mmcv", "MMSyncBN", "SyncBatchNorm"), ("torch", "SyncBatchNorm"))
"""By library: names in the registry and, where a config holds the class itself, the class's."""


def replace_sync_norms(model: Any) -> bool:
    """Replaces, in place, the batch norms that need several processes by BN; returns whether there were any."""
    found = [node for _, node in dicts_in(model) if any(is_of(node, *norm) for norm in SYNC_NORMS)]
    for node in found:
        node["type"] = "BN"
    return bool(found)


def _prefer_faster_coco(cfg: Config) -> list[str]:
    """Replaces COCO's metric by the faster one if it reads a file: from a pipeline, the faster one needs more."""
    evaluators = [node for name in ("val_evaluator", "test_evaluator") for _, node in dicts_in(cfg.get(name))]
    coco = [node for node in evaluators if is_of(node, "mmdet", "CocoMetric") and node.get("ann_file")]
    if not coco or cfg.get("default_scope") != "mmdet":
        return []
    from mmdet.registry import METRICS

    if find_spec("faster_coco_eval") is None or METRICS.get("FasterCocoMetric") is None:
        return ["mAP is computed by pycocotools; `pip install faster-coco-eval` makes it several times faster."]
    for node in coco:
        node["type"] = "FasterCocoMetric"
        node.pop("use_mp_eval", None)
    return []
