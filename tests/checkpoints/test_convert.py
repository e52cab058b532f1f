"""Conversions: round trips to the bit, whole files or none, and the command lines."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from safetensors import safe_open

from nat_dense import checkpoints
from nat_dense.checkpoints.writing import save
from nat_dense.files import atomic
from nat_dense.models import NAT, DiNAT_s, DiNATClassifier, DiNATsClassifier, NATClassifier, variants
from tests.checkpoints.files import hf_state, tiny, write_mm2

ROOT = Path(__file__).parents[2]
CONFIG = dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3, mlp_ratio=2.0)
HF_CONFIG = dict(**CONFIG, layer_scale_init_value=1e-5, num_labels=6)


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def assert_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


MODELS = {
    "dense": lambda: tiny(layer_scale=1e-5),
    "classification": lambda: tiny(NATClassifier, num_classes=6, layer_scale=1e-5),
    "dense s": lambda: tiny(DiNAT_s),
    "classification s": lambda: tiny(DiNATsClassifier, num_classes=6),
}


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_same_kind_keeps_every_bit(tmp_path, name, dtype, suffix):
    state = {n: v.to(dtype) for n, v in MODELS[name]().state_dict().items()}
    torch.save(state, tmp_path / "in.pth")
    report = checkpoints.convert(tmp_path / "in.pth", tmp_path / f"out.{suffix}", name.split()[0])
    assert_bits(checkpoints.read(tmp_path / f"out.{suffix}").tensors, state)
    assert set(report.used) == set(state)


@pytest.mark.parametrize("back", ["dense", "classification"])
def test_to_transformers_and_back_keeps_every_bit(tmp_path, back):
    state = MODELS[back]().state_dict()
    save(state, tmp_path / "in.safetensors")
    model_type = "dinat" if back == "classification" else None
    checkpoints.convert(tmp_path / "in.safetensors", tmp_path / "hf.safetensors", "hf", model_type=model_type)
    hf = checkpoints.read(tmp_path / "hf.safetensors").tensors
    expected = hf_state(HF_CONFIG, "backbone" if back == "dense" else "dinat")
    expected = {name: value for name, value in expected.items() if "stem" not in name}
    assert_bits(hf, expected)
    checkpoints.convert(tmp_path / "hf.safetensors", tmp_path / "out.pth", back)
    assert_bits(checkpoints.read(tmp_path / "out.pth").tensors, state)


def test_old_detector_to_mm(tmp_path):
    state = MODELS["dense"]().state_dict()
    heads = {"neck.fpn_convs.0.conv.bias": torch.ones(4), "roi_head.bbox_head.fc_cls.bias": torch.ones(3)}
    whole = {f"backbone.{name}": value for name, value in state.items()} | heads
    copies = {"ema_" + name.replace(".", "_"): value + 1 for name, value in whole.items()}
    write_mm2(tmp_path / "old.pth", whole | copies)
    report = checkpoints.convert(tmp_path / "old.pth", tmp_path / "new.pth", "mm")
    found = checkpoints.read(tmp_path / "new.pth")
    assert_bits(found.tensors, whole)
    classes = dict(classes=("person", "bicycle"), palette=[(220, 20, 60), (119, 11, 32)])
    assert found.extras == {"meta": {"dataset_meta": classes}}
    assert report.left_out == dict.fromkeys(copies, "ema-copy")
    assert report.extras == ("meta", "optimizer")
    # Nothing of mm 1.x is left in the file: PyTorch's own defaults read it.
    assert set(torch.load(tmp_path / "new.pth", weights_only=True)) == {"meta", "state_dict"}
    checkpoints.convert(tmp_path / "new.pth", tmp_path / "again.pth", "mm")
    assert_bits(checkpoints.read(tmp_path / "again.pth").tensors, whole)


def test_classifier_to_mm_is_a_backbone_under_its_name(tmp_path):
    save(MODELS["classification"]().state_dict(), tmp_path / "in.safetensors")
    report = checkpoints.convert(tmp_path / "in.safetensors", tmp_path / "mm.pth", "mm")
    assert all(name.startswith("backbone.") for name in report.used)
    assert set(report.left_out) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize(("kind", "model_type"), [("dense", "nat"), ("classification", "nat"), ("dense", "dinat")])
def test_folder_for_transformers(tmp_path, kind, model_type):
    save(MODELS[kind]().state_dict(), tmp_path / "in.safetensors")
    dilations = "detection" if model_type == "dinat" else None
    options = dict(model_type=model_type, dilations=dilations)
    checkpoints.convert(tmp_path / "in.safetensors", tmp_path / "hf", "hf", **options)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = {name: list(v) if isinstance(v, tuple) else v for name, v in CONFIG.items()}
    assert {name: config[name] for name in expected} == expected
    assert (config["model_type"], config["layer_scale_init_value"]) == (model_type, 1e-5)
    assert (config.get("dilations") == [[1], [1, 7], [1], [1]]) == (model_type == "dinat")
    if kind == "dense":
        assert config["out_features"] == ["stage1", "stage2", "stage3", "stage4"]
    else:
        assert len(config["id2label"]) == 6
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    model = MODELS[kind]()
    checkpoints.load(model, tmp_path / "hf")


@pytest.mark.parametrize(("kind", "model_type"), [("dense", "nat"), ("dense", "dinat"), ("classification", "nat")])
def test_folder_is_complete_for_transformers(tmp_path, kind, model_type):
    """The classes for transformers load the folder without a missing or unexpected name, and save one that we load."""
    pytest.importorskip("transformers")
    from nat_dense import hf

    name = {"nat": "Nat", "dinat": "Dinat"}[model_type] + ("Backbone" if kind == "dense" else "ForImageClassification")
    ours = MODELS[kind]().eval()
    save(ours.state_dict(), tmp_path / "in.safetensors")
    dilations = "detection" if model_type == "dinat" else None
    checkpoints.convert(tmp_path / "in.safetensors", tmp_path / "hf", "hf", model_type=model_type, dilations=dilations)
    theirs, info = getattr(hf, name).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert [list(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")] == [[], [], []]
    theirs.save_pretrained(tmp_path / "again")
    again = MODELS[kind]()
    torch.nn.init.zeros_(again.patch_embed.norm.weight)
    checkpoints.load(again, tmp_path / "again")
    assert_bits(again.state_dict(), ours.state_dict())
    image = torch.rand(1, 3, 64, 96)
    if model_type == "nat":
        maps = theirs(image).feature_maps if kind == "dense" else [theirs(image).logits]
        expected = ours(image) if kind == "dense" else [ours(image)]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, expected, strict=True))


def test_kernel_size(tmp_path):
    save(MODELS["dense"]().state_dict(), tmp_path / "in.safetensors")
    report = checkpoints.convert(tmp_path / "in.safetensors", tmp_path / "k.safetensors", "dense", kernel_size=5)
    assert set(report.converted.values()) == {"kernel 3 -> 5"}
    checkpoints.load(tiny(layer_scale=1e-5, kernel_size=5), tmp_path / "k.safetensors")


@pytest.mark.parametrize("mlp_ratio", [2.6, 1.3, 0.7, 3.14159])
def test_a_ratio_that_no_stage_holds_exactly(tmp_path, mlp_ratio):
    """Hidden channels are rounded down in each stage: 2.6 times 96, 192, 384, 768 are 249, 499, 998, 1996."""
    model = NAT(embed_dim=96, depths=(1, 1, 1, 1), num_heads=(3, 6, 12, 24), mlp_ratio=mlp_ratio)
    save(model.state_dict(), tmp_path / "in.safetensors")
    checkpoints.convert(tmp_path / "in.safetensors", tmp_path / "out.pth", "dense")
    assert_bits(checkpoints.read(tmp_path / "out.pth").tensors, model.state_dict())


@pytest.mark.parametrize(
    ("name", "out", "options", "message"),
    [
        ("dense", "x.safetensors", dict(to="classification"), "is a dense backbone .* it has no classifier to write"),
        ("classification", "x.bin", dict(to="hf"), "the weights don't tell NAT from DiNAT: choose the model type"),
        ("dense", "hf", dict(to="hf"), "the weights don't tell NAT from DiNAT: choose the model type"),
        ("dense", "hf", dict(to="hf", model_type="dinat"), "the weights don't contain the dilations"),
        ("dense s", "x.bin", dict(to="hf"), "transformers has no DiNAT_s"),
        ("dense", "x.onnx", dict(to="dense"), "x.onnx: expected a name that ends in .safetensors, .pth, .pt, .bin"),
        ("dense", "x.pth", dict(to="timm"), "to='timm': expected one of dense, classification, hf, mm"),
        ("dense", "missing/x.pth", dict(to="dense"), "no folder .*missing; can't create x.pth"),
        ("dense", "x.pth", dict(to="dense", kernel_size=4), "kernel_size=4: expected an odd number >= 3"),
    ],
)
def test_what_can_not_be_is_refused(tmp_path, name, out, options, message):
    save(MODELS[name]().state_dict(), tmp_path / "in.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        checkpoints.convert(tmp_path / "in.safetensors", tmp_path / out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize(("trained", "other"), [("DiNAT", "nat"), ("NAT", "dinat")])
def test_what_mmengine_trained_keeps_its_type(tmp_path, trained, other):
    """Dilations are no weights: a DiNAT's run in a NAT without an error, and give other results."""
    cfg = Config(dict(model=dict(backbone=dict(type=trained, init_cfg=dict(type="Pretrained", checkpoint="x.pth")))))
    weights = {f"backbone.{name}": value for name, value in MODELS["dense"]().state_dict().items()}
    torch.save({"state_dict": weights, "meta": dict(cfg=cfg.pretty_text)}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=f"in.pth holds a {trained.lower()}, and a {other} has different dilations"):
        checkpoints.convert(tmp_path / "in.pth", tmp_path / "hf", "hf", model_type=other)
    assert not (tmp_path / "hf").exists()
    dilations = "detection" if trained == "DiNAT" else None
    checkpoints.convert(tmp_path / "in.pth", tmp_path / "hf", "hf", dilations=dilations)
    if trained == "NAT":  # dilations that are named are meant
        settings = dict(model_type="dinat", dilations="classification")
        checkpoints.convert(tmp_path / "in.pth", tmp_path / "other", "hf", **settings)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == trained.lower()


@pytest.mark.parametrize("existing", [True, False])
def test_interrupted_writing_leaves_the_old_file_or_none(tmp_path, existing):
    path = tmp_path / "x.safetensors"
    if existing:
        path.write_bytes(b"old")

    def interrupted():
        with atomic(path) as part:
            part.write_bytes(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"old"] if existing else [])


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_files_have_the_permissions_of_any_new_file(tmp_path, name):
    (tmp_path / "any").touch()
    save({"a": torch.zeros(1)}, tmp_path / name)
    assert (tmp_path / name).stat().st_mode == (tmp_path / "any").stat().st_mode


def test_killed_process_leaves_the_old_file(tmp_path):
    """A process that dies without cleaning up (power, out of memory) can't have touched the target."""
    target = tmp_path / "x.pth"
    target.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        with atomic(target) as part:
            part.write_bytes(b"half of the new")
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert target.read_bytes() == b"old"


def test_converting_a_file_onto_itself(tmp_path):
    """The input is mapped, not read: its replacement must not pull it away."""
    state = MODELS["dense"]().state_dict()
    path = tmp_path / "x.safetensors"
    save(state, path)
    before = path.stat().st_mtime_ns
    with pytest.raises(FileExistsError, match=r"x.safetensors exists; choose another name, or allow overwriting"):
        checkpoints.convert(path, path, "dense")
    assert path.stat().st_mtime_ns == before
    checkpoints.convert(path, path, "dense", overwrite=True)
    assert_bits(checkpoints.read(path).tensors, state)


@pytest.mark.parametrize("more", [{"neck.weight": torch.ones(2)}, {"optimizer": {}}], ids=["tensor", "entry"])
def test_what_a_file_would_lose_by_its_own_conversion(tmp_path, more):
    state = {f"backbone.{name}": value for name, value in MODELS["dense"]().state_dict().items()}
    tensors = state | {name: value for name, value in more.items() if isinstance(value, torch.Tensor)}
    path = tmp_path / "x.pth"
    torch.save({"state_dict": tensors} | {name: value for name, value in more.items() if name == "optimizer"}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"overwrite the input and lose 1 entries .*, such as '{next(iter(more))}'"):
        checkpoints.convert(path, path, "dense", overwrite=True)
    assert path.read_bytes() == before


def test_a_folder_that_holds_what_is_read(tmp_path):
    state = {f"backbone.{name}": value for name, value in MODELS["dense"]().state_dict().items()}
    folder = tmp_path / "hf"
    folder.mkdir()
    save(state | {"neck.weight": torch.ones(2)}, folder / "model.safetensors")
    settings = dict(model_type="nat", overwrite=True)
    with pytest.raises(ValueError, match=r"lose 1 entries that the new format doesn't keep, such as 'neck.weight'"):
        checkpoints.convert(folder / "model.safetensors", folder, "hf", **settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"old")
    checkpoints.convert(folder / "model.safetensors", tmp_path / "other", "hf", **settings)
    assert "neck.weight" in checkpoints.read(folder / "model.safetensors").tensors


def test_dilations_without_a_config_to_write_them_into(tmp_path):
    save(MODELS["dense"]().state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"dilations .* only apply to a DiNAT"):
        checkpoints.convert(tmp_path / "x.safetensors", tmp_path / "y.pth", "mm", dilations="classification")


def test_views_do_not_drag_their_base_along(tmp_path):
    base = torch.arange(1000.0)
    save({"a": base[:10], "b": base[:10], "c": base.view(100, 10).T}, tmp_path / "x.pth")
    assert (tmp_path / "x.pth").stat().st_size < 4000 + 3000
    found = checkpoints.read(tmp_path / "x.pth").tensors
    assert torch.equal(found["b"], base[:10])
    assert torch.equal(found["c"], base.view(100, 10).T)


def test_convert_command(tmp_path, capsys):
    torch.save(MODELS["classification"]().state_dict(), tmp_path / "in.pth")
    tool("convert_checkpoint")([str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors"), "--to", "dense"])
    out = capsys.readouterr().out
    assert "a classification model with original names" in out
    assert "4 left out, rule 'classifier'" in out
    checkpoints.load(MODELS["dense"](), tmp_path / "out.safetensors")
    with pytest.raises(SystemExit) as caught:
        tool("convert_checkpoint")([str(tmp_path / "in.pth"), str(tmp_path / "x.bin"), "--to", "hf"])
    assert caught.value.code == 2
    assert "--model-type nat or dinat" in capsys.readouterr().err


def test_inspect_command(tmp_path, capsys):
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in NAT("mini").state_dict().items()}
    weights = {f"backbone.{name}": torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    weights |= {"decode_head.conv_seg.bias": torch.zeros(150), "auxiliary_head.conv_seg.bias": torch.zeros(150)}
    torch.save({"state_dict": weights, "meta": {}}, tmp_path / "seg.pth")
    tool("inspect_checkpoint")([str(tmp_path / "seg.pth")])
    out = capsys.readouterr().out
    assert "a whole segmentor (backbone, auxiliary_head, decode_head)" in out
    assert "NAT arch='mini' or DiNAT arch='mini'" in out
    assert "not stored: none for NAT, for DiNAT one of " + ", ".join(variants.DILATIONS["DiNAT"]) in out
    assert "not in a dense backbone: decode_head (1 tensors), auxiliary_head (1 tensors)" in out
    assert "weights under 'state_dict'" in out
    with pytest.raises(SystemExit):
        tool("inspect_checkpoint")([str(tmp_path / "none.pth")])
    assert "no checkpoint" in capsys.readouterr().err


MEASURE = """
import sys
from nat_dense.checkpoints import convert
def peak():  # of this process alone, unlike ru_maxrss, which starts from the parent's
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
before = peak()
convert(sys.argv[1], sys.argv[2], sys.argv[3], model_type=sys.argv[4] or None)
print(before, peak())
"""


@pytest.mark.slow
def test_memory_of_converting_dinat_large(tmp_path):
    """At most 2.2 times the file, mapped pages and the libraries included."""
    with torch.device("meta"):
        state = DiNATClassifier("large").state_dict()
    torch.save({name: torch.zeros(value.shape) for name, value in state.items()}, tmp_path / "in.pth")
    size = (tmp_path / "in.pth").stat().st_size
    assert size > 4 * variants.variant("DiNAT", "large").params
    conversions = [
        ("in.pth", "dense.safetensors", "dense", ""),
        ("in.pth", "hf.safetensors", "hf", "dinat"),
        ("hf.safetensors", "back.pth", "classification", ""),
    ]
    for source, target, to, model_type in conversions:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / source), str(tmp_path / target), to, model_type]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        before, peak = map(int, run.stdout.split())
        print(f"{source} -> {target}: file {size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB ({peak / size:.2f} x)")
        assert before < peak <= 2.2 * size
