"""transformers' names and ours, against transformers' own outputs."""

import pytest
import torch

from nat_dense import checkpoints
from nat_dense.models import NAT, NATClassifier, variants
from tests import golden
from tests.checkpoints.files import hf_state, write_shards

META, ARRAYS = golden.load("hf_x1")
CONFIG = META["config"]
FIELDS = dict(embed_dim=32, depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 8), kernel_size=7, mlp_ratio=2.0, layer_scale=1e-5)
ROWS = [(f, a) for f in ("NAT", "DiNAT") for a in variants.VARIANTS[f]]


def test_files_have_as_many_values_as_those_of_transformers():
    counts = {kind: sum(v.numel() for v in hf_state(CONFIG, kind).values()) for kind in ("backbone", "model", "nat")}
    assert counts == dict(backbone=META["n_params_backbone"], model=META["n_params_model"], nat=META["n_params_cls"])


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards", "bin shards"])
def test_backbone_gives_the_outputs_of_transformers(tmp_path, form):
    state = hf_state(CONFIG, "backbone")
    if form == "safetensors":
        checkpoints.writing.save(state, tmp_path / "model.safetensors")
    elif form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        write_shards(tmp_path, state, "safetensors" if form == "shards" else "bin")
    model = NAT(**FIELDS).eval()
    report = checkpoints.load(model, tmp_path)
    assert set(report.used) == set(model.state_dict())
    assert report.left_out == {"norm_stem.weight": "stem-norm", "norm_stem.bias": "stem-norm"}
    maps = model(golden.tensor("input:x1", META["input"]))
    errors = [golden.error(m, ARRAYS[f"feature_maps{i + 1}"]) for i, m in enumerate(maps)]
    assert max(errors) < 2e-5


@pytest.mark.parametrize("model_type", ["nat", "dinat"])
def test_classifier_gives_the_logits_of_transformers(tmp_path, model_type):
    torch.save(hf_state(CONFIG, model_type), tmp_path / "x.bin")
    model = NATClassifier(num_classes=10, **FIELDS).eval()
    report = checkpoints.load(model, tmp_path / "x.bin")
    assert set(report.used) == set(model.state_dict())
    assert not report.left_out
    assert golden.error(model(golden.tensor("input:x1", META["input"])), ARRAYS["logits"]) < 2e-5


@pytest.mark.parametrize("kind", ["backbone", "model", "nat", "dinat"])
def test_both_ways_restore_every_bit(kind):
    state = hf_state(CONFIG, kind)
    ours = checkpoints.from_hf(state)
    again = checkpoints.to_hf(ours, kind if kind in ("nat", "dinat") else None)
    assert again.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.items())
    assert all(torch.equal(value, ours[name]) for name, value in checkpoints.from_hf(again).items())


@pytest.mark.parametrize(("family", "arch"), ROWS)
def test_every_architecture_has_its_names_in_transformers(family, arch):
    """Names and shapes, from the classifier's and the backbone's modules to transformers' and back."""
    row = variants.variant(family, arch)
    for model_type in (None, family.lower()):
        with torch.device("meta"):
            cls = NAT if model_type is None else NATClassifier
            state = cls(**row.fields()).state_dict()
        theirs = checkpoints.to_hf(state, model_type)
        depth = sum(row.depths)
        assert len(theirs) == len(state) + 4 * depth - (depth if row.layer_scale else 0)
        assert not any("blocks" in name or "qkv" in name or "gamma" in name for name in theirs)
        again = checkpoints.from_hf(theirs)
        assert {n: v.shape for n, v in again.items()} == {n: v.shape for n, v in state.items()}


def test_incomplete_projection_is_not_guessed():
    state = hf_state(CONFIG, "backbone")
    del state["encoder.levels.0.layers.0.attention.self.key.weight"]
    ours = checkpoints.from_hf(state)
    assert "levels.0.blocks.0.attn.qkv.weight" not in ours
    assert "encoder.levels.0.layers.0.attention.self.query.weight" in ours
    assert "levels.0.blocks.0.attn.qkv.bias" in ours


def test_unknown_names_pass_through():
    value = torch.zeros(1)
    assert checkpoints.from_hf({"pooler.weight": value}) == {"pooler.weight": value}
    assert checkpoints.to_hf({"neck.weight": value}) == {"neck.weight": value}
