"""Folders: saved by us, by transformers 4.57.6 and by the converter; the Auto classes, processors and pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import golden

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'nat_dense[hf]'")

from safetensors.torch import load_file  # noqa: E402

from nat_dense import hf  # noqa: E402
from tests.hf.test_contract import SMALL, build  # noqa: E402

FIXTURE = Path(__file__).parents[1] / "data" / "hf" / "transformers-4.57.6"
PROCESSOR = dict(
    do_normalize=True,
    do_rescale=True,
    do_resize=True,
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
    resample=3,
    rescale_factor=1 / 255,
    size=dict(height=48, width=64),
)


@pytest.fixture
def image() -> torch.Tensor:
    return golden.tensor("image", (2, 3, 30, 41))


def test_folder_of_transformers_4(image):
    """What 4.57.6 saved loads whole, and gives what 4.57.6 computed."""
    expected = load_file(FIXTURE / "outputs.safetensors")
    model, report = hf.NatForImageClassification.from_pretrained(FIXTURE, output_loading_info=True)
    assert not any(report.values())
    found = model(image, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(found.logits, expected["logits"], rtol=1e-5, atol=1e-5)
    for name in ("hidden_states", "attentions"):
        for i, value in enumerate(found[name]):
            torch.testing.assert_close(value, expected[f"{name}.{i}"], rtol=1e-5, atol=1e-5)


def test_config_of_transformers_4_is_written_again():
    written = json.loads((FIXTURE / "config.json").read_text())
    again = hf.NatForImageClassification.from_pretrained(FIXTURE).config.to_dict()
    assert {name: again[name] for name in written if name not in ("transformers_version", "dtype")} == {
        name: value if name != "id2label" else {int(k): v for k, v in value.items()}
        for name, value in written.items()
        if name not in ("transformers_version", "dtype")
    }


def test_classifier_folder_gives_a_backbone(image):
    backbone, report = hf.NatBackbone.from_pretrained(
        FIXTURE, out_features=["stage1", "stage2"], output_loading_info=True
    )
    names = [f"hidden_states_norms.stage{i}.{kind}" for i in (1, 2) for kind in ("bias", "weight")]
    assert sorted(report["missing_keys"]) == names
    assert sorted(report["unexpected_keys"]) == sorted(
        ["classifier.bias", "classifier.weight", "nat.layernorm.bias", "nat.layernorm.weight"]
    ) or sorted(report["unexpected_keys"]) == sorted(
        ["classifier.bias", "classifier.weight", "layernorm.bias", "layernorm.weight"]
    )
    hidden = backbone(image, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, load_file(FIXTURE / "outputs.safetensors")["hidden_states.2"])
    normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:]).permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone(image).feature_maps[-1], normed)


@pytest.mark.parametrize(
    "name", ["NatModel", "NatBackbone", "NatForImageClassification", "DinatForImageClassification"]
)
def test_round_trip(name, tmp_path, image):
    model = build(name)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, report = getattr(hf, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(loaded(image, return_dict=False)[0][0], model(image, return_dict=False)[0][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype, tmp_path, image):
    model = build("NatForImageClassification")
    model.save_pretrained(tmp_path)
    loaded = hf.NatForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    assert {value.dtype for value in loaded.parameters()} == {dtype}
    logits = loaded(image.to(dtype)).logits
    assert logits.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(logits.float(), model(image).logits, rtol=tolerance, atol=tolerance)


def test_other_number_of_classes(tmp_path):
    build("NatForImageClassification").save_pretrained(tmp_path)
    load = hf.NatForImageClassification.from_pretrained
    model = load(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (3, 64)
    assert model.classifier.weight.std() < 0.1  # drawn afresh, not left as it was in memory
    assert torch.equal(model.nat.layernorm.weight, build("NatForImageClassification").nat.layernorm.weight)


@pytest.mark.parametrize("family", ["Nat", "Dinat"])
def test_auto_classes(family, tmp_path):
    build(f"{family}ForImageClassification").save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is getattr(hf, f"{family}Config")
    for auto, kind in (
        (transformers.AutoModel, "Model"),
        (transformers.AutoModelForImageClassification, "ForImageClassification"),
    ):
        assert type(auto.from_pretrained(tmp_path)) is getattr(hf, family + kind)
    assert type(transformers.AutoBackbone.from_config(config)) is getattr(hf, f"{family}Backbone")


def test_configurations_of_transformers_lead_here():
    """Its own DinatConfig, whose model raises or is wrong, builds ours."""
    fields = dict(embed_dim=16, depths=[1, 1], num_heads=[1, 2], kernel_size=3, dilations=[[2], [1]])
    theirs = transformers.DinatConfig(**fields, out_features=["stage1"])
    assert type(theirs) is not hf.DinatConfig
    assert type(transformers.AutoModel.from_config(theirs)) is hf.DinatModel
    backbone = transformers.AutoBackbone.from_config(theirs)
    assert type(backbone) is hf.DinatBackbone
    assert backbone.encoder.levels[0].layers[0].attention.self.dilation == 2
    assert backbone(torch.rand(1, 3, 24, 40)).feature_maps[0].shape == (1, 16, 6, 10)


@pytest.mark.parametrize(
    "kind",
    [dict(image_processor_type="ViTImageProcessor"), dict(feature_extractor_type="ViTFeatureExtractor"), {}],
    ids=["new", "old", "unnamed"],
)
@pytest.mark.parametrize("family", ["Nat", "Dinat"])
def test_processor_and_pipeline(family, kind, tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is missing: pip install 'nat_dense[hf]'")
    model = build(f"{family}ForImageClassification", id2label={0: "cat", 1: "dog"}, num_labels=2)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | kind))
    picture = image_module.new("RGB", (70, 50), (200, 30, 90))
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    colour = (torch.tensor([200, 30, 90]) / 255 - torch.tensor(PROCESSOR["image_mean"])) / torch.tensor(
        PROCESSOR["image_std"]
    )
    torch.testing.assert_close(pixels, colour.view(1, 3, 1, 1).expand(1, 3, 48, 64), rtol=0, atol=1e-4)
    answers = transformers.pipeline("image-classification", model=str(tmp_path))(picture)
    expected = model(pixels).logits.softmax(-1)[0]
    assert {a["label"]: a["score"] for a in answers} == pytest.approx(
        dict(cat=expected[0].item(), dog=expected[1].item()), abs=1e-5
    )


@pytest.mark.parametrize("family", ["NAT", "DiNAT"])
def test_dense_models_and_ours_exchange_weights(family, tmp_path, image):
    """A dense backbone's maps are those of the backbone for transformers, through the converter and back."""
    pytest.importorskip("mmengine", reason="the dense backbones need mmengine")
    from nat_dense import checkpoints, models

    dilations = [[4], [1, 3], [2]] if family == "DiNAT" else None
    shape = dict(embed_dim=16, depths=(1, 2, 1), num_heads=(1, 2, 4), kernel_size=3, out_indices=(0, 1, 2))
    dense = golden.fill(getattr(models, family)(**shape, dilations=dilations, layer_scale=0.1)).eval()
    name = "Nat" if family == "NAT" else "Dinat"
    stages = ["stage1", "stage2", "stage3"]
    backbone = build(f"{name}Backbone", out_features=stages, layer_scale_init_value=0.1)
    backbone.load_state_dict(checkpoints.to_hf(dense.state_dict()), strict=True)
    found, expected = backbone(image).feature_maps, dense(image)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    backbone.save_pretrained(tmp_path)
    again = getattr(models, family)(
        **shape, dilations=dilations, layer_scale=0.1, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path))
    ).eval()
    again.init_weights()
    for a, b in zip(again(image), expected, strict=True):
        assert torch.equal(a, b)


def test_classifier_folder_starts_a_dense_model(tmp_path, image):
    """A classifier that transformers trained goes into a dense backbone by `init_cfg`."""
    pytest.importorskip("mmengine", reason="the dense backbones need mmengine")
    from nat_dense.models import NAT

    model = build("NatForImageClassification")
    model.save_pretrained(tmp_path)
    fields = {name: SMALL[name] for name in ("embed_dim", "depths", "num_heads", "kernel_size")}
    dense = NAT(**fields, out_indices=(2,), init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path))).eval()
    dense.init_weights()
    *_, tokens = dense.forward_stages(image)
    torch.testing.assert_close(tokens, model(image, output_hidden_states=True).hidden_states[-1])
