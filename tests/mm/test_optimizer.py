"""The optimizer that turns matrices, and one parameter group for each set of settings."""

import copy
import pickle

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


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (16, 32, 1, 1), (48, 16, 1, 1), (24, 40), (40, 24)])
def test_matrices_of_one_shape_are_turned_each_by_its_own_gradient(shape):
    """However a convolution lies in memory, and whichever side is longer."""
    torch.manual_seed(0)
    start, other = torch.randn(2, *shape), nn.Parameter(torch.zeros(16, 144))
    together = [nn.Parameter(matrix.clone()) for matrix in start]
    if len(shape) == 4:
        together[1].data = together[1].data.to(memory_format=torch.channels_last)
    alone = [nn.Parameter(matrix.clone()) for matrix in start]
    for one, two in zip(together, alone, strict=True):
        one.grad = torch.randn(shape)
        two.grad = one.grad.clone()
    other.grad = torch.randn(16, 144)
    MuonAdamW([*together, other], lr=0.1).step()
    for parameter in alone:
        MuonAdamW([parameter], lr=0.1).step()
    for found, wanted, before in zip(together, alone, start, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)  # bfloat16's, of steps of 0.02
        assert (found - before).square().mean().sqrt() > 0.01


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


def test_turns_matrices_as_torch_does():
    """`torch.optim.Muon` with Adam's size of step, but for the rounding of its bfloat16."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(24, 40))
    theirs = nn.Parameter(ours.detach().clone())
    settings = dict(lr=0.01, weight_decay=0.3, momentum=0.9, ns_steps=4)
    pair = MuonAdamW([ours], **settings), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        ours.grad = torch.randn(24, 40)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)  # of steps of 0.002


@pytest.mark.parametrize("shape", [(32, 1, 5, 5), (32, 32, 2), (8, 64), (64, 8), (40,), (), (0, 32)])
def test_what_is_no_hidden_matrix_is_adamws(shape):
    optimizer = MuonAdamW([nn.Parameter(torch.zeros(shape))])
    assert [group["muon"] for group in optimizer.param_groups] == [False]


def test_closures_see_all_gradients():
    """A closure clears the gradients of matrices too."""
    layers = [nn.Linear(32, 32) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    inputs = torch.randn(4, 32)
    optimizers = [MuonAdamW(layer.parameters(), lr=0.1) for layer in layers]

    def closure() -> torch.Tensor:
        optimizers[0].zero_grad()
        loss = layers[0](inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        loss = optimizers[0].step(closure)
        optimizers[1].zero_grad()
        wanted = layers[1](inputs).square().mean()
        wanted.backward()
        optimizers[1].step()
        assert torch.equal(loss, wanted)
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_hooks_run_once_around_the_whole_step():
    torch.optim.AdamW([nn.Parameter(torch.zeros(2))])  # lets torch wrap that class's step
    weight, bias = nn.Parameter(torch.ones(32, 32)), nn.Parameter(torch.ones(32))
    optimizer = MuonAdamW([weight, bias], lr=0.1)
    weight.grad, bias.grad = torch.ones(32, 32), torch.ones(32)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append((weight[0, 0].item(), bias[0].item())))
    optimizer.register_step_post_hook(lambda *_: seen.append((weight[0, 0].item(), bias[0].item())))
    optimizer.step()
    assert seen[0] == (1.0, 1.0)
    assert seen[1][0] < 1.0
    assert seen[1][1] < 1.0
    assert len(seen) == 2


def test_copies_and_added_groups_go_on():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    optimizer = MuonAdamW(model[0].named_parameters(), ns_steps=3)
    optimizer.add_param_group(dict(params=list(model[1].named_parameters()), lr=0.5))
    assert [(group["muon"], group["param_names"]) for group in optimizer.param_groups] == [
        (True, ["weight"]),
        (False, ["bias"]),
        (True, ["weight"]),
        (False, ["bias"]),
    ]
    copied_model, copied = copy.deepcopy((model, optimizer))
    for layers, each in ((model, optimizer), (copied_model, copied)):
        layers(torch.ones(1, 32)).square().sum().backward()
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied_model.parameters(), strict=True))
    assert pickle.loads(pickle.dumps(optimizer)).ns_steps == 3


def test_sparse_gradients_are_refused():
    table = nn.Embedding(32, 32, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="a matrix has a gradient that is sparse"):
        MuonAdamW(table.parameters()).step()


def wrapper(model: nn.Module, constructor: str = "GroupedOptimWrapperConstructor", **paramwise):
    optimizer = dict(type="AdamW", lr=0.01, weight_decay=0.5)
    cfg = dict(type="OptimWrapper", constructor=constructor, optimizer=optimizer, paramwise_cfg=paramwise)
    return build_optim_wrapper(model, cfg)


def test_shared_parameters_are_taken_once_or_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="modules share a parameter: set paramwise_cfg=dict"):
        wrapper(model, norm_decay_mult=0.0)
    groups = wrapper(model, norm_decay_mult=0.0, bypass_duplicate=True).optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [3]


def test_states_of_other_groups_are_refused():
    """Groups of the same sizes and other members would give a parameter another's averages."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    saved = wrapper(model, custom_keys={"0": dict(decay_mult=0.0), "1": dict(decay_mult=0.0)})
    same = wrapper(model, custom_keys={"0": dict(decay_mult=0.0), "1": dict(decay_mult=0.0)})
    other = wrapper(model, custom_keys={"0": dict(decay_mult=0.0), "2": dict(decay_mult=0.0)})
    one_each = wrapper(model, "DefaultOptimWrapperConstructor", custom_keys={"0": dict(decay_mult=0.0)})
    same.load_state_dict(copy.deepcopy(saved.state_dict()))
    with pytest.raises(ValueError, match="or with different members: it was saved with another optimizer"):
        other.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="has groups of 1, 1, 1, 1 parameters, this one of 2, 2"):
        other.load_state_dict(one_each.state_dict())


@pytest.mark.parametrize("steps", [0, 2.5, "3"])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match="expected a whole number >= 1"):
        MuonAdamW([nn.Parameter(torch.zeros(2))], ns_steps=steps)


def test_a_group_says_yes_or_no():
    with pytest.raises(ValueError, match="muon=0 in a group of parameters: expected True or False"):
        MuonAdamW([dict(params=[nn.Parameter(torch.zeros(2))], muon=0)])


def test_momentum_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"momentum=1.0: expected a number in \[0, 1\)"):
        MuonAdamW([nn.Parameter(torch.zeros(2))], momentum=1.0)
