"""An optimizer that learns from few pictures, and groups of parameters that are treated alike."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from torch import Tensor, nn

from nat_dense.mm.errors import at_least

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients: five steps take singular values from 0.01 to 1 of the largest into about 0.7 - 1.2."""


@OPTIMIZERS.register_module()
class MuonAdamW(torch.optim.AdamW):
    """Muon for matrices that multiply feature vectors, AdamW for the rest, with one learning rate.

    Muon moves a matrix by the orthogonal matrix nearest to its averaged gradient: all directions alike, where Adam's
    step is mostly along the few strongest. Its step is scaled to the size of AdamW's, so that learning rate and decay
    mean the same in both. Convolutions count as matrices [out, in * height * width].

    `torch.optim.Muon` takes only matrices, and uses bfloat16 even on processors that only emulate it.

    Args:
        params: Parameters, named or not, or groups. A group's `muon=False` (`custom_keys` of MMEngine's `paramwise_cfg`
            may set it) gives all of it to AdamW; otherwise its matrices and convolutions of at least 16 x 16 go to
            Muon, except depthwise ones. Embeddings and tables kept as matrices are better given to AdamW.
        lr, betas, eps, weight_decay, fused: As of `torch.optim.AdamW`; `weight_decay` is Muon's as well.
        momentum: Share of the old average in Muon's average of the gradients, in all groups.
        ns_steps: Steps of the iteration that makes a matrix orthogonal, in all groups; fewer cost less and leave weak
            directions weak.

    Raises:
        ValueError: A number is out of range.
        RuntimeError: In `step`, for a sparse or complex gradient of a matrix.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the size of the step:
    Liu et al., "Muon is Scalable for LLM Training" (arXiv:2502.16982) section 2.2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        momentum: float = 0.95,
        ns_steps: int = 5,
        fused: bool | None = None,
    ):
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum={momentum}: expected a number in [0, 1)")
        if not isinstance(ns_steps, int) or ns_steps < 1:
            raise ValueError(f"ns_steps={ns_steps!r}: expected a whole number >= 1")
        self.momentum, self.ns_steps = momentum, ns_steps
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        self._step_supports_amp_scaling = False  # of AdamW's fused step: the scaler must unscale Muon's gradients too

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"momentum": self.momentum, "ns_steps": self.ns_steps}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; parameters for Muon and for AdamW are put into separate groups."""
        wanted = param_group.get("muon", True)
        if not isinstance(wanted, bool):
            raise ValueError(f"muon={wanted!r} in a group of parameters: expected True or False")
        super().add_param_group(param_group)
        whole = self.param_groups.pop()
        for muon in (True, False):
            places = [i for i, p in enumerate(whole["params"]) if muon is (wanted and _is_hidden_matrix(p))]
            parts = {name: [whole[name][i] for i in places] for name in ("params", "param_names") if name in whole}
            if places:
                self.param_groups.append(whole | parts | {"muon": muon})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            inspect.unwrap(torch.optim.AdamW.step)(self)  # without hooks: those of this step have run or will
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._turn(group["params"], group["lr"], group["weight_decay"])
        return loss

    def _turn(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        """Muon's step: matrices of one shape at once, most of which are too small to keep a processor busy alone."""
        moved, gradients, averages = [], [], []
        for parameter in parameters:
            if (gradient := parameter.grad) is None:
                continue
            if gradient.is_sparse or gradient.is_complex():
                found = "sparse" if gradient.is_sparse else gradient.dtype
                raise RuntimeError(
                    f"a matrix has a gradient that is {found}: give it to AdamW (muon=False in its group)"
                )
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["step"] = torch.tensor(0.0)  # which AdamW looks for in every state that it loads
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] += 1
            moved.append(parameter)
            gradients.append(gradient)
            averages.append(state["momentum_buffer"])
        if not moved:
            return
        torch._foreach_lerp_(averages, gradients, 1 - self.momentum)
        ahead = torch._foreach_lerp(gradients, averages, self.momentum)  # Nesterov's
        torch._foreach_mul_(moved, 1 - lr * weight_decay)
        alike: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
        for parameter, gradient in zip(moved, ahead, strict=True):
            key = gradient.shape, gradient.dtype, gradient.device
            alike.setdefault(key, []).append((parameter, gradient))
        for (shape, dtype, _), pairs in alike.items():
            matrices = torch.stack([gradient.flatten(1) for _, gradient in pairs])
            steps = orthogonalized(matrices, self.ns_steps).to(dtype)
            alpha = -lr * 0.2 * max(matrices.shape[1:]) ** 0.5
            for (parameter, _), step in zip(pairs, steps, strict=True):
                parameter.add_(step.view(shape), alpha=alpha)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal matrices nearest to some, roughly: singular values of 0.7 - 1.2 where they are not tiny.

    Args:
        matrices: [..., m, n].
        steps: Of the iteration.

    Returns:
        [..., m, n], in bfloat16 where the device multiplies it natively, otherwise in float32.

    Source: Jordan et al. (2024), the quintic iteration of Newton and Schulz.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16 if _multiplies_bfloat16(matrices.device) else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).reshape(-1, *sorted(x.shape[-2:]))
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.12
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _is_hidden_matrix(parameter: Tensor) -> bool:
    if parameter.dim() not in (2, 4) or not parameter.numel():
        return False
    depthwise = parameter.dim() == 4 and parameter.shape[1] == 1  # filters that have nothing to do with each other
    return not depthwise and min(len(parameter), parameter[0].numel()) >= 16


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, with one parameter group for each set of settings instead of one for each parameter.

    The updates are the same bit for bit. torch's optimizers work group by group: with a group for each of a model's
    hundreds of parameters, their fused and multi-tensor steps never have more than one tensor to work on, and every
    learning-rate schedule has hundreds of numbers to set.

    A checkpoint has the names of each group's parameters, and is resumed only if they are the same: torch itself
    goes only by their order.

    Raises:
        ValueError: Modules share a parameter (`bypass_duplicate=True` of `paramwise_cfg` takes it once), or the
            optimizer loads a state of other groups.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        wrapper = super().__call__(model)
        names = {id(p): name for name, p in getattr(model, "module", model).named_parameters()}
        for number, group in enumerate(wrapper.optimizer.param_groups):
            group["param_names"] = [names[id(p)] for p in group["params"]]
            settings = ", ".join(f"{name}={group[name]}" for name in ("lr", "weight_decay") if name in group)
            print_log(f"parameter group {number}: {len(group['params'])} tensors, {settings}", logger="current")
        wrapper.optimizer.register_load_state_dict_pre_hook(_check_groups)
        return wrapper

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module: Any = None) -> None:
        """As MMEngine's, which calls itself for a module's children with their names as `prefix`."""
        if prefix:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        with at_least(logging.WARNING):  # it logs every parameter; `__call__` logs the groups
            super().add_params(params, module, prefix, is_dcn_module)
        members = [id(p) for group in params for p in group["params"]]
        if len(members) != len(set(members)):
            raise ValueError("modules share a parameter: set paramwise_cfg=dict(bypass_duplicate=True) to take it once")
        params[:] = _merged(params)


def _check_groups(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raises ValueError if a state's groups are not the optimizer's."""
    found, expected = (
        [group.get("param_names", len(group["params"])) for group in groups]
        for groups in (state["param_groups"], optimizer.param_groups)
    )
    if found == expected:
        return
    counts = [", ".join(str(n if isinstance(n, int) else len(n)) for n in groups) for groups in (found, expected)]
    raise ValueError(
        f"the checkpoint's optimizer has groups of {counts[0]} parameters, this one of {counts[1]}, or with different "
        "members: it was saved with another optimizer, constructor or paramwise_cfg. Resume with the config that it "
        "was trained with, or start only from its weights (load_from)"
    )


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
