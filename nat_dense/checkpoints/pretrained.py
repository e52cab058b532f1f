"""`init_cfg=dict(type="Pretrained", checkpoint=...)` of a backbone, through `load` instead of mmengine's own loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.model.weight_init import PretrainedInit, update_init_info
from torch import nn

from nat_dense.checkpoints.loading import load


class Pretrained:
    """An initializer for mmengine that loads a checkpoint and logs where every tensor went.

    Args:
        checkpoint, prefix, resize_rpb, replace_head, trust, sha256, entry: As in `load`.
        map_location: Accepted since mmengine's has it; without effect, values are copied to where the model is.
    """

    def __init__(
        self,
        checkpoint: str,
        prefix: str | None = None,
        map_location: str | None = None,
        resize_rpb: bool = False,
        replace_head: bool = False,
        trust: bool = False,
        sha256: str | None = None,
        entry: str | None = None,
    ):
        self.checkpoint = checkpoint
        self.options: dict[str, Any] = dict(prefix=prefix, resize_rpb=resize_rpb, replace_head=replace_head)
        self.options |= dict(trust=trust, sha256=sha256, entry=entry)

    def __call__(self, module: nn.Module) -> None:
        """Loads into a backbone or classifier; errors are those of `load`."""
        report = load(module, self.checkpoint, **self.options)
        print_log(str(report), logger="current")
        # There while mmengine initialises a model and notes for each parameter where its value comes from.
        if hasattr(module, "_params_init_info"):
            update_init_info(module, init_info=f"Pretrained: {self.checkpoint}")


def through_this_door(init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """An `init_cfg` whose "Pretrained" entries are ours."""
    entries = [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg or ()
    ours = {"type": Pretrained}
    return [{**entry, **(ours if entry["type"] in ("Pretrained", PretrainedInit) else {})} for entry in entries]
