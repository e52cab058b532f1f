"""Parameters that are treated alike go to the optimizer together."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, with one parameter group for each set of settings instead of one for each parameter.

    The updates are the same to the bit. torch's optimizers work group by group: with a group for each of a model's
    hundreds of parameters, their fused and multi-tensor steps never have more than one tensor to work on, and every
    learning-rate schedule has hundreds of numbers to set.

    A checkpoint holds one state a group: one that was saved with another constructor can't be resumed.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module: Any = None) -> None:
        """As MMEngine's, which calls itself for a module's children with their names as `prefix`."""
        super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:
            params[:] = _merged(params)


def _merged(groups: list[dict]) -> list[dict]:
    """Groups of equal settings as one, in the order of their first parameters."""
    merged: list[dict] = []
    for group in groups:
        settings = {name: value for name, value in group.items() if name != "params"}
        for other in merged:
            if settings == {name: value for name, value in other.items() if name != "params"}:
                other["params"] += group["params"]
                break
        else:
            merged.append(group | dict(params=list(group["params"])))
    return merged
