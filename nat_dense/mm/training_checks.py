"""Finds what is wrong with a config's optimizer, schedules, loops or hooks before anything is written.

MMEngine builds them when training starts, in a work-dir that then exists. A misspelt field of its CheckpointHook shows
only at the first checkpoint, when the training so far is lost, and one of `paramwise_cfg` never does.
"""

import logging
import warnings
from collections.abc import Iterator
from inspect import signature
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import (
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    VISBACKENDS,
    VISUALIZERS,
)
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner.priority import Priority, get_priority
from torch import Tensor, nn

from nat_dense.mm.errors import at_least, describe, did_you_mean, nearly
from nat_dense.mm.fields import check_fields, check_node, class_of, default_loop, dicts_in, type_name

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
"""Rules for which those constructors need a weight decay."""

COUNTS = {"max_epochs": 1, "max_iters": 1, "val_interval": 1, "val_begin": 0}
"""Fields of loops that are counts, and their minimum: with less, MMEngine trains nothing, or fails later."""

SOME_BATCHES = 100
"""Assumed iterations per epoch for schedules that are converted to them; the real number isn't known yet."""

NUMBERS = ("lr", "weight_decay", "momentum")
"""Fields of optimizers that are a single number."""

LEFT_OUT_BY_NONE = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
"""The hooks that MMEngine adds, and that `default_hooks` can remove."""

REPORTERS = {"visualizer": (VISUALIZERS, "Visualizer"), "log_processor": (LOG_PROCESSORS, "LogProcessor")}
"""What shows and writes a run's results, its registry, and the type that the Runner uses if none is given."""

ENVIRONMENT = ("cudnn_benchmark", "dist_cfg", "mp_cfg", "resource_limit")
"""What MMEngine's Runner looks for in `env_cfg`."""


def check_training(cfg: Config, model: nn.Module) -> list[str]:
    """Checks all that trains a model, but not the model itself.

    Args:
        cfg: the config; its `default_scope` must be active.
        model: the model that it builds; not changed.

    Returns:
        Notes for the user on schedules that have no time to act and rules that match no parameter.

    Raises:
        ValueError: a field or a type is misspelt, a count or a number isn't one, or the optimizer can't be built for
            the model.
    """
    level, seed = cfg.get("log_level", "INFO"), (cfg.get("randomness") or {}).get("seed")
    if isinstance(level, str) and not isinstance(logging.getLevelName(level), int):
        raise ValueError(f"log_level is {level!r}: expected a level of Python's logging, such as 'INFO' or 'DEBUG'.")
    if seed is not None and not isinstance(seed, int):
        raise ValueError(f"randomness.seed is {seed!r}: expected a whole number, or None to draw one.")
    fields = [field for field in signature(Runner.set_randomness).parameters if field != "self"]
    check_fields("randomness", "Runner", cfg.get("randomness") or {}, fields)
    check_fields("env_cfg", "Runner", cfg.get("env_cfg") or {}, ENVIRONMENT)
    for name, (registry, usual) in REPORTERS.items():
        if isinstance(node := cfg.get(name), dict):
            check_node(name, {"type": usual, **node}, registry)
    for name, node in _typed((cfg.get("visualizer") or {}).get("vis_backends"), "visualizer.vis_backends"):
        check_node(name, node, VISBACKENDS)
    for name in ("train_cfg", "val_cfg", "test_cfg"):
        node = cfg.get(name)
        if isinstance(node, dict):
            check_node(name, default_loop(name, node), LOOPS, ("by_epoch",))
            for field in COUNTS.keys() & node.keys():
                _check_count(f"{name}.{field}", node[field], COUNTS[field])
    schedulers = list(_typed(cfg.get("param_scheduler"), "param_scheduler"))
    for name, node in schedulers:
        check_node(name, node, PARAM_SCHEDULERS, ("convert_to_iter_based",))
    _check_places_of_hooks(cfg)
    for place in ("default_hooks", "custom_hooks"):
        for name, node in _typed(cfg.get(place), place):
            cls = check_node(name, node, HOOKS, ("priority",))
            _check_priority(f"{name}.priority", node.get("priority", "NORMAL"))
            if "interval" in node and cls in (CheckpointHook, LoggerHook):
                _check_count(f"{name}.interval", node["interval"], 1, never=-1)
    wrapper = cfg.get("optim_wrapper")
    notes = [note for name, node in schedulers if (note := _note_of_time(name, node, cfg.get("train_cfg") or {}))]
    if isinstance(wrapper, dict) and isinstance(wrapper.get("optimizer"), dict) and "strategy" not in cfg:
        built = _check_optimizer(wrapper, model)
        notes += _notes_of_rules(wrapper, model)
        for name, node in schedulers:
            _check_schedule(name, node, built, cfg.get("train_cfg"))
    return notes


def _check_places_of_hooks(cfg: Config) -> None:
    """Checks the form of both places, where MMEngine doesn't say which hook is wrong."""
    named = cfg.get("default_hooks") or {}
    for name, node in named.items():
        if isinstance(node, dict) and "type" not in node:
            hint = did_you_mean(name, [other for other in named if other != name])
            raise ValueError(f"default_hooks.{name} has no type: expected a hook's config.{hint}")
        if node is None and name not in LEFT_OUT_BY_NONE:
            raise ValueError(
                f"default_hooks.{name} is None, which only removes {', '.join(LEFT_OUT_BY_NONE)}: expected a hook's "
                "config."
            )
    if isinstance(cfg.get("custom_hooks"), dict):
        raise ValueError("custom_hooks is a dict: expected a list of hooks' configs.")


def _check_priority(name: str, given: Any) -> None:
    try:
        get_priority(given)
    except (KeyError, TypeError, ValueError):
        names = ", ".join(priority.name for priority in Priority)
        raise ValueError(f"{name} is {given!r}: expected 0 to 100, or one of {names}.") from None


def _note_of_time(name: str, node: dict, loop: dict) -> str | None:
    """A note if a schedule begins after the training ends, or a warm-up outlasts it."""
    end = loop.get("max_epochs" if node.get("by_epoch", True) else "max_iters")
    if not isinstance(end, (int, float)):
        return None
    unit = "epoch" if node.get("by_epoch", True) else "iteration"
    if node.get("begin", 0) >= end:
        return f"{name} begins at {unit} {node['begin']}, but training ends at {end}: it never acts."
    if _warms_up(node) and isinstance(node.get("end"), (int, float)) and node["end"] > end:
        return f"{name} warms up until {unit} {node['end']}, but training ends at {end}: it stays below its full rate."
    return None


def _warms_up(node: dict) -> bool:
    """Whether a schedule's rate grows to its full size; omitted factors are a third and one."""
    if type_name(node) == "LinearLR":
        return node.get("start_factor", 1 / 3) < node.get("end_factor", 1.0)
    return type_name(node) == "ConstantLR" and node.get("factor", 1 / 3) < 1


def _notes_of_rules(wrapper: dict, model: nn.Module) -> list[str]:
    """Reports rules for single parameters that match none."""
    if wrapper.get("constructor", CONSTRUCTORS[0]) not in CONSTRUCTORS:
        return []
    names = [name for name, _ in model.named_parameters()]
    rules = (wrapper.get("paramwise_cfg") or {}).get("custom_keys") or {}
    return [
        f"optim_wrapper.paramwise_cfg.custom_keys[{key!r}]: no parameter name contains {key!r}."
        for key in rules
        if not any(key in name for name in names)
    ]


def _check_count(name: str, value: Any, least: int, never: int | None = None) -> None:
    is_whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    if not is_whole or (value < least and value != never):
        raise ValueError(
            f"{name} is {value!r}: expected a whole number, {least} or more" + (f" ({never}: never)." if never else ".")
        )


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
            warnings.simplefilter("ignore")  # torch's, that no optimizer has stepped
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
    if class_of(default_loop("train_cfg", loop), LOOPS) is IterBasedTrainLoop:
        raise ValueError(
            f"{name} counts epochs (by_epoch=True, the default), but train_cfg counts iterations: it would never step. "
            "Set by_epoch=False."
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
        with at_least(logging.ERROR):  # the constructor logs every parameter
            return build_optim_wrapper(model, Config({"wrapper": wrapper}).wrapper)
    except Exception as error:
        raise ValueError(f"optim_wrapper: {describe(error)}") from error


def _check_paramwise(wrapper: dict) -> None:
    """Checks the rules for single parameters, if the constructor is known."""
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
            f"optim_wrapper.optimizer has no weight_decay, which {name} multiplies (decay_mult). Set it; 0 means no "
            "decay."
        )
