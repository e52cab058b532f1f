"""Blocks whose sums are joined to the norms after them: what a model computes so, and when it doesn't.

On the CPU, as torch.compile reads it for a GPU, with torch's operations in place of the kernels.
"""

import pytest
import torch
from torch import nn

from nat_dense.models import NAT, DiNAT_s, add_norm, mlp
from nat_dense.models.linear import Linear

DEPTHS = (2, 1, 3)
JOINED = sum(2 * depth for depth in DEPTHS)
"""Sums but the last of a stage, and its first norm."""


@pytest.fixture
def both(monkeypatch):
    """A function that runs a model as a GPU would, compiled, and as it is: the results of both."""

    def both(make) -> tuple:
        results = []
        for on_gpu in (True, False):
            for module in (add_norm, mlp):
                monkeypatch.setattr(module, "on_gpu", lambda x, on_gpu=on_gpu: on_gpu)
            results.append(run(make(), on_gpu))
        return tuple(results)

    return both


def model(kind=NAT, **fields) -> nn.Module:
    """In training, with parameters of norms and biases that are not those of a start."""
    torch.manual_seed(0)
    fields = dict(drop_path_rate=0.0) | fields
    backbone = kind(embed_dim=16, depths=DEPTHS, num_heads=(1, 2, 4), out_indices=(0, 1, 2), **fields)
    for parameter in backbone.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return backbone.train()


def run(backbone: nn.Module, on_gpu: bool):
    """Maps, gradients, and how many operators the compiled step holds: compiled for a GPU, else as it is."""
    count = []

    def backend(graph, _inputs):
        count.append(sum("add_norm" in str(node.target) for node in nodes_of(graph)))
        return graph.forward

    torch.compiler.reset()
    called = torch.compile(backbone, backend=backend) if on_gpu else backbone
    torch.manual_seed(1)
    images = torch.randn(2, 3, 52, 70)
    maps = called(images)
    sum((m.float() ** 3).mean() for m in maps).backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return maps, gradients, sum(count)


def nodes_of(graph):
    """With those of checkpointed parts."""
    for part in graph.modules():
        if isinstance(part, torch.fx.GraphModule):
            yield from part.graph.nodes


@pytest.mark.parametrize(
    ("fields", "joined"),
    [
        ({}, JOINED),
        (dict(kind=DiNAT_s), JOINED),
        (dict(layer_scale=0.5), JOINED),
        (dict(drop_path_rate=0.5), JOINED),
        (dict(layer_scale=0.5, drop_path_rate=0.5), JOINED),
        (dict(frozen_stages=2), JOINED),
        (dict(with_cp=True), 2 * sum(DEPTHS)),  # each block with its own first norm; its last sum alone
        (dict(drop_rate=0.3), 0),
    ],
    ids=str,
)
def test_maps_and_gradients_are_those_of_the_modules(fields, joined, both):
    (maps, gradients, found), (exact, exact_gradients, _) = both(lambda: model(**fields))
    assert found == joined
    assert gradients.keys() == exact_gradients.keys()
    for a, b in zip(maps, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for name, gradient in exact_gradients.items():
        atol = 1e-5 * gradient.abs().max().item() + 1e-9
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["", ".norm1", ".norm2", ".attn", ".attn.proj", ".mlp", ".mlp.fc2", ".drop_path"])
def test_who_watches_a_module_sees_what_it_returns(name, both):
    """Its block is then joined to no other, or not at all, and the others are as before."""
    seen = []

    def watched() -> nn.Module:
        backbone = model()
        module = backbone.get_submodule(f"levels.2.blocks.1{name}")
        module.register_forward_hook(lambda _module, _inputs, out: seen.append(out.detach().clone()))
        return backbone

    (_, _, found), _ = both(watched)
    assert found == JOINED - 2 * (name != "")  # in its own forward a watched block is joined
    as_joined, alone = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for a, b in zip(as_joined, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def another_attention(blocks: nn.ModuleList) -> None:
    blocks[1].attn = nn.Linear(64, 64)
    blocks[1].attn.kernel_size = blocks[1].attn.dilation = 1


def with_adapter(blocks: nn.ModuleList) -> None:
    blocks[1].attn.proj = nn.Sequential(blocks[1].attn.proj, nn.Tanh())


def wrapped(blocks: nn.ModuleList) -> None:
    blocks[1] = nn.Sequential(blocks[1], nn.Tanh())


CHANGED = {  # how the second of three blocks is changed, and the operators that it still runs
    "a norm of another kind": (lambda blocks: setattr(blocks[1], "norm2", nn.RMSNorm(64)), 0),
    "a norm without a bias": (lambda blocks: setattr(blocks[1], "norm1", nn.LayerNorm(64, bias=False)), 0),
    "a norm without parameters": (
        lambda blocks: setattr(blocks[1], "norm2", nn.LayerNorm(64, elementwise_affine=False)),
        0,
    ),
    "an adapter": (with_adapter, 0),
    "another MLP": (lambda blocks: setattr(blocks[1], "mlp", nn.Sequential(nn.Linear(64, 64), nn.ReLU())), 0),
    "another attention": (another_attention, 0),
    "a layer without a bias": (lambda blocks: setattr(blocks[1].mlp, "fc1", Linear(64, 192, bias=False)), 2),
    "a compiled call": (lambda blocks: blocks[1].mlp.compile(backend="eager"), 0),
    "a compiled block": (lambda blocks: blocks[1].compile(backend="eager"), 2),
    "a wrapper": (wrapped, 2),
}


@pytest.mark.parametrize("change", CHANGED)
def test_blocks_that_were_changed_run_as_they_are(change, both):
    apply, operators = CHANGED[change]

    def changed() -> nn.Module:
        backbone = model()
        apply(backbone.levels[2].blocks)
        return backbone

    (maps, _, found), (exact, _, _) = both(changed)
    assert found == JOINED - 2 + operators
    for a, b in zip(maps, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
