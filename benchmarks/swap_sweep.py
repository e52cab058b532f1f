"""Swaps the backbone of every config that ships with the installed MMDetection and MMSegmentation, and counts.

python benchmarks/swap_sweep.py --results sweep.json --runs 150 --table docs/swap_configs.md

Each config ends up in one of four classes: swapped and built; refused with a reason; the original itself neither parses
nor builds here; failed. Some of the swapped models, chosen at random, also run a loss forward and backward on random
pictures. The results file is written as the sweep goes; a second start goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import random
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Detectors with a text encoder fetch it when they are built; here nothing is downloaded. huggingface_hub reads this
# when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from random_batches import SIDE, random_detection_batch, random_segmentation_batch
from swap_table import write_page

import nat_dense  # noqa: F401  (registers the backbones)
from nat_dense.mm.config import DISTRIBUTIONS, load_config
from nat_dense.mm.errors import describe
from nat_dense.mm.machine import fit_to_machine
from nat_dense.mm.meta import build_on_meta
from nat_dense.mm.swap import SwapRefusedError, plan_swap

BACKBONE = "nat-tiny"
RUN_BACKBONES = ("nat-mini", "dinat-mini", "dinat_s-tiny")
"""The models that run take these in turn: one of each family, the smallest that is published."""

SEED = 7
SAVE_EVERY = 25


def shipped_configs() -> Iterator[str]:
    """The names of all configs of the installed libraries, without the parts that they inherit from."""
    for scope in DISTRIBUTIONS:
        spec = find_spec(scope)
        if spec is None or not spec.submodule_search_locations:
            continue
        root = Path(spec.submodule_search_locations[0], ".mim", "configs")
        for file in sorted(root.rglob("*.py")):
            if "_base_" not in file.relative_to(root).parts:
                yield f"{scope}::{file.relative_to(root).as_posix()}"


def classify(name: str) -> dict[str, Any]:
    """Swaps and builds one config; returns its class and the reason for it."""
    try:
        cfg = load_config(name)
    except Exception as error:
        return dict(outcome="original", reason=f"doesn't parse: {describe(error)[:200]}")
    if not cfg.get("model"):
        return dict(outcome="original", reason="the file has no model: it is a part of other configs")
    facts = dict(model=str(cfg.model.get("type")), old=str((cfg.model.get("backbone") or {}).get("type")))
    before = copy.deepcopy(cfg._cfg_dict)
    try:
        swap = plan_swap(cfg, BACKBONE)
    except SwapRefusedError as error:
        return facts | dict(outcome="refused", reason=str(error))
    except Exception as error:
        return facts | _blame(cfg, error)
    if cfg._cfg_dict != before:
        return facts | dict(outcome="failed", reason="the swap changed its input")
    fit_to_machine(swap.cfg)
    try:
        build_on_meta(swap.cfg.model, swap.cfg.get("default_scope"))
    except Exception as error:
        return facts | _blame(cfg, error)
    return facts | dict(outcome="built", notes=swap.notes)


def _blame(cfg: Config, error: Exception) -> dict[str, Any]:
    """Whose fault it is: the original's, if it doesn't build either."""
    try:
        build_on_meta(cfg.model, cfg.get("default_scope"))
    except Exception as original:
        return dict(outcome="original", reason=f"doesn't build: {describe(original)[:200]}")
    return dict(outcome="failed", reason=describe(error)[:400], trace=traceback.format_exception(error)[-3:])


def run_once(name: str, backbone: str) -> dict[str, Any]:
    """One loss forward and backward of a swapped model on random pictures, on the CPU."""
    cfg = load_config(name)
    try:
        plan_swap(cfg, backbone)  # the first one imports the library
        start = time.process_time()
        cfg = plan_swap(cfg, backbone).cfg
        swap_seconds = time.process_time() - start
        fit_to_machine(cfg)
        cfg.model.data_preprocessor.batch_augments = None
        if "decode_head" in cfg.model:
            cfg.model.data_preprocessor.update(size=(SIDE, SIDE), size_divisor=None)
        torch.manual_seed(SEED)
        # What a Runner tells the losses that warm up.
        MessageHub.get_instance("swap_sweep").update_info_dict(dict(iter=0, epoch=0))
        with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
            model = registry.build(cfg.model)
            model.train()
            _check_gradients(model, _loss(model, cfg))
    except Exception as error:
        trace = traceback.format_exception(error)[-3:]
        return dict(runs=False, backbone=backbone, reason=describe(error)[:400], trace=trace)
    return dict(runs=True, backbone=backbone, swap_seconds=swap_seconds)


def _loss(model: Any, cfg: Config) -> torch.Tensor:
    if "decode_head" in cfg.model:
        head = cfg.model.decode_head[-1] if isinstance(cfg.model.decode_head, list) else cfg.model.decode_head
        classes = head.num_classes if "num_classes" in head else head.kernel_generate_head.num_classes
        batch = random_segmentation_batch(SEED, classes)
    else:
        batch = random_detection_batch(SEED, masks=_loads_masks(cfg.get("train_dataloader")))
    data = model.data_preprocessor(batch, training=True)
    loss, _ = model.parse_losses(model.loss(data["inputs"], data["data_samples"]))
    return loss


def _loads_masks(node: Any) -> bool:
    """Whether the training pipeline loads masks; some losses behave differently where there are any."""
    if isinstance(node, dict):
        return bool(node.get("with_mask")) or any(_loads_masks(value) for value in node.values())
    return isinstance(node, (list, tuple)) and any(_loads_masks(value) for value in node)


def _check_gradients(model: Any, loss: torch.Tensor) -> None:
    """Every trained parameter of the backbone, up to the last stage that is read, must have a gradient."""
    if not torch.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss.item()}")
    loss.backward()
    backbone, last = model.backbone, max(model.backbone.out_indices)
    unread = (f"{last}.downsample", *range(last + 1, len(backbone.depths)))
    behind = tuple(f"{backbone.stages_name}.{part}." for part in unread)
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad and not name.startswith(behind)}
    without = [name for name, p in trained.items() if p.grad is None]
    if without:
        raise ArithmeticError(f"no gradient reaches the backbone's {', '.join(without[:4])} ({len(without)} in all)")


def sweep(names: list[str], results: dict[str, dict], runs: int, save: Callable[[], None]) -> None:
    """Classifies each config that has no result yet; the first `runs` of the swapped and built ones also run."""
    configs, ran = results["configs"], results["runs"]
    built = 0
    for i, name in enumerate(names, 1):
        if name not in configs:
            configs[name] = classify(name)
        if configs[name]["outcome"] == "built":
            if built < runs and name not in ran:
                ran[name] = run_once(name, RUN_BACKBONES[built % len(RUN_BACKBONES)])
            built += 1
        if i == SAVE_EVERY:
            # The libraries are imported by now; the collector need not look at what they hold again and again.
            gc.freeze()
        if i % SAVE_EVERY == 0 or i == len(names):
            save()
            print(f"{i} of {len(names)} configs, {len(ran)} runs", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", required=True, metavar="FILE", help="JSON; read if it exists, then added to")
    parser.add_argument("--runs", type=int, default=150, help="how many swapped models run forward and backward")
    parser.add_argument("--match", default="", help="only configs with this text in their names")
    parser.add_argument("--table", metavar="FILE", help="write the page with the counts here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    file = Path(args.results)
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else dict(configs={}, runs={})

    def save() -> None:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    # In random order, so that the first ones are a fair sample already.
    names = sorted(name for name in shipped_configs() if args.match in name)
    random.Random(SEED).shuffle(names)
    sweep(names, results, args.runs, save)
    if args.table:
        configs = {name: results["configs"][name] for name in names}
        built = [name for name in names if configs[name]["outcome"] == "built"]
        runs = {name: results["runs"][name] for name in built[: args.runs]}
        write_page(Path(args.table), configs, runs, BACKBONE, SEED)


if __name__ == "__main__":
    main()
