"""What is wrong with a config's optimizer, schedules, loops or hooks is found before anything is written.

MMEngine builds them when training starts, in a work-dir that then exists. A misspelt field of its CheckpointHook shows
at the first checkpoint, when all that was trained until then is lost, and one of `paramwise_cfg` never.
"""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import HOOKS, LOOPS, OPTIM_WRAPPERS, OPTIMIZERS, PARAM_SCHEDULERS
from mmengine.runner import IterBasedTrainLoop
from torch import Tensor, nn

from nat_dense.mm.errors import at_least, describe, nearly
from nat_dense.mm.fields import check_fields, check_node, class_of, dicts_in

CONSTRUCTORS = ("DefaultOptimWrapperConstructor", "GroupedOptimWrapperConstructor")
PARAMWISE = (
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "flat_decay_mult",
    "dwconv_decay_mult",
    "dcn_offset_lr_mult",
    "bypass_duplicate",
)
"""What those constructors look for in `paramwise_cfg`; others have more."""

RULES = ("lr_mult", "decay_mult")
"""What those constructors multiply by a rule of `custom_keys`; other fields are the optimizer's."""

DECAYS = {"decay_mult", "bias_decay_mult", "norm_decay_mult", "dwconv_decay_mult"}
"""Rules for which those constructors ask for a weight decay."""

COUNTS = {"max_epochs": 1, "max_iters": 1, "val_interval": 1, "val_begin": 0}
"""Fields of loops that count, and the least that they may be: with less MMEngine trains nothing, or fails later."""

SOME_BATCHES = 100
"""Iterations an epoch for schedules that are converted to them; how many there will be is not known before."""

NUMBERS = ("lr", "weight_decay", "momentum")
"""Fields of optimizers that are one number."""

ENVIRONMENT = ("cudnn_benchmark", "dist_cfg", "mp_cfg", "resource_limit")
"""What MMEngine's Runner looks for in `env_cfg`."""


def check_training(cfg: Config, model: nn.Module) -> None:
    """Checks all that trains a model and isn't one.

    Args:
        cfg: the config; its `default_scope` must be active.
        model: the model that it builds; not changed.

    Raises:
        ValueError: a field or a type is misspelt, a count or a number is none, or the optimizer can't be built for the
            model.
    """
    level, seed = cfg.get("log_level", "INFO"), (cfg.get("randomness") or {}).get("seed")
    if isinstance(level, str) and not isinstance(logging.getLevelName(level), int):
        raise ValueError(f"log_level is {level!r}: expected a level of Python's logging, such as 'INFO' or 'DEBUG'.")
    if seed is not None and not isinstance(seed, int):
        raise ValueError(f"randomness.seed is {seed!r}: expected a whole number, or None to draw one.")
    check_fields("env_cfg", "Runner", cfg.get("env_cfg") or {}, ENVIRONMENT)
    for name in ("train_cfg", "val_cfg", "test_cfg"):
        node = cfg.get(name)
        if isinstance(node, dict):
            check_node(name, {"type": _default_loop(name, node), **node}, LOOPS, ("by_epoch",))
            for field in COUNTS.keys() & node.keys():
                _check_count(f"{name}.{field}", node[field], COUNTS[field])
    schedulers = list(_typed(cfg.get("param_scheduler"), "param_scheduler"))
    for name, node in schedulers:
        check_node(name, node, PARAM_SCHEDULERS, ("convert_to_iter_based",))
    for place in ("default_hooks", "custom_hooks"):
        for name, node in _typed(cfg.get(place), place):
            cls = check_node(name, node, HOOKS, ("priority",))
            if "interval" in node and cls in (CheckpointHook, LoggerHook):
                _check_count(f"{name}.interval", node["interval"], 1, never=-1)
    wrapper = cfg.get("optim_wrapper")
    if isinstance(wrapper, dict) and isinstance(wrapper.get("optimizer"), dict) and "strategy" not in cfg:
        built = _check_optimizer(wrapper, model)
        for name, node in schedulers:
            _check_schedule(name, node, built, cfg.get("train_cfg"))


def _check_count(name: str, value: Any, least: int, never: int | None = None) -> None:
    is_whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    if not is_whole or (value < least and value != never):
        raise ValueError(
            f"{name} is {value!r}: expected a whole number, {least} or more" + (f" ({never}: never)." if never else ".")
        )


def _default_loop(name: str, node: dict) -> str:
    """The loop that the Runner takes where none is named."""
    if name == "train_cfg":
        return "EpochBasedTrainLoop" if node.get("by_epoch", True) else "IterBasedTrainLoop"
    return "ValLoop" if name == "val_cfg" else "TestLoop"


def _typed(node: Any, name: str) -> Iterator[tuple[str, dict]]:
    """The configs of objects in a config, a list or a dict of them, with their places."""
    for place, found in dicts_in(node, name, lambda _, inner: "type" not in inner):
        if "type" in found:
            yield place, found


def _check_schedule(name: str, node: dict, wrapper: OptimWrapper, loop: Any) -> None:
    """Builds a schedule and takes up to two of its steps, from its beginning on."""
    fields, settings = dict(node), dict(optimizer=wrapper)
    if fields.get("convert_to_iter_based"):
        settings["epoch_length"] = SOME_BATCHES
    try:
        with at_least(logging.ERROR), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, that no optimizer has stepped
            scheduler = PARAM_SCHEDULERS.build(dict(fields), default_args=settings)
            acts_after_validation = getattr(scheduler, "need_val_args", False)
            if begin := fields.get("begin"):
                later = dict(end=fields["end"] - begin) if "end" in fields else {}
                scheduler = PARAM_SCHEDULERS.build(fields | later | dict(begin=0), default_args=settings)
            total = fields.get("total_steps")
            steps = min(2, total - 1) if isinstance(total, int) else 2
            for _ in range(0 if acts_after_validation else steps):
                scheduler.step()
    except Exception as error:  # constructors raise what they like
        raise ValueError(f"{name}: {describe(error)}") from error
    if not isinstance(loop, dict) or acts_after_validation or not getattr(scheduler, "by_epoch", False):
        return
    if class_of({"type": _default_loop("train_cfg", loop), **loop}, LOOPS) is IterBasedTrainLoop:
        raise ValueError(
            f"{name} counts epochs (by_epoch=True, which is the default), and train_cfg iterations: it would take no "
            "step. Set by_epoch=False."
        )


def _check_optimizer(wrapper: dict, model: nn.Module) -> OptimWrapper:
    own = {"type": "OptimWrapper", **wrapper}
    check_node("optim_wrapper", own, OPTIM_WRAPPERS, ("constructor", "paramwise_cfg"))
    check_node("optim_wrapper.optimizer", wrapper["optimizer"], OPTIMIZERS)
    for field in NUMBERS:
        value = wrapper["optimizer"].get(field)
        if value is not None and not isinstance(value, (int, float, Tensor)):
            raise ValueError(f"optim_wrapper.optimizer.{field} is {value!r}: expected a number.")
    _check_paramwise(wrapper)
    try:
        with at_least(logging.ERROR):  # the constructor tells of every parameter
            return build_optim_wrapper(model, Config({"wrapper": wrapper}).wrapper)
    except Exception as error:
        raise ValueError(f"optim_wrapper: {describe(error)}") from error


def _check_paramwise(wrapper: dict) -> None:
    """Checks the rules for single parameters, where the constructor is one that is known."""
    name, constructor = "optim_wrapper.paramwise_cfg", wrapper.get("constructor", CONSTRUCTORS[0])
    if constructor not in CONSTRUCTORS:
        return
    paramwise = wrapper.get("paramwise_cfg") or {}
    check_fields(name, constructor, paramwise, PARAMWISE)
    rules = paramwise.get("custom_keys") or {}
    if not isinstance(rules, dict) or not all(isinstance(rule, dict) for rule in rules.values()):
        raise ValueError(f"{name}.custom_keys is {rules!r}: expected a dict such as dict(head=dict(lr_mult=10.0)).")
    for key, rule in rules.items():
        for field in rule:
            # Names that end alike may be another optimizer's own.
            if not field.endswith("_mult") and (close := nearly(field, RULES)):
                raise ValueError(f"{name}.custom_keys[{key!r}] has no field {field!r}. Did you mean {close!r}?")
    decays = any(DECAYS.intersection(group) for group in (paramwise, *rules.values()))
    if decays and wrapper["optimizer"].get("weight_decay") is None:
        raise ValueError(
            f"optim_wrapper.optimizer has no weight_decay, of which {name} takes fractions (decay_mult). Set it; 0 "
            "decays nothing."
        )
