"""The optimizer that turns matrices, and one parameter group for each set of settings."""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from nat_dense.mm.optimizer import MuonAdamW, orthogonalized
from nat_dense.models import NAT

PARAMWISE = dict(
    norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys=dict(rpb=dict(decay_mult=0.0), patch_embed=dict(lr_mult=0.5))
)


def small_nat() -> NAT:
    torch.manual_seed(0)
    return NAT(embed_dim=16, depths=(1, 2), num_heads=(1, 2), kernel_size=3, drop_path_rate=0.0, out_indices=(0, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.stack([features[:, ::2].square().mean() for features in model(images)]).sum().backward()
        optimizer.step()


def trained(constructor: str, **options) -> tuple[NAT, torch.optim.Optimizer]:
    model = small_nat()
    cfg = dict(
        type="OptimWrapper",
        constructor=constructor,
        optimizer=dict(type="AdamW", lr=0.01, weight_decay=0.5),
        paramwise_cfg=PARAMWISE | options,
    )
    optimizer = build_optim_wrapper(model, cfg).optimizer
    train(model, optimizer, steps=3)
    return model, optimizer


def test_groups_are_few_and_the_updates_the_same():
    one_each, expected = trained("DefaultOptimWrapperConstructor")
    grouped, optimizer = trained("GroupedOptimWrapperConstructor")
    assert len(expected.param_groups) == len(list(one_each.parameters()))
    settings = sorted((group["lr"], group["weight_decay"]) for group in optimizer.param_groups)
    assert settings == [(0.005, 0.5), (0.01, 0.0), (0.01, 0.0), (0.01, 0.5)]  # rpb has its multiplier as a setting
    for (name, found), wanted in zip(grouped.named_parameters(), one_each.parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_no_parameter_is_grouped_twice():
    _, optimizer = trained("GroupedOptimWrapperConstructor", bypass_duplicate=True)
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_orthogonalized_is_near_the_orthogonal_factor(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(matrix).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    along = left.T @ found @ right.T  # diagonal, of the factor's own values
    clear = values > 0.05 * values.max()
    assert along.diagonal()[clear].min() > 0.6
    assert along.diagonal().max() < 1.3
    assert (along - along.diagonal().diag()).abs().max() < 0.05


def test_matrices_and_kernels_are_turned_and_the_rest_is_adamws():
    model = small_nat()
    expected = copy.deepcopy(model)
    optimizer = MuonAdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    turned = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in turned}
    assert {"levels.0.blocks.0.attn.qkv.weight", "levels.0.downsample.reduction.weight"} <= names
    assert "patch_embed.proj.0.weight" not in names  # 8 channels out of 3
    assert not any(name.endswith(("rpb", "bias")) or "norm" in name for name in names)
    train(model, optimizer, steps=1)
    train(expected, torch.optim.AdamW(expected.parameters(), lr=0.01, weight_decay=0.1), steps=1)
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted) is (name not in names), name


def test_a_step_is_as_long_as_adamws_first_ones():
    """0.2 of the learning rate in the root mean square, which is what arXiv:2502.16982 measured of AdamW."""
    weight = nn.Parameter(torch.zeros(64, 192))
    weight.grad = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    MuonAdamW([weight], lr=0.01).step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.002, rel=0.15)


def test_a_group_can_opt_out():
    weight = nn.Parameter(torch.zeros(32, 32))
    optimizer = MuonAdamW([dict(params=[weight], muon=False)])
    assert [group["muon"] for group in optimizer.param_groups] == [False]


def test_goes_on_from_its_state_to_the_bit():
    whole, resumed = small_nat(), small_nat()
    train(whole, MuonAdamW(whole.parameters(), lr=0.01), steps=2)
    first = MuonAdamW(resumed.parameters(), lr=0.01)
    train(resumed, first, steps=1)
    second = MuonAdamW(resumed.parameters(), lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    second.zero_grad()
    torch.stack([features[:, ::2].square().mean() for features in resumed(images)]).sum().backward()
    second.step()
    for found, wanted in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_momentum_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"momentum=1.0: expected a number in \[0, 1\)"):
        MuonAdamW([nn.Parameter(torch.zeros(2))], momentum=1.0)
