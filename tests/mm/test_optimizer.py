"""One parameter group for each set of settings, and the updates of one for each parameter."""

import torch
from mmengine.optim import build_optim_wrapper

from nat_dense.models import NAT

PARAMWISE = dict(
    norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys=dict(rpb=dict(decay_mult=0.0), patch_embed=dict(lr_mult=0.5))
)


def _trained(constructor: str, **options) -> tuple[NAT, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = NAT(embed_dim=8, depths=(1, 2), num_heads=(1, 2), kernel_size=3, drop_path_rate=0.0, out_indices=(0, 1))
    optimizer = dict(type="AdamW", lr=0.01, weight_decay=0.5)
    wrapper = build_optim_wrapper(
        model,
        dict(type="OptimWrapper", constructor=constructor, optimizer=optimizer, paramwise_cfg=PARAMWISE | options),
    )
    for _ in range(3):
        loss = torch.stack([features.square().mean() for features in model(torch.rand(2, 3, 32, 32))]).sum()
        wrapper.update_params(loss)
    return model, wrapper.optimizer


def test_groups_are_few_and_the_updates_the_same():
    one_each, expected = _trained("DefaultOptimWrapperConstructor")
    grouped, optimizer = _trained("GroupedOptimWrapperConstructor")
    assert len(expected.param_groups) == len(list(one_each.parameters()))
    settings = sorted((group["lr"], group["weight_decay"]) for group in optimizer.param_groups)
    assert settings == [(0.005, 0.5), (0.01, 0.0), (0.01, 0.0), (0.01, 0.5)]  # rpb has its multiplier as a setting
    for (name, found), (_, wanted) in zip(grouped.named_parameters(), one_each.named_parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_options_of_paramwise_cfg_keep_working():
    _, optimizer = _trained("GroupedOptimWrapperConstructor", bypass_duplicate=True)
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(set(found))
