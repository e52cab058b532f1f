"""What users of transformers rely on: outputs, tuples, losses, errors, initial weights. For every supported release."""

from __future__ import annotations

import pytest
import torch

from tests import golden

pytest.importorskip("transformers", reason="transformers is missing: pip install 'nat_dense[hf]'")

from nat_dense import hf

META, ARRAYS = golden.load("hf_x1")
SMALL = dict(embed_dim=16, depths=[1, 2, 1], num_heads=[1, 2, 4], kernel_size=3, num_labels=5)
DILATIONS = [[4], [1, 3], [2]]


def build(name: str, **fields) -> torch.nn.Module:
    """A small filled model by class name, in eval mode."""
    config = hf.NatConfig if name.startswith("Nat") else hf.DinatConfig
    extra = {} if name.startswith("Nat") else dict(dilations=DILATIONS)
    return golden.fill(getattr(hf, name)(config(**SMALL | extra | fields))).eval()


def golden_model(family: str, **fields) -> torch.nn.Module:
    """A model of the golden case, its weights filled under the original's names and mapped."""
    from nat_dense import checkpoints

    model = golden.factory(family, META["config"] | fields).eval()
    names = checkpoints.from_hf(model.state_dict())
    filled = {name: golden.parameter(name, value.shape) for name, value in names.items()}
    model.load_state_dict(checkpoints.to_hf(filled, "nat" if family == "hf_cls" else None), strict=True)
    return model


@pytest.fixture
def image() -> torch.Tensor:
    return golden.tensor("input:x1", META["input"])


def test_model_gives_the_outputs_of_transformers(image):
    pytest.importorskip("mmengine", reason="the key maps need mmengine")
    found = golden_model("hf_model")(image, output_hidden_states=True, output_attentions=True)
    errors = [golden.error(found[name], ARRAYS[name]) for name in ("last_hidden_state", "pooler_output")]
    for i in range(5):
        errors.append(golden.error(found.hidden_states[i], ARRAYS[f"hidden_states{i}"]))
        errors.append(golden.error(found.reshaped_hidden_states[i], ARRAYS[f"reshaped_hidden_states{i}"]))
    for i, weights in enumerate(found.attentions):
        assert tuple(weights.shape) == tuple(ARRAYS["attn_shapes"][i])
        errors.append(golden.error(golden.strided(weights), ARRAYS[f"attn_samp{i}"]))
    assert max(errors) < 2e-5


def test_backbone_gives_the_outputs_of_transformers(image):
    pytest.importorskip("mmengine", reason="the key maps need mmengine")
    backbone = golden_model("hf_backbone", out_features=["stem", "stage1", "stage2", "stage3", "stage4"])
    assert backbone.channels == META["channels"]
    found = backbone(image, output_hidden_states=True, output_attentions=True)
    errors = [golden.error(value, ARRAYS[f"feature_maps{i}"]) for i, value in enumerate(found.feature_maps)]
    errors += [golden.error(value, ARRAYS[f"bb_hidden_states{i}"]) for i, value in enumerate(found.hidden_states)]
    assert max(errors) < 2e-5
    assert all(value.is_contiguous() for value in found.feature_maps)
    assert [tuple(value.shape) for value in found.attentions] == [tuple(s) for s in ARRAYS["bb_attn_shapes"]]


def test_classifier_gives_the_logits_of_transformers(image):
    pytest.importorskip("mmengine", reason="the key maps need mmengine")
    assert golden.error(golden_model("hf_cls")(image).logits, ARRAYS["logits"]) < 2e-5


@pytest.mark.parametrize("size", [(64, 48), (30, 34), (1, 1)], ids=str)
@pytest.mark.parametrize("family", ["Nat", "Dinat"])
def test_attentions_are_those_of_the_result(family, size):
    """The path that tells the weights gives what the fused operator gives, and each row of weights sums to 1."""
    model = build(f"{family}Model").double()
    image = golden.tensor("image", (2, 3, *size), dtype=torch.float64)
    told = model(image, output_attentions=True)
    torch.testing.assert_close(told.last_hidden_state, model(image).last_hidden_state, rtol=0, atol=1e-12)
    dilations = [1, 1, 1] if family == "Nat" else [row[-1] for row in DILATIONS]
    for i, (weights, dilation) in enumerate(zip(told.attentions, dilations, strict=True)):
        sides = [max(-(-n // (4 * 2**i)), 3 * dilation) for n in size]
        assert tuple(weights.shape) == (2, SMALL["num_heads"][i], *sides, 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_tuples():
    image = golden.tensor("image", (1, 3, 33, 40))
    both = dict(return_dict=False, output_hidden_states=True, output_attentions=True)
    last, pooled, hidden, weights = build("NatModel")(image, **both)
    assert (last.shape, pooled.shape, len(hidden), len(weights)) == ((1, 3, 3, 64), (1, 64), 4, 3)
    torch.testing.assert_close(pooled, last.mean((1, 2)))
    without = hf.NatModel(hf.NatConfig(**SMALL), add_pooling_layer=False)
    assert without(image, return_dict=False)[1] is None
    assert without(image).pooler_output is None
    loss, logits, hidden, _ = build("NatForImageClassification")(image, torch.tensor([1]), **both)
    assert (loss.shape, logits.shape, len(hidden)) == ((), (1, 5), 4)
    maps, hidden = build("NatBackbone", out_indices=[0, 3])(image, **both)  # a backbone's tuple has no attentions
    assert [tuple(m.shape) for m in maps] == [(1, 16, 9, 10), (1, 64, 3, 3)]
    assert [tuple(h.shape) for h in hidden] == [(1, 9, 10, 16), (1, 9, 10, 16), (1, 5, 5, 32), (1, 3, 3, 64)]
    assert len(build("NatModel", return_dict=False)(image)) == 2


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem", "loss"),
    [
        (torch.tensor([1, 3]), 5, "single_label_classification", torch.nn.functional.cross_entropy),
        (torch.tensor([0.5, -1.0]), 1, "regression", lambda x, y: torch.nn.functional.mse_loss(x.squeeze(), y)),
        (torch.eye(5)[:2], 5, "multi_label_classification", torch.nn.functional.binary_cross_entropy_with_logits),
    ],
    ids=["classes", "regression", "multi_label"],
)
def test_losses(labels, num_labels, problem, loss):
    model = build("NatForImageClassification", num_labels=num_labels)
    found = model(golden.tensor("image", (2, 3, 32, 32)), labels=labels)
    assert model.config.problem_type == problem
    torch.testing.assert_close(found.loss, loss(found.logits, labels))


def test_no_labels_leave_the_pooled_features():
    model = build("NatForImageClassification", num_labels=0)
    image = golden.tensor("image", (1, 3, 32, 32))
    assert torch.equal(model(image).logits, model.nat(image).pooler_output)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("NatConfig", dict(out_features=["x"]), r"out_features must be a subset of stage_names: .* got \['x'\]"),
        ("NatConfig", dict(out_features="stage1"), "out_features must be a list"),
        ("NatConfig", dict(out_features=["stage2", "stage1"]), "must be in the same order as stage_names"),
        ("NatConfig", dict(out_features=["stage1"], out_indices=[2]), "should correspond to the same stages"),
        ("NatModel", dict(patch_size=16), "patch_size=16: the model only supports patch size of 4"),
        ("NatModel", dict(num_heads=[3, 2, 4]), r"hidden size \(16\) is not a multiple .* attention heads \(3\)"),
        ("DinatModel", dict(dilations=[[1], [1]]), r"dilations has \[1, 1\] numbers per stage; .* depths=\[1, 2, 1\]"),
        ("DinatModel", dict(dilations=[[1], [1], [1]]), r"dilations has \[1, 1, 1\] numbers per stage"),
    ],
    ids=str,
)
def test_field_errors(name, fields, message):
    with pytest.raises(ValueError, match=message):
        hf.NatConfig(**SMALL | fields) if name == "NatConfig" else build(name, **fields)


@pytest.mark.parametrize("name", ["NatModel", "NatForImageClassification", "NatBackbone", "DinatModel"])
def test_input_errors(name):
    model = build(name)
    with pytest.raises(ValueError, match="You have to specify pixel_values"):
        model(None)
    with pytest.raises(ValueError, match=r"Make sure that the channel dimension .* \(1, 4, 32, 32\), num_channels=3"):
        model(torch.zeros(1, 4, 32, 32))


def test_configuration():
    config = hf.NatConfig()
    defaults = dict(embed_dim=64, depths=[3, 4, 6, 5], num_heads=[2, 4, 8, 16], kernel_size=7, mlp_ratio=3.0)
    defaults |= dict(drop_path_rate=0.1, layer_norm_eps=1e-5, layer_scale_init_value=0.0, qkv_bias=True)
    defaults |= dict(hidden_size=512, num_layers=4, out_features=["stage4"], out_indices=[4], model_type="nat")
    found = config.to_dict()
    assert {name: found[name] for name in defaults} == defaults
    assert (config.num_hidden_layers, config.num_attention_heads) == (4, [2, 4, 8, 16])
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert hf.DinatConfig().dilations == [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]
    positional = hf.DinatConfig(4, 3, 32, [1, 1], [1, 2], 5, [[1], [2]], 2.0, False)
    assert (positional.mlp_ratio, positional.qkv_bias, positional.dilations) == (2.0, False, [[1], [2]])
    config.out_indices = [1, 3]
    assert config.out_features == ["stage1", "stage3"]
    assert hf.NatConfig(out_indices=(-1,)).out_features == ["stage4"]
    assert hf.NatConfig.from_dict(hf.NatConfig(**SMALL, out_indices=[2]).to_dict()).out_features == ["stage2"]


def test_initial_weights():
    torch.manual_seed(0)
    fields = dict(layer_scale_init_value=0.25, initializer_range=0.05, num_labels=200)
    model = hf.NatForImageClassification(hf.NatConfig(**SMALL | fields))
    constants = dict(rpb=0.0, bias=0.0, layer_scale_parameters=0.25)
    for name, value in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in constants or "norm" in name:
            assert torch.equal(value, torch.full_like(value, constants.get(leaf, 1.0))), name
        else:
            assert abs(value.std() / 0.05 - 1) < 5 / (2 * value.numel()) ** 0.5, name
    assert hf.NatModel(hf.NatConfig(**SMALL)).encoder.levels[0].layers[0].layer_scale_parameters is None


def test_drop_path_grows_to_its_rate():
    rates = [
        layer.drop_path.rate
        for level in hf.NatModel(hf.NatConfig(**SMALL | dict(drop_path_rate=0.3))).encoder.levels
        for layer in level.layers
    ]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_attention_dropout_changes_training_alone(monkeypatch):
    monkeypatch.setattr("nat_dense.models.attention._warned", False)  # it warns once a process
    model = build("NatModel", attention_probs_dropout_prob=0.5, drop_path_rate=0.0)
    image = golden.tensor("image", (1, 3, 32, 32))
    plain = build("NatModel")(image).last_hidden_state
    assert torch.equal(model(image).last_hidden_state, plain)
    model.train()
    with pytest.warns(UserWarning, match="attention dropout"):
        assert not torch.allclose(model(image).last_hidden_state, plain)


def test_input_embeddings():
    model = build("NatBackbone")
    assert model.get_input_embeddings() is model.embeddings.patch_embeddings


@pytest.mark.parametrize(
    "part", ["intermediate.dense", "intermediate.intermediate_act_fn", "output", "layernorm_after"]
)
def test_hooks_see_whole_maps(part, monkeypatch):
    """In inference on a CPU too, which takes maps in parts."""
    monkeypatch.setattr("nat_dense.models.layers.RUN_BYTES", 1 << 10)
    monkeypatch.setattr("nat_dense.models.layers.MIN_RUN", 16)
    model, seen = build("NatModel"), []
    layer = model.encoder.levels[0].layers[0]
    hook = layer.get_submodule(part).register_forward_hook(lambda module, inputs, out: seen.append(out.shape[:3]))
    image = golden.tensor("image", (1, 3, 64, 96))
    with torch.no_grad():
        found = model(image).last_hidden_state
        hook.remove()
        torch.testing.assert_close(model(image).last_hidden_state, found)
    assert seen == [(1, 16, 24)]


class Gate(torch.nn.Module):
    """An activation that looks at the whole map."""

    def forward(self, x):
        return x * torch.sigmoid(x.mean(tuple(range(1, x.dim())), keepdim=True))


def test_a_replaced_activation_sees_whole_maps(monkeypatch):
    monkeypatch.setattr("nat_dense.models.layers.RUN_BYTES", 1 << 10)
    monkeypatch.setattr("nat_dense.models.layers.MIN_RUN", 16)
    model = build("NatModel")
    model.encoder.levels[0].layers[0].intermediate.intermediate_act_fn = Gate()
    image = golden.tensor("image", (1, 3, 64, 96))
    expected = model(image).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(model(image).last_hidden_state, expected)
