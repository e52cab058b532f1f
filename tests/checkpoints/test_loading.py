"""Every kind of file into every kind of model: the original's outputs, and where each tensor went."""

import re

import pytest
import torch
from mmengine.registry import MODELS

from nat_dense import checkpoints, models
from nat_dense.checkpoints.writing import save
from nat_dense.models import NAT, DiNAT_s, NATClassifier, variants
from tests import golden
from tests.checkpoints.files import TINY, tiny, write_mm2

DENSE = ["model_o2", "model_o5", "model_o9", "model_o10"]
CLASSIFIERS = ["model_o11", "model_o12"]
FAMILIES = [(f, a) for f, rows in variants.VARIANTS.items() for a, row in rows.items()]


def mm2(state, path):
    heads = {
        "neck.lateral_convs.0.conv.weight": torch.ones(2, 2, 1, 1),
        "roi_head.bbox_head.fc_cls.bias": torch.ones(3),
    }
    write_mm2(path, {f"backbone.{name}": value for name, value in state.items()} | heads)


WRITERS = {
    "flat.pth": torch.save,
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "entry.pth": lambda state, path: torch.save({"model": state, "epoch": 3, "optimizer": {"lr": 0.1}}, path),
    "mm2.pth": mm2,
    "ours.safetensors": save,
    "ddp.pth": lambda state, path: torch.save({f"module.{name}": value for name, value in state.items()}, path),
    "compiled.pth": lambda state, path: torch.save({f"_orig_mod.{name}": value for name, value in state.items()}, path),
}


def randomised(case):
    """The case's model with other weights than the golden ones, so that what isn't loaded shows."""
    meta, arrays = golden.load(case)
    return golden.factory(meta["family"], meta["kwargs"]).eval(), meta, arrays


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("case", DENSE + CLASSIFIERS)
def test_outputs_of_the_original(tmp_path, case, writer):
    model, meta, arrays = randomised(case)
    filled = golden.fill(golden.factory(meta["family"], meta["kwargs"])).state_dict()
    WRITERS[writer](filled, tmp_path / writer)
    report = checkpoints.load(model, tmp_path / writer)
    assert set(report.used) == set(filled)
    assert not report.converted
    assert not report.absent
    out = model(golden.tensor(f"input:{meta['id']}", meta["input"]))
    outs = {"out0": out} if case in CLASSIFIERS else {f"out{i}": m for i, m in enumerate(out)}
    assert max(golden.error(value, arrays[name]) for name, value in outs.items()) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(path.stem for path in golden.DATA.glob("variant_*.npz")))
def test_outputs_of_published_models(tmp_path, case):
    """From an old detector, by way of transformers where it has the model, to the original's output.

    `test_architectures.py` has the three published models of which there is no output.
    """
    meta, arrays = golden.load(case)
    mm2(golden.fill(golden.factory(meta["family"], meta["kwargs"])).state_dict(), tmp_path / "detector.pth")
    file = tmp_path / "detector.pth"
    if meta["family"] != "dinats":
        file = tmp_path / "hf"
        options = dict(model_type="dinat", dilations="classification") if "dinat" in case else dict(model_type="nat")
        checkpoints.convert(tmp_path / "detector.pth", file, "hf", **options)
    pretrained = dict(type="Pretrained", checkpoint=str(file))
    model = golden.factory(meta["family"], meta["kwargs"] | dict(init_cfg=pretrained)).eval()
    model.init_weights()
    maps = model(golden.tensor(f"input:{meta['id']}", meta["input"]))
    for i, found in enumerate(maps):
        assert golden.error(golden.strided(found), arrays[f"samp{i}"]) < 2e-5


@pytest.mark.parametrize(("family", "arch"), FAMILIES)
def test_every_architecture_matches_its_own_files(family, arch):
    """Names and shapes alone: a classifier's file into the dense model, and the preset recognised."""
    classifier = dict(NAT=NATClassifier, DiNAT=models.DiNATClassifier, DiNAT_s=models.DiNATsClassifier)[family]
    with torch.device("meta"):
        source = classifier(arch).state_dict()
        target = getattr(models, family)(arch).state_dict()
    layout = checkpoints.recognise(source)
    found = checkpoints.matching.match(target, layout)
    assert set(found.sources) | set(found.absent) == set(target)
    assert set(found.absent) == {f"norm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    assert found.left_out == dict.fromkeys(["norm.weight", "norm.bias", "head.weight", "head.bias"], "classifier")
    assert (family, arch) in checkpoints.architecture_of(layout.backbone).presets()


def test_presets_are_told_apart():
    with torch.device("meta"):
        state = models.NATClassifier("small").state_dict()
    assert checkpoints.architecture_of(state).presets() == [("NAT", "small")]
    with torch.device("meta"):
        state = models.DiNATClassifier("large-384-k11").state_dict()
    assert checkpoints.architecture_of(state).presets() == [("DiNAT", "large-384-k11")]


def test_report_names_every_tensor(tmp_path):
    torch.save(tiny(NATClassifier, num_classes=5).state_dict(), tmp_path / "cls.pth")
    model = tiny()
    report = checkpoints.load(model, tmp_path / "cls.pth")
    assert set(report.used) | set(report.absent) == set(model.state_dict())
    assert set(report.absent.values()) == {"fresh-output-norms"}
    assert report.left_out == dict.fromkeys(["norm.weight", "norm.bias", "head.weight", "head.bias"], "classifier")
    text = str(report)
    assert "a classification model with original names" in text
    assert f"{len(report.used)} tensors used" in text
    assert "8 not in the file, rule 'fresh-output-norms'" in text
    assert "4 left out, rule 'classifier'" in text


def test_a_wrapped_model_is_loaded_like_the_one_inside(tmp_path):
    save(tiny().state_dict(), tmp_path / "x.pth")
    expected = tiny()
    checkpoints.load(expected, tmp_path / "x.pth")
    for wrap in (torch.compile, torch.nn.DataParallel, lambda model: torch.compile(torch.nn.DataParallel(model))):
        model = tiny()
        checkpoints.load(wrap(model), tmp_path / "x.pth")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_fewer_outputs_than_the_file_has(tmp_path):
    save(tiny().state_dict(), tmp_path / "a.safetensors")
    report = checkpoints.load(tiny(out_indices=(1, 3)), tmp_path / "a.safetensors")
    assert set(report.left_out.values()) == {"unused-output-norm"}
    assert set(report.left_out) == {f"norm{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


def test_more_outputs_than_the_file_has_is_an_error(tmp_path):
    """Some norms without the others are a damaged file, not a classifier's."""
    save(tiny(out_indices=(1, 3)).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"4 missing: norm0.weight, norm0.bias, norm2.weight, norm2.bias"):
        checkpoints.load(tiny(), tmp_path / "a.safetensors")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float64, 0)])
def test_other_precisions_are_converted(tmp_path, dtype, tolerance):
    source = tiny().state_dict()
    save({name: value.to(dtype) for name, value in source.items()}, tmp_path / "half.safetensors")
    model = NAT(**TINY)
    report = checkpoints.load(model, tmp_path / "half.safetensors")
    assert set(report.converted.values()) == {f"{str(dtype).removeprefix('torch.')} -> float32"}
    assert len(report.converted) == len(source)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, source[name], rtol=tolerance, atol=tolerance)


def test_kernel_is_resized_only_on_request(tmp_path):
    source = tiny().state_dict()
    save(source, tmp_path / "k3.safetensors")
    model = NAT(**{**TINY, "kernel_size": 5})
    with pytest.raises(ValueError, match=r"kernel_size 3 weights, 5 model; resize_rpb=True"):
        checkpoints.load(model, tmp_path / "k3.safetensors")
    report = checkpoints.load(model, tmp_path / "k3.safetensors", resize_rpb=True)
    assert report.converted == {n: "kernel 3 -> 5" for n in source if n.endswith("rpb")}
    name = "levels.1.blocks.0.attn.rpb"
    expected = torch.nn.functional.interpolate(source[name][None], (9, 9), mode="bicubic")[0]
    assert torch.equal(model.state_dict()[name], expected)


def test_resized_bias_keeps_constants_order_and_symmetry():
    ramp = torch.linspace(-1, 1, 13)[None, :, None].expand(2, 13, 13)
    resized = checkpoints.resize_rpb(ramp, 11)
    assert resized.shape == (2, 21, 21)
    assert torch.allclose(resized[:, :, :1].expand(2, 21, 21), resized, atol=1e-6)
    assert (resized[0, :, 0].diff() > 0).all()
    assert torch.allclose(resized.flip(1), -resized, atol=1e-6)
    assert torch.allclose(checkpoints.resize_rpb(torch.full((1, 5, 5), 3.0), 7), torch.tensor(3.0), atol=1e-6)
    assert torch.equal(checkpoints.resize_rpb(ramp, 7), ramp)
    assert checkpoints.resize_rpb(ramp.bfloat16(), 9).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="expected an odd number"):
        checkpoints.resize_rpb(ramp, 8)
    with pytest.raises(ValueError, match=r"expected \[heads, 2k - 1, 2k - 1\]"):
        checkpoints.resize_rpb(torch.zeros(2, 13, 12), 7)


def test_head_is_replaced_only_on_request(tmp_path):
    torch.save(tiny(NATClassifier, num_classes=5).state_dict(), tmp_path / "five.pth")
    model = tiny(NATClassifier, num_classes=3)
    before = model.head.weight.detach().clone()
    with pytest.raises(ValueError, match="5 classes in the file, 3 in the model; see replace_head"):
        checkpoints.load(model, tmp_path / "five.pth")
    report = checkpoints.load(model, tmp_path / "five.pth", replace_head=True)
    assert torch.equal(model.head.weight, before)
    assert report.absent == report.left_out == dict.fromkeys(["head.weight", "head.bias"], "replaced-head")
    assert "norm.weight" in report.used


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        (dict(embed_dim=16), "embed_dim 8 weights, 16 model"),
        (dict(depths=(1, 1, 1, 1)), r"depths \(1, 2, 1, 1\) weights, \(1, 1, 1, 1\) model"),
        (dict(num_heads=(2, 2, 4, 8)), r"num_heads \(1, 2, 4, 8\) weights, \(2, 2, 4, 8\) model"),
        (dict(mlp_ratio=3.0), "mlp_ratio 2.0 weights, 3.0 model"),
        (dict(layer_scale=1e-5), "layer_scale False weights, True model"),
        (dict(qkv_bias=False), "qkv_bias True weights, False model"),
        (dict(in_chans=4), "in_chans 3 weights, 4 model"),
    ],
)
def test_the_cause_is_guessed(tmp_path, fields, cause):
    save(tiny().state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=cause):
        checkpoints.load(tiny(**fields), tmp_path / "a.safetensors")


def test_the_wrong_family_is_named(tmp_path):
    save(tiny(DiNAT_s).state_dict(), tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="DiNAT_s weights, NAT or DiNAT model"):
        checkpoints.load(tiny(), tmp_path / "s.safetensors")


def test_a_refused_file_leaves_the_model_as_it_was(tmp_path):
    source = tiny().state_dict()
    source["norm3.bias"][0] = float("nan")
    save(source, tmp_path / "nan.safetensors")
    model = NAT(**TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"norm3\.bias: 1 of 64 values are NaN or infinite"):
        checkpoints.load(model, tmp_path / "nan.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_several_backbones_need_a_prefix(tmp_path):
    state = tiny().state_dict()
    both = {f"student.backbone.{n}": v for n, v in state.items()}
    both |= {f"teacher.backbone.{n}": v + 1 for n, v in state.items()}
    torch.save({"state_dict": both}, tmp_path / "semi.pth")
    model = NAT(**TINY)
    with pytest.raises(ValueError, match=r"2 backbones in one file, under 'student.backbone.', 'teacher.backbone.'"):
        checkpoints.load(model, tmp_path / "semi.pth")
    with pytest.raises(
        ValueError, match=r"no backbone under prefix='backbone.'; the file has one under 'student.backbone.'"
    ):
        checkpoints.load(model, tmp_path / "semi.pth", prefix="backbone")
    report = checkpoints.load(model, tmp_path / "semi.pth", prefix="teacher.backbone")
    assert torch.equal(model.norm0.weight, state["norm0.weight"] + 1)
    assert set(report.left_out.values()) == {"outside-backbone"}
    assert len(report.left_out) == len(state)


def test_averaged_weights_are_a_choice(tmp_path):
    state = tiny().state_dict()
    averaged = {f"module.{n}": v + 1 for n, v in state.items()} | {"steps": torch.tensor(9)}
    torch.save({"state_dict": state, "ema_state_dict": averaged}, tmp_path / "ema.pth")
    model = NAT(**TINY)
    assert checkpoints.load(model, tmp_path / "ema.pth").extras == ("ema_state_dict",)
    assert torch.equal(model.norm0.weight, state["norm0.weight"])
    checkpoints.load(model, tmp_path / "ema.pth", entry="ema_state_dict")
    assert torch.equal(model.norm0.weight, state["norm0.weight"] + 1)
    with pytest.raises(ValueError, match=r"no weights under 'swa'; it has 'state_dict', 'ema_state_dict'"):
        checkpoints.load(model, tmp_path / "ema.pth", entry="swa")


@pytest.mark.parametrize("scope", ["mmengine", "mmdet"])
def test_init_cfg_goes_through_the_same_door(tmp_path, scope):
    torch.save(tiny(NATClassifier, num_classes=5).state_dict(), tmp_path / "cls.pth")
    registry = MODELS if scope == "mmengine" else pytest.importorskip("mmdet.registry").MODELS
    pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "cls.pth"))
    model = registry.build(dict(type="NAT", **TINY, init_cfg=pretrained))
    model.init_weights()
    expected = tiny().state_dict()
    loaded = {n: v for n, v in model.state_dict().items() if not re.match(r"norm\d", n)}
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_init_cfg_refuses_what_does_not_fit(tmp_path):
    torch.save(tiny(DiNAT_s).state_dict(), tmp_path / "s.pth")
    pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "s.pth"))
    with pytest.raises(ValueError, match="DiNAT_s weights, NAT or DiNAT model"):
        NAT(**TINY, init_cfg=pretrained).init_weights()
    with pytest.raises(ValueError, match=r"has the fields resize_rbp; expected only checkpoint, .*resize_rpb"):
        NAT(**TINY, init_cfg=dict(**pretrained, resize_rbp=True)).init_weights()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'missing.pth'"):
        NAT(**TINY, init_cfg=dict(type="Pretrained", checkpoint="missing.pth")).init_weights()


def test_init_cfg_takes_options(tmp_path):
    save(tiny().state_dict(), tmp_path / "k3.safetensors")
    pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "k3.safetensors"), resize_rpb=True)
    model = NAT(**{**TINY, "kernel_size": 5}, init_cfg=pretrained)
    model.init_weights()
    assert torch.equal(model.norm2.weight, tiny().norm2.weight)
