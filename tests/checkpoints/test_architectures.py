"""Each of the thirteen published architectures in each format that such models come in, bit for bit.

The widths are a sixteenth and less of the published ones, which no name and no rule depends on; depths, heads, hidden
layers, layer scale and kernel are the published ones. Outputs at full width are in `test_loading.py`.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nat_dense import checkpoints, models
from nat_dense.checkpoints.writing import save
from nat_dense.models import variants
from tests import golden
from tests.checkpoints.files import hf_state, write_mm2, write_shards

SIZES = ("mini", "tiny", "small", "base", "large")
ARCHITECTURES = [(family, arch) for family, rows in variants.VARIANTS.items() for arch in SIZES if arch in rows]
CLASSIFIERS = dict(NAT="NATClassifier", DiNAT="DiNATClassifier", DiNAT_s="DiNATsClassifier")
CLASSES = 5
HEADS = {"neck.fpn_convs.0.conv.bias": torch.ones(4), "roi_head.bbox_head.fc_cls.bias": torch.ones(3)}


def narrow(family: str, arch: str, *, classifier: bool) -> torch.nn.Module:
    """A published model at two channels a head."""
    row = variants.variant(family, arch)
    fields = dict(embed_dim=2 * row.num_heads[0]) | (dict(num_classes=CLASSES) if classifier else {})
    return getattr(models, CLASSIFIERS[family] if classifier else family)(arch, **fields).eval()


@cache
def filled(family: str, arch: str, *, classifier: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The weights that the formula gives such a model, and what it makes of an image with them."""
    model = golden.fill(narrow(family, arch, classifier=classifier))
    return model.state_dict(), outputs(model)


def outputs(model: torch.nn.Module) -> list[Tensor]:
    with torch.no_grad():
        found = model(golden.tensor("input:narrow", (1, 3, 40, 56)))
    return [found] if isinstance(found, Tensor) else list(found)


def transformers_state(family: str, arch: str, kind: str) -> dict[str, Tensor]:
    row = variants.variant(family, arch)
    config = row.fields() | dict(embed_dim=2 * row.num_heads[0], num_labels=CLASSES)
    config["layer_scale_init_value"] = config.pop("layer_scale") or 0.0
    return hf_state(config, family.lower() if kind == "classifier" else kind)


def original_classifier(family: str, arch: str, folder: Path) -> Path:
    torch.save(filled(family, arch, classifier=True)[0], folder / "in.pth")
    return folder / "in.pth"


def original_backbone(family: str, arch: str, folder: Path) -> Path:
    torch.save(filled(family, arch, classifier=False)[0], folder / "in.pth")
    return folder / "in.pth"


def old_detector(family: str, arch: str, folder: Path) -> Path:
    weights = {f"backbone.{name}": value for name, value in filled(family, arch, classifier=False)[0].items()}
    return write_mm2(folder / "in.pth", weights | HEADS)


def new_detector(family: str, arch: str, folder: Path) -> Path:
    checkpoints.convert(old_detector(family, arch, folder), folder / "mm.pth", "mm")
    return folder / "mm.pth"


def ours(family: str, arch: str, folder: Path) -> Path:
    checkpoints.convert(old_detector(family, arch, folder), folder / "dense.safetensors", "dense")
    return folder / "dense.safetensors"


def transformers_backbone(family: str, arch: str, folder: Path) -> Path:
    save(transformers_state(family, arch, "backbone"), folder / "model.safetensors")
    return folder


def transformers_shards(family: str, arch: str, folder: Path) -> Path:
    return write_shards(folder, transformers_state(family, arch, "backbone"), "bin")


def transformers_model(family: str, arch: str, folder: Path) -> Path:
    torch.save(transformers_state(family, arch, "model"), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def transformers_classifier(family: str, arch: str, folder: Path) -> Path:
    save(transformers_state(family, arch, "classifier"), folder / "model.safetensors")
    return folder / "model.safetensors"


def to_transformers_and_back(family: str, arch: str, folder: Path) -> Path:
    """The whole circle: original names, transformers' and original names again."""
    source = original_classifier(family, arch, folder)
    options = dict(model_type=family.lower(), dilations=None if family == "NAT" else "classification")
    checkpoints.convert(source, folder / "hf", "hf", **options)
    checkpoints.convert(folder / "hf", folder / "back.pth", "classification")
    return folder / "back.pth"


BACKBONES = [original_backbone, old_detector, new_detector, ours, transformers_backbone, transformers_shards]
NORMLESS = [original_classifier, transformers_model, transformers_classifier]
WHOLE = [original_classifier, transformers_classifier, to_transformers_and_back]


def table(formats):
    return [
        pytest.param(family, arch, write, id=f"{family}-{arch}-{write.__name__}")
        for family, arch in ARCHITECTURES
        for write in formats
        if family != "DiNAT_s" or "transformers" not in write.__name__  # which has no DiNAT_s
    ]


def assert_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def test_there_are_thirteen():
    assert len(ARCHITECTURES) == len(set(ARCHITECTURES)) == 13


@pytest.mark.parametrize(("family", "arch", "write"), table(BACKBONES))
def test_into_a_dense_model(tmp_path, family, arch, write):
    expected, maps = filled(family, arch, classifier=False)
    model = narrow(family, arch, classifier=False)
    report = checkpoints.load(model, write(family, arch, tmp_path))
    assert_bits(model.state_dict(), expected)
    assert set(report.left_out.values()) <= {"outside-backbone", "stem-norm"}
    assert [set(report.used), report.absent, report.converted] == [set(expected), {}, {}]
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), maps, strict=True))


@pytest.mark.parametrize(("family", "arch", "write"), table(NORMLESS))
def test_without_output_norms_into_a_dense_model(tmp_path, family, arch, write):
    expected, maps = filled(family, arch, classifier=False)
    model = narrow(family, arch, classifier=False)
    report = checkpoints.load(model, write(family, arch, tmp_path))
    fresh = [name for name in expected if re.match(r"norm\d", name)]
    assert report.absent == dict.fromkeys(fresh, "fresh-output-norms")
    assert set(report.left_out.values()) == {"classifier"}
    with torch.no_grad():
        for name in fresh:
            model.get_parameter(name).copy_(expected[name])
    assert_bits(model.state_dict(), expected)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), maps, strict=True))


@pytest.mark.parametrize(("family", "arch", "write"), table(WHOLE))
def test_into_a_classifier(tmp_path, family, arch, write):
    expected, logits = filled(family, arch, classifier=True)
    model = narrow(family, arch, classifier=True)
    report = checkpoints.load(model, write(family, arch, tmp_path))
    assert_bits(model.state_dict(), expected)
    assert [set(report.used), report.absent, report.left_out] == [set(expected), {}, {}]
    assert torch.equal(outputs(model)[0], logits[0])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "arch"), [("NAT", "tiny"), ("NAT", "base"), ("DiNAT_s", "large")])
def test_at_full_width_where_there_are_no_golden_outputs(tmp_path, family, arch):
    """From an old detector, by way of transformers where it has the model, to the very weights and maps."""
    expected = golden.fill(getattr(models, family)(arch)).eval()
    weights = {f"backbone.{name}": value for name, value in expected.state_dict().items()}
    file = write_mm2(tmp_path / "in.pth", weights | HEADS)
    if family == "NAT":
        checkpoints.convert(file, tmp_path / "hf", "hf", model_type="nat")
        file = tmp_path / "hf"
    model = getattr(models, family)(arch, init_cfg=dict(type="Pretrained", checkpoint=str(file))).eval()
    model.init_weights()
    assert_bits(model.state_dict(), expected.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(expected), strict=True))
