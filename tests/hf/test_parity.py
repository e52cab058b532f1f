"""Against transformers 4.57.6's own NAT: every output, gradient, tuple and error. Runs in `make test-hf4`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import golden
from tests.hf import natten_standin

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'nat_dense[hf]'")
if not transformers.__version__.startswith("4."):
    reason = f"transformers {transformers.__version__}: its NAT was removed in 5.0; make test-hf4 installs 4.57.6"
    pytest.skip(reason, allow_module_level=True)
natten_standin.install()

from transformers.models.deprecated.nat import configuration_nat, modeling_nat  # noqa: E402

from nat_dense import hf  # noqa: E402
from nat_dense.models.variants import NAT_VARIANTS  # noqa: E402

SMALL = dict(embed_dim=16, depths=[2, 1, 2], num_heads=[1, 2, 4], kernel_size=5, num_labels=4)
FIELDS = [
    SMALL,
    SMALL | dict(layer_scale_init_value=0.1, mlp_ratio=2.0, layer_norm_eps=1e-3),
    SMALL | dict(qkv_bias=False, hidden_act="relu", kernel_size=3, num_channels=1),
]
SIZES = [(64, 48), (65, 97), (30, 34), (9, 70), (1, 1)]
"""Images in pixels. With a window of 5, all but the first two have maps below it in all stages."""


def pair(name: str, fields: dict):
    """The same model by transformers and by us, with the same weights, in eval mode and float64."""
    theirs = getattr(modeling_nat, name)(configuration_nat.NatConfig(**fields)).double().eval()
    ours = getattr(hf, name)(hf.NatConfig(**fields)).double().eval()
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            value.copy_(golden.parameter(key, value.shape))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def assert_same(found, expected, where: str = "") -> None:
    """The same structure, order, types, shapes, strides and numbers."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, tuple):
        assert isinstance(found, tuple), where
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}[{i}]")
    elif expected is None:
        assert found is None, where
    else:
        assert found.dtype == expected.dtype, where
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, msg=lambda m: f"{where}: {m}")


@pytest.mark.parametrize("arch", ["mini", "tiny", "small", "base"])
def test_published_architectures(arch):
    """At full width and depth; that the dense backbone equals ours is shown in tests/checkpoints."""
    row = NAT_VARIANTS[arch]
    fields = {name: row.fields()[name] for name in ("embed_dim", "depths", "num_heads", "mlp_ratio", "kernel_size")}
    fields |= dict(layer_scale_init_value=row.layer_scale or 0.0, out_features=["stage1", "stage2", "stage3", "stage4"])
    theirs, ours = pair("NatBackbone", fields)
    image = golden.tensor("image", (1, 3, 65, 97), dtype=torch.float64)
    with torch.no_grad():
        assert_same(ours(image), theirs(image), arch)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("fields", FIELDS, ids=["plain", "layer_scale", "no_bias"])
@pytest.mark.parametrize("name", ["NatModel", "NatForImageClassification", "NatBackbone"])
def test_outputs(name, fields, size):
    if name == "NatBackbone":
        fields = fields | dict(out_features=["stem", "stage1", "stage3"])
    theirs, ours = pair(name, fields)
    image = golden.tensor("image", (2, fields.get("num_channels", 3), *size), dtype=torch.float64)
    with torch.no_grad():
        for request in (
            {},
            dict(output_hidden_states=True),
            dict(output_attentions=True),
            dict(output_hidden_states=True, output_attentions=True),
        ):
            assert_same(ours(image, **request), theirs(image, **request), str(request))
            as_tuple = request | dict(return_dict=False)
            assert_same(ours(image, **as_tuple), theirs(image, **as_tuple), str(as_tuple))


@pytest.mark.parametrize("size", [(64, 48), (30, 34)], ids=str)
@pytest.mark.parametrize("fields", FIELDS, ids=["plain", "layer_scale", "no_bias"])
def test_gradients(fields, size):
    theirs, ours = pair("NatForImageClassification", fields)
    image = golden.tensor("image", (2, fields.get("num_channels", 3), *size), dtype=torch.float64)
    for model in (theirs, ours):
        loss = model(image, labels=torch.tensor([1, 3])).loss
        loss.backward()
    expected = dict(theirs.named_parameters())
    for name, value in ours.named_parameters():
        torch.testing.assert_close(
            value.grad, expected[name].grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (4, torch.tensor([1, 3])),
        (1, torch.tensor([0.5, -1.0], dtype=torch.float64)),
        (4, torch.tensor([[0.0, 1, 0, 1], [1, 0, 0, 0]], dtype=torch.float64)),
    ],
    ids=["classes", "regression", "multi_label"],
)
def test_losses(num_labels, labels):
    theirs, ours = pair("NatForImageClassification", SMALL | dict(num_labels=num_labels))
    image = golden.tensor("image", (2, 3, 40, 40), dtype=torch.float64)
    expected = theirs(image, labels=labels)
    assert_same(ours(image, labels=labels), expected)
    assert_same(ours(image, labels=labels, return_dict=False), theirs(image, labels=labels, return_dict=False))
    assert ours.config.problem_type == theirs.config.problem_type


def test_no_labels_and_no_pooling():
    theirs, ours = pair("NatForImageClassification", SMALL | dict(num_labels=0))
    image = golden.tensor("image", (1, 3, 40, 40), dtype=torch.float64)
    assert_same(ours(image), theirs(image))
    theirs = modeling_nat.NatModel(configuration_nat.NatConfig(**SMALL), add_pooling_layer=False).double().eval()
    ours = hf.NatModel(hf.NatConfig(**SMALL), add_pooling_layer=False).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours(image), theirs(image))
    assert_same(ours(image, return_dict=False), theirs(image, return_dict=False))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        SMALL,
        dict(out_features=["stem", "stage4"]),
        dict(out_indices=[0, 2]),
        dict(out_indices=(1, 3), num_labels=7),
        dict(out_indices=[-1]),
        dict(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, unknown="kept"),
    ],
    ids=str,
)
def test_configuration(fields):
    theirs, ours = configuration_nat.NatConfig(**fields), hf.NatConfig(**fields)
    assert ours.to_dict() == theirs.to_dict()
    assert ours.to_json_string() == theirs.to_json_string()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_labels", "stage_names"):
        assert getattr(ours, name) == getattr(theirs, name)
    for config in (ours, theirs):
        config.out_features = ["stage1", "stage2"]
    assert ours.out_indices == theirs.out_indices == [1, 2]


@pytest.mark.parametrize(
    "fields",
    [
        dict(out_features="stage1"),
        dict(out_features=["x"]),
        dict(out_features=["stage1", "stage1"]),
        dict(out_features=["stage2", "stage1"]),
        dict(out_indices=[0, 9]),
        dict(out_indices=[1, 1]),
        dict(out_features=["stage1"], out_indices=[2]),
        dict(out_features=["stage1"], out_indices=[1, 2]),
        dict(patch_size=8),
        dict(num_heads=[3, 4, 8, 16]),
    ],
    ids=str,
)
def test_errors(fields):
    with pytest.raises(ValueError) as theirs:  # noqa: PT011
        modeling_nat.NatModel(configuration_nat.NatConfig(**fields))
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        hf.NatModel(hf.NatConfig(**fields))
    if fields == dict(patch_size=8):  # their message says Dinat for NAT as well
        assert "only supports patch size of 4" in str(ours.value)
        assert "only supports patch size of 4" in str(theirs.value)
    else:
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("image", [None, torch.zeros(1, 4, 32, 32)], ids=["none", "channels"])
def test_input_errors(image):
    for name in ("NatModel", "NatForImageClassification"):
        theirs, ours = pair(name, SMALL)
        with pytest.raises(ValueError) as expected:  # noqa: PT011
            theirs(image)
        with pytest.raises(ValueError) as found:  # noqa: PT011
            ours(image)
        assert str(found.value).startswith(str(expected.value).rstrip("."))


def test_backbone_properties():
    theirs, ours = pair("NatBackbone", SMALL | dict(out_indices=[0, 2]))
    for name in ("out_features", "out_indices", "out_feature_channels", "channels", "num_features", "stage_names"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_initial_weights():
    """The same distribution by kind of parameter; what theirs leaves constant is the same constant in ours."""
    fields = dict(embed_dim=64, depths=[1, 1], num_heads=[2, 4], layer_scale_init_value=0.3, initializer_range=0.05)
    theirs = modeling_nat.NatForImageClassification(configuration_nat.NatConfig(**fields))
    ours = hf.NatForImageClassification(hf.NatConfig(**fields))
    expected = dict(theirs.named_parameters())
    assert list(expected) == [name for name, _ in ours.named_parameters()]
    for name, value in ours.named_parameters():
        if expected[name].min() == expected[name].max():
            assert torch.equal(value, expected[name]), name
        else:
            count = value.numel()
            assert abs(value.mean()) < 5 * 0.05 / count**0.5, name
            assert abs(value.std() / 0.05 - 1) < 5 / (2 * count) ** 0.5, name


@pytest.mark.parametrize("name", ["NatModel", "NatForImageClassification", "NatBackbone"])
def test_files_both_ways(name, tmp_path: Path):
    """What one saves the other loads: names, shapes and outputs."""
    theirs, ours = pair(name, SMALL)
    image = golden.tensor("image", (1, 3, 33, 47), dtype=torch.float64)
    expected = theirs(image, return_dict=False)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for model, folder in (
        (getattr(hf, name), tmp_path / "theirs"),
        (getattr(modeling_nat, name), tmp_path / "ours"),
        (getattr(hf, name), tmp_path / "ours"),
    ):
        loaded, report = model.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float64)
        assert not any(report.values()), report
        assert_same(loaded.eval()(image, return_dict=False), expected)
    assert (tmp_path / "ours" / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()
