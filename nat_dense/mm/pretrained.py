"""`init_cfg=dict(type="Pretrained", checkpoint=...)` through `nat_dense.checkpoints.load`.

Importing this module replaces MMEngine's initializer, whose matching loses tensors silently. Files and modules that
have nothing of ours in them still go to MMEngine's: stock models rely on its leniency.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmengine.logging import print_log
from mmengine.model.weight_init import WEIGHT_INITIALIZERS, PretrainedInit, update_init_info
from torch import nn

if TYPE_CHECKING:
    from nat_dense.checkpoints.loading import Report


@WEIGHT_INITIALIZERS.register_module(name="Pretrained", force=True)
class Pretrained:
    """An initializer for MMEngine that loads a checkpoint and logs where every tensor went.

    It accounts for every tensor where the module (a backbone, a classifier, a whole detector or segmentor) or the file
    (a detector whose neck is wanted: `prefix="neck"`) has one of our backbones in it.

    Args:
        checkpoint: As `load`'s `source`, or for models that aren't ours anything that MMEngine reads.
        prefix, resize_rpb, replace_head, trust, sha256, entry: As in `load`.
        map_location: Accepted because MMEngine's has it; no effect: values are copied to where the model is.

    Raises:
        ValueError: Other fields are given, such as those of another initializer in a config's parent.
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
        **others: object,
    ):
        if others:
            known = [name for name in inspect.signature(Pretrained).parameters if name != "others"]
            raise ValueError(
                f"init_cfg=dict(type='Pretrained', ...) of {checkpoint} has the fields {', '.join(others)}; expected "
                f"only {', '.join(known)}. If they come from a parent config, replace all of it: "
                "init_cfg=dict(_delete_=True, ...), or init_cfg._delete_=True beside them in --cfg-options"
            )
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.reading: dict[str, Any] = dict(trust=trust, sha256=sha256, entry=entry)
        self.matching: dict[str, Any] = dict(resize_rpb=resize_rpb, replace_head=replace_head)

    def __call__(self, module: nn.Module) -> None:
        """Loads into a module; errors are those of `load`.

        Raises:
            ValueError: An option that only `load` knows is given, and neither module nor file is ours.
        """
        from nat_dense.checkpoints.loading import backbone_paths

        if not backbone_paths(module) and not self._file_is_ours():
            self._leave_to_mmengine(module)
            return
        print_log(str(self.load_into(module)), logger="current")
        # Present while mmengine initialises a model and records for each parameter where its value comes from.
        if hasattr(module, "_params_init_info"):
            update_init_info(module, init_info=f"Pretrained: {self.checkpoint}")

    def load_into(self, module: nn.Module) -> Report:
        """Loads into one of our models, without logging."""
        from nat_dense.checkpoints import load  # here, since importing nat_dense needs no reader of files

        return load(module, self.checkpoint, prefix=self.prefix, **self.reading, **self.matching)

    def _file_is_ours(self) -> bool:
        from nat_dense.checkpoints import fetch, read
        from nat_dense.checkpoints.download import local
        from nat_dense.checkpoints.layout import find_backbones, unwrap
        from nat_dense.checkpoints.names import URLS

        # Any other address holds a stock model, and MMEngine has a cache of its own.
        if not (local(self.checkpoint) or self.checkpoint in {*URLS, *URLS.values()}):
            return False
        try:
            checkpoint = read(fetch(self.checkpoint), **self.reading)
        except ValueError:  # left to MMEngine, which may know the format
            return False
        return bool(find_backbones(unwrap(checkpoint.tensors)[0]))

    def _leave_to_mmengine(self, module: nn.Module) -> None:
        given = [name for name, value in (self.reading | self.matching).items() if value]
        if given:
            raise ValueError(
                f"init_cfg of {type(module).__name__}: {', '.join(given)} is for NAT, DiNAT and DiNAT_s, and neither "
                f"this module nor {self.checkpoint} has one; leave it out"
            )
        PretrainedInit(self.checkpoint, self.prefix)(module)


def through_this_door(init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """An `init_cfg` whose "Pretrained" entries are ours, including those that name MMEngine's class."""
    entries = [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg or ()
    ours = {"type": Pretrained}
    return [{**entry, **(ours if entry["type"] in ("Pretrained", PretrainedInit) else {})} for entry in entries]
