"""Modules without memory for their weights: built in a fraction of a second, good for shapes and counts."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import nn
from torch.overrides import TorchFunctionMode


class _RatesOnCpu(TorchFunctionMode):
    """Keeps `torch.linspace` on the CPU: constructors read drop path rates from it, which meta tensors don't hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.linspace:
            kwargs = {**(kwargs or {}), "device": "cpu"}
        return func(*args, **(kwargs or {}))


def build_on_meta(node: dict, scope: str | None = None) -> nn.Module:
    """Builds a part of a config on the meta device; nothing is initialised or downloaded.

    Args:
        node: A config with `type`, of a model or a part of one. Not changed.
        scope: The library whose registry knows the type ("mmdet", "mmseg"); the active one where None.

    Returns:
        The module with parameters and buffers on the meta device.
    """
    with MODELS.switch_scope_and_registry(scope) as registry:
        # Imports the scope's modules, which make tensors of their own, before the device changes.
        if isinstance(node.get("type"), str):
            registry.get(node["type"])
        try:
            with torch.device("meta"), _RatesOnCpu():
                module = registry.build(node)
        except (RuntimeError, NotImplementedError):
            # A constructor that reads the values of some other tensor; only a real device has them.
            module = registry.build(node)
    return module.to("meta")
