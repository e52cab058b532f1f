"""The backbones' contract: shapes, fields, freezing, gradients, registration, numbers of the original."""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from nat_dense.models import NAT, DiNAT, DiNAT_s, attention, layers, variants
from nat_dense.models.backbone import Stage
from tests import golden
from tests.ops.cases import OperatorsSeen

SMALL = dict(embed_dim=32, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8), kernel_size=3)
FAMILIES = pytest.mark.parametrize("family", [NAT, DiNAT, DiNAT_s])


@FAMILIES
@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 20), (5, 3), (1, 1)])
def test_any_input_size_gives_contiguous_maps(family, size):
    model = family(arch="nano").eval()
    maps = model(torch.randn(2, 3, *size))
    ceil = [tuple(-(-n // 4) for n in size)]
    for _ in range(3):
        ceil.append(tuple(-(-n // 2) for n in ceil[-1]))
    assert [tuple(m.shape) for m in maps] == [(2, c, *s) for c, s in zip(model.num_features, ceil, strict=True)]
    assert all(m.is_contiguous() for m in maps)
    assert all(torch.isfinite(m).all() for m in maps)


def test_a_layer_scale_may_be_a_whole_number():
    block = NAT(**SMALL, layer_scale=1).levels[0].blocks[0]
    assert torch.equal(block.gamma1, torch.ones(32))
    assert block.gamma2.requires_grad


@FAMILIES
def test_out_indices_choose_the_maps_and_the_norms(family):
    model = family(**SMALL, out_indices=(0, 2)).eval()
    assert [m.shape[1] for m in model(torch.randn(1, 3, 64, 64))] == [32, 128]
    assert [n for n, _ in model.named_children() if n.startswith("norm")] == ["norm0", "norm2"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "huge"}, "arch='huge' is not a NAT; expected one of nano, mini, tiny, small, base"),
        ({}, "NAT needs arch .* or embed_dim, depths, num_heads"),
        ({**SMALL, "num_heads": (1, 2, 4)}, r"depths=\(1, 2, 2, 1\) and num_heads=\(1, 2, 4\)"),
        ({**SMALL, "num_heads": (3, 2, 4, 8)}, "dim=32 is not divisible by num_heads=3"),
        ({**SMALL, "kernel_size": 4}, "kernel_size=4: expected an odd number >= 3"),
        ({**SMALL, "dilations": [[1], [1, 2], [1]]}, "dilations has .* expected as many as depths"),
        ({**SMALL, "dilations": [[1], [1, 2], [1], [1]]}, r"dilations has \[1, 2, 1, 1\] numbers a stage"),
        ({**SMALL, "dilations": "detection"}, "dilations='detection' is not a preset of NAT"),
        ({**SMALL, "out_indices": (0, 4)}, r"out_indices=\(0, 4\): expected ascending stages out of 0 .. 3"),
        ({**SMALL, "frozen_stages": 5}, "frozen_stages=5: expected -1"),
        ({**SMALL, "drop_path_rate": 1.5}, "drop_path_rate=1.5: expected a probability"),
        ({**SMALL, "embed_dim": 33}, "embed_dim=33: expected an even number"),
        ({**SMALL, "backend": "cuda"}, "backend='cuda' is not known"),
        ({"arch": ["tiny"]}, r"arch=\['tiny'\] is not a NAT; expected one of nano"),
        ({**SMALL, "depths": 3}, "depths=3: expected a list of whole numbers"),
        ({**SMALL, "depths": [3, 4, 6, "5"]}, r"depths=\[3, 4, 6, '5'\]: expected a list of whole numbers"),
        ({**SMALL, "out_indices": "0123"}, "out_indices='0123': expected a list of whole numbers"),
        ({**SMALL, "embed_dim": 64.0}, "embed_dim=64.0: expected a whole number"),
        ({**SMALL, "frozen_stages": True}, "frozen_stages=True: expected a whole number"),
        ({**SMALL, "drop_path_rate": "0.2"}, "drop_path_rate='0.2': expected a number"),
        ({**SMALL, "attn_drop_rate": None}, "attn_drop_rate=None: expected a number"),
        ({**SMALL, "with_cp": "no"}, "with_cp='no': expected True or False"),
        ({**SMALL, "dilations": [1, 2]}, r"dilations=\[1, 2\]: expected a list of whole numbers a stage"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        NAT(**fields)


def test_misspelt_field_is_refused():
    with pytest.raises(TypeError, match="drop_path"):
        NAT(arch="nano", drop_path=0.1)


def test_input_with_four_channels_is_refused():
    with pytest.raises(ValueError, match=r"input of shape \(1, 4, 32, 32\): expected \[batch, 3, height, width\]"):
        NAT(arch="nano")(torch.randn(1, 4, 32, 32))


def test_pictures_in_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"input of torch\.uint8: expected an image in floating point"):
        NAT(arch="nano")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("scope", ["mmengine", "mmdet", "mmseg"])
def test_registered_once_in_the_root(scope):
    """mmdet and mmseg find the type through their registries' parent."""
    if scope == "mmengine":
        registry = MODELS
    else:
        registry = pytest.importorskip(f"{scope}.registry").MODELS
    assert registry.build(dict(type="DiNAT_s", arch="nano")).family == "DiNAT_s"
    assert isinstance(registry.build(dict(type="NAT", arch="nano", out_indices=[1])), NAT)


@FAMILIES
@pytest.mark.parametrize("frozen", [-1, 0, 2, 4])
def test_frozen_stages_stay_frozen_through_train(family, frozen):
    model = family(**SMALL, frozen_stages=frozen, drop_rate=0.1)
    assert model.train() is model
    prefixes = ["patch_embed."] if frozen >= 0 else []
    prefixes += [f"{model.stages_name}.{i}." for i in range(frozen)] + [f"norm{i}." for i in range(frozen)]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(prefixes)), name
    for name, module in model.named_modules():
        if name and not name.endswith(model.stages_name):
            expected = not (name + ".").startswith((*prefixes, "pos_drop.")[: len(prefixes) + (frozen >= 0)] or "\0")
            assert module.training == expected, name


@FAMILIES
def test_every_parameter_gets_a_gradient(family):
    model = family(**SMALL, layer_scale=0.1, drop_path_rate=0.0)
    sum((m * torch.randn_like(m)).sum() for m in model(torch.randn(1, 3, 40, 48))).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@FAMILIES
def test_training_makes_one_gradient_of_the_projection(family):
    """And inference runs the plain operator."""
    model = family(**SMALL, drop_path_rate=0.0)
    blocks = sum(SMALL["depths"])
    with OperatorsSeen() as training:
        sum(m.sum() for m in model(torch.randn(1, 3, 40, 48))).backward()
    assert training.names == ["na2d_qkv"] * blocks + ["na2d_backward"] * blocks
    with torch.no_grad(), OperatorsSeen() as inference:
        model(torch.randn(1, 3, 40, 48))
    assert inference.names == ["na2d"] * blocks


def test_checkpointed_backward_equals_the_plain_one():
    plain, checkpointed = NAT(**SMALL, drop_path_rate=0.0), NAT(**SMALL, drop_path_rate=0.0, with_cp=True)
    checkpointed.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 40, 48)
    for model in (plain, checkpointed):
        sum(m.square().mean() for m in model(image)).backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_stochastic_depth_grows_and_only_acts_in_training():
    model = NAT(**SMALL, drop_path_rate=0.5)
    rates = [module.rate for module in model.modules() if hasattr(module, "rate")]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    image = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model(image)[-1], model(image)[-1])
    model.eval()
    assert torch.equal(model(image)[-1], model(image)[-1])


@pytest.mark.parametrize("layer_scale", [None, torch.tensor([2.0, 3.0])])
def test_stochastic_depth_drops_samples_and_scales_those_it_keeps(layer_scale):
    x, branch = torch.randn(64, 3, 3, 2), torch.randn(64, 3, 3, 2)
    added = layers.DropPath(0.75).train()(x, branch, layer_scale) - x
    scaled = branch if layer_scale is None else branch * layer_scale
    kept = [i for i in range(64) if added[i].any()]
    assert 4 < len(kept) < 32
    torch.testing.assert_close(added[kept], 4 * scaled[kept])
    torch.testing.assert_close(layers.DropPath(0.75).eval()(x, branch, layer_scale) - x, scaled)


def test_attention_dropout_runs_with_one_warning(monkeypatch):
    monkeypatch.setattr("nat_dense.models.attention._warned", False)
    model = NAT(**SMALL, attn_drop_rate=0.3, drop_path_rate=0.0)
    with pytest.warns(UserWarning, match="runs the slow reference operator") as caught:
        a, b = (model(torch.ones(1, 3, 32, 32))[-1] for _ in range(2))
    assert len([w for w in caught if "reference operator" in str(w.message)]) == 1
    assert not torch.equal(a, b)
    model.eval()
    assert torch.equal(model(torch.ones(1, 3, 32, 32))[-1], model(torch.ones(1, 3, 32, 32))[-1])


def test_initial_weights():
    model = NAT(arch="nano")
    attention = model.levels[2].blocks[0].attn
    for weight in (attention.qkv.weight, attention.rpb, attention.proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not attention.qkv.bias.any()


@pytest.mark.parametrize(
    ("family", "use", "depths", "expected"),
    [
        ("DiNAT", "detection", (3, 4, 6, 5), "1,28,1 1,7,1,14 1,3,1,5,1,7 1,3,1,3,1"),
        ("DiNAT", "segmentation", (3, 4, 6, 5), "1,16,1 1,4,1,8 1,2,1,3,1,4 1,2,1,2,1"),
        ("DiNAT", "segmentation-640", (3, 4, 18, 5), "1,20,1 1,5,1,10 1,2,1,3,1,4,1,5,1,2,1,3,1,4,1,5,1,5 1,2,1,2,1"),
        ("DiNAT", "mask2former", (3, 4, 18, 5), "1,14,1 1,4,1,7 1,2,1,3,1,2,1,3,1,2,1,3,1,2,1,3,1,3 1,1,1,1,1"),
        ("DiNAT_s", "detection", (2, 2, 6, 2), "1,28 1,14 1,3,1,5,1,7 1,3"),
        ("DiNAT_s", "classification-384", (2, 2, 18, 2), "1,13 1,6 1,3,1,3,1,3,1,3,1,3,1,3,1,3,1,3,1,3 1,1"),
    ],
)
def test_published_dilations(family, use, depths, expected):
    stages = tuple(tuple(int(d) for d in stage.split(",")) for stage in expected.split())
    assert variants.dilations_for(family, use, depths) == stages


def test_dilations_of_an_arch_and_of_explicit_fields():
    def dilations(model):
        stages = (stage for stage in model.modules() if isinstance(stage, Stage))
        return [[block.attn.dilation for block in stage.blocks] for stage in stages]

    assert dilations(DiNAT(arch="nano")) == [[1, 8], [1, 4], [1, 2, 1, 2], [1, 1]]
    assert dilations(DiNAT(**SMALL)) == [[1], [1, 1], [1, 1], [1]]
    assert dilations(DiNAT_s(arch="nano", dilations="segmentation")) == [[1, 16], [1, 8], [1, 2, 1, 3], [1, 2]]
    assert dilations(NAT(**SMALL, dilations=[[4], None, [1, 2], [1]])) == [[4], [1, 1], [1, 2], [1]]


@pytest.mark.parametrize(
    "name", ["model_o2", "model_o4", "model_o5", "model_o9", "model_o10", "model_o11", "model_o12"]
)
def test_outputs_of_the_original(name):
    """1e-5 also catches a LayerNorm eps of 1e-6."""
    meta, expected = golden.load(name)
    model = golden.build(meta)
    assert sum(p.numel() for p in model.parameters()) == meta["n_params"]
    with torch.no_grad():
        outputs = model(golden.tensor(f"input:{meta['id']}", meta["input"]))
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    assert len(outputs) == meta["n_out"]
    for i, output in enumerate(outputs):
        assert golden.error(output, expected[f"out{i}"]) < 1e-5, i


def test_gradients_of_the_original():
    meta, expected = golden.load("grad_g2")
    model = golden.build(meta)
    image = golden.tensor("input:g2", meta["input"]).requires_grad_()
    outputs = model(image)
    sum((o * golden.tensor(f"cot:g2:{i}", o.shape)).sum() for i, o in enumerate(outputs)).backward()
    assert golden.error(image.grad, expected["gx"]) < 1e-4
    for name, parameter in model.named_parameters():
        whole = expected.get(f"g:{name}")
        found = parameter.grad if whole is not None else golden.strided(parameter.grad)
        reference = whole if whole is not None else expected[f"s:{name}"]
        assert golden.error(found, reference) < 1e-4, name


@pytest.mark.parametrize(
    "name",
    [
        "variant_nat_mini_det",
        "variant_dinat_s_tiny_det",
        pytest.param("variant_dinat_tiny_det", marks=pytest.mark.slow),
        pytest.param("variant_nat_small_det", marks=pytest.mark.slow),
        pytest.param("variant_dinat_large_seg", marks=pytest.mark.slow),
    ],
)
def test_published_models_of_the_original(name):
    meta, expected = golden.load(name)
    model = golden.build(meta)
    assert sum(p.numel() for p in model.parameters()) == meta["n_params"]
    with torch.no_grad():
        outputs = model(golden.tensor(f"input:{meta['id']}", meta["input"]))
    for i, output in enumerate(outputs):
        assert list(output.shape) == expected[f"shape{i}"].tolist()
        difference = golden.strided(output).double().numpy() - expected[f"samp{i}"]
        assert abs(difference).max() / expected[f"std{i}"] < 1e-5, i


def test_stochastic_depth_drops_whole_samples_without_gradients():
    """As reentrant checkpointing runs it: maps large enough to be taken in runs of tokens."""
    model = NAT(embed_dim=32, depths=[1], num_heads=[1], out_indices=(0,), drop_path_rate=0.0)
    block = model.stages[0].blocks[0]
    block.drop_path.rate = 0.5
    tokens = torch.randn(2, 72, 72, 32)
    outputs = []
    for gradients in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(gradients):
            outputs.append(block(tokens))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("size", [(232, 201), (509, 64), (350, 230)])
@pytest.mark.parametrize("family", [NAT, DiNAT])
def test_bands_of_rows_give_what_the_whole_map_gives(family, size, monkeypatch):
    dilations = [[1, 2], [3, 1], [1, 1], [1, 1]] if family is DiNAT else None
    model = family(embed_dim=16, depths=[2] * 4, num_heads=[1, 2, 2, 4], kernel_size=3, dilations=dilations).eval()
    image = torch.randn(2, 3, *size)
    bands = []
    operator = attention.na2d_rows
    monkeypatch.setattr(attention, "na2d_rows", lambda *args, **kwargs: bands.append(1) or operator(*args, **kwargs))
    with torch.no_grad():
        whole = model(image)
        assert not bands
        monkeypatch.setattr(layers, "BAND_BYTES", 80_000)
        banded = model(image)
        count = len(bands)
        model.train()
        model(image)
    assert len(bands) == count >= 2 * 2 * layers.MIN_BANDS
    for a, b in zip(whole, banded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Gated(nn.Module):
    """An MLP whose gate looks at all tokens."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        y = self.mlp(x)
        return y * y.mean((-3, -2), keepdim=True).sigmoid()


class Offset(nn.LayerNorm):
    """A norm that looks at the places of its tokens."""

    def forward(self, x):
        return super().forward(x) + torch.linspace(0, 1, x.shape[-3]).view(-1, 1, 1)


class LowRank(torch.nn.Module):
    """An adapter around a layer, without its attributes, which counts on a map."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2)
        self.up = torch.nn.Linear(2, base.out_features)

    def forward(self, x):
        _, _, _, _ = x.shape
        return self.base(x) + self.up(self.down(x))


class Shifted(torch.nn.Linear):
    """A layer with a bias of another name."""

    def forward(self, x):
        return super().forward(x) + 1.0


@pytest.mark.parametrize("change", ["adapter", "subclass"])
@pytest.mark.parametrize("size", [(64, 96), (20, 20)])
def test_what_is_in_the_place_of_the_projection(change, size):
    """Small maps are padded, and their padding has what the projection makes of it as key and value."""
    model = NAT(embed_dim=16, depths=[1, 1], num_heads=[1, 2], kernel_size=7, out_indices=(0, 1)).eval()
    merged = copy.deepcopy(model)
    for level, other in zip(model.levels, merged.levels, strict=True):
        attention, qkv = level.blocks[0].attn, other.blocks[0].attn.qkv
        if change == "adapter":
            adapter = attention.qkv = LowRank(attention.qkv)
            weight = adapter.base.weight + adapter.up.weight @ adapter.down.weight
            bias = adapter.base.bias + adapter.up.weight @ adapter.down.bias + adapter.up.bias
        else:
            weight, bias = qkv.weight.clone(), qkv.bias + 1.0
            attention.qkv = Shifted(qkv.in_features, qkv.out_features)
            attention.qkv.load_state_dict(qkv.state_dict())
        with torch.no_grad():
            qkv.weight.copy_(weight)
            qkv.bias.copy_(bias)
    image = torch.randn(1, 3, *size)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for found, expected in zip(model(image), merged(image), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["hook", "hook of the projection", "mlp", "norm", "attention"])
@pytest.mark.parametrize("band", [1 << 30, 80_000])
def test_what_is_not_plain_sees_whole_maps(change, band, monkeypatch):
    """In inference too, where a CPU takes maps in parts."""
    monkeypatch.setattr(layers, "BAND_BYTES", band)
    monkeypatch.setattr(layers, "RUN_BYTES", 1 << 12)
    model = NAT(embed_dim=16, depths=[2] * 4, num_heads=[1, 2, 2, 4], kernel_size=3).eval()
    block, seen = model.levels[0].blocks[0], []
    if change.startswith("hook"):
        part = block.mlp if change == "hook" else block.attn.qkv
        part.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:3]))
    elif change == "mlp":
        block.mlp = Gated(block.mlp)
    elif change == "norm":
        block.norm2 = Offset(16)
    else:
        block.attn = Gated(block.attn)
    image = torch.randn(1, 3, 232, 201)
    expected = model(image)
    with torch.no_grad():
        found = model(image)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert seen == [(1, 58, 51)] * 2 * change.startswith("hook")


@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_rows_seen_hold_every_window(kernel_size, dilation):
    """A row's window is the same in these rows alone as in the whole map."""
    for height in range(kernel_size * dilation, kernel_size * dilation + 13):
        for first in range(height):
            for last in (first + 1, min(first + 6, height)):
                low, high = layers.rows_seen(first, last, height, kernel_size, dilation)
                assert low % dilation == 0
                assert high - low >= kernel_size * dilation
                for row in range(first, last):
                    windows = []
                    for offset, length in ((0, height), (low, high - low)):
                        group, place = (row - offset) % dilation, (row - offset) // dilation
                        members = (length - group + dilation - 1) // dilation
                        start = min(max(place - kernel_size // 2, 0), members - kernel_size)
                        windows.append(offset + group + start * dilation)
                    assert windows[0] == windows[1], (height, first, last, row)


def test_exported_for_open_sizes_without_a_bound():
    """A map's size may choose bands in eager mode; a program must not be bound to the choice."""
    model = NAT(embed_dim=64, depths=[1], num_heads=[2], out_indices=(0,)).eval()
    sides = {2: torch.export.Dim("height", min=32), 3: torch.export.Dim("width", min=32)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(1, 3, 64, 96),), dynamic_shapes=(sides,), strict=False)
        image = torch.randn(1, 3, 520, 1400)
        torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-5)


def test_transforms_reach_through_a_model():
    model = NAT(**SMALL).eval()
    images = torch.randn(2, 3, 40, 36)
    with torch.no_grad():
        found = torch.func.vmap(lambda image: model(image[None])[0][0])(images)
        torch.testing.assert_close(found, model(images)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [0, 1])
def test_bands_keep_the_dtype_under_autocast(batch, monkeypatch):
    """Layer scale in float32 promotes what autocast lowers."""
    block = NAT(embed_dim=32, depths=[1], num_heads=[1], layer_scale=0.5, out_indices=(0,)).eval().stages[0].blocks[0]
    tokens = torch.randn(batch, 60, 50, 32).bfloat16()
    outputs = []
    for band in (1 << 30, 150_000):
        monkeypatch.setattr(layers, "BAND_BYTES", band)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(block(tokens))
    assert outputs[0].dtype == outputs[1].dtype
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
