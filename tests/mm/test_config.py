"""Config paths: those of the installed libraries, whatever their distributions are called, and mistakes in them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nat_dense.mm.config import load_config, merge_options
from nat_dense.mm.keys import check_keys
from tests.mm.small import DETECTOR, REPOSITORY, SEGMENTOR, load_tool

PSPNET = "mmseg::pspnet/pspnet_r101-d8_4xb2-40k_cityscapes-512x1024.py"
"""Its file names the optimizer first, and then makes optim_wrapper of it."""

READ = """
import importlib, sys
from nat_dense.mm.config import load_config
for site, module in zip(sys.argv[1::2], sys.argv[2::2]):
    sys.path.insert(0, site)
    importlib.invalidate_caches()
    cfg = load_config(f"{module}::net/child.py")
    print(cfg.filename, cfg.model.type, cfg.base, sep="|")
    sys.path.remove(site)
"""
"""Reads one config of each stand-in, in a process that has not imported the real libraries."""

LIBRARIES = [
    ("mmdet", "mmdet"),
    ("onedl-mmdetection", "mmdet"),
    ("mmsegmentation", "mmseg"),
    ("onedl-mmsegmentation", "mmseg"),
]
"""Each library under the name of the original distribution and under the maintained fork's."""


def stand_in(site: Path, distribution: str, module: str) -> Path:
    """A distribution of this name with a module that ships two configs, one of which inherits from the other."""
    configs = site / module / ".mim" / "configs" / "net"
    configs.mkdir(parents=True)
    (site / module / "__init__.py").write_text("")
    (site / module / ".mim" / "model-index.yml").write_text("Import: []\n")
    (configs / "base_v1.5.py").write_text(f"base = {distribution!r}\nmodel = dict(type='Base')\n")
    (configs / "child.py").write_text(f"_base_ = '{module}::net/base_v1.5.py'\nmodel = dict(type='Child')\n")
    metadata = site / f"{distribution.replace('-', '_')}-9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 9.9\n")
    (metadata / "top_level.txt").write_text(f"{module}\n")
    return configs


def test_shipped_configs_are_found_under_every_distribution(tmp_path):
    sites = [tmp_path / distribution for distribution, _ in LIBRARIES]
    configs = [stand_in(site, *library) for site, library in zip(sites, LIBRARIES, strict=True)]
    pairs = [str(argument) for site, (_, module) in zip(sites, LIBRARIES, strict=True) for argument in (site, module)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", READ, *pairs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    expected = [f"{c / 'child.py'}|Child|{name}" for c, (name, _) in zip(configs, LIBRARIES, strict=True)]
    assert done.stdout.strip().splitlines()[-4:] == expected


def test_shipped_configs_of_what_is_installed():
    assert load_config("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py").model.backbone.depth == 50
    swin = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
    assert load_config(swin).model.backbone.embed_dims == 96


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("nat_dense.mm.config.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="onedl-mmsegmentation, which is not installed"):
        load_config("mmseg::swin/x.py")


def test_a_missing_config_suggests_its_neighbours():
    with pytest.raises(
        FileNotFoundError, match=r"In the same folder: mask-rcnn_nat-tiny_fpn_8xb2-amp-ms-crop-3x_coco.py"
    ):
        load_config(DETECTOR.replace("ms-crop-3x", "mscrop-3x"))
    with pytest.raises(FileNotFoundError, match="no folder 'no/such'"):
        load_config("no/such/config.py")


def test_options_are_merged_and_misspelt_ones_refused():
    cfg = load_config(DETECTOR, {"train_cfg.max_epochs": 1, "model.backbone.frozen_stages": 0, "randomness.seed": 5})
    assert (cfg.train_cfg.max_epochs, cfg.model.backbone.frozen_stages, cfg.randomness.seed) == (1, 0, 5)
    with pytest.raises(ValueError, match=r"no key 'optim_wraper'\. Did you mean 'optim_wrapper'"):
        load_config(DETECTOR, {"optim_wraper.type": "OptimWrapper"})


def test_fields_of_what_is_none():
    cfg = load_config(DETECTOR, {"model.backbone.init_cfg": None})
    options = {"model.backbone.init_cfg.type": "Pretrained", "model.backbone.init_cfg.checkpoint": "x.pth"}
    assert merge_options(cfg, options) == []
    assert cfg.model.backbone.init_cfg == dict(type="Pretrained", checkpoint="x.pth")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"train_cfg.max_epochs.x": 1}, "--cfg-options train_cfg.max_epochs.x: train_cfg.max_epochs is 36, which"),
        ({"model.neck": None, "model.neck.in_channels": 3}, "model.neck is None, which has no fields to set."),
        (
            {"param_scheduler.2.begin": 1},
            "param_scheduler.2.begin: param_scheduler is a list; expected an index, 0 to 1.",
        ),
        ({"param_scheduler.first": 1}, "param_scheduler is a list; expected an index, 0 to 1."),
    ],
)
def test_options_for_fields_that_can_not_be(options, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_config(DETECTOR, options)


@pytest.mark.parametrize(
    ("config", "option", "value", "places"),
    [
        (DETECTOR, "data_root", "elsewhere/", ["train_dataloader.dataset.data_root", "val_evaluator.ann_file"]),
        (SEGMENTOR, "crop_size", (64, 64), ["model.data_preprocessor.size", "dataset.pipeline.3.crop_size"]),
        (PSPNET, "optimizer.lr", 0.1, ["optim_wrapper.optimizer"]),
        (PSPNET, "train_pipeline", [], ["train_dataloader.dataset.pipeline"]),
    ],
)
def test_variables_of_a_file_have_been_read(config, option, value, places):
    with pytest.raises(ValueError, match="is a variable of the config file, and nothing reads it any more") as raised:
        load_config(config, {option: value})
    assert all(place in str(raised.value) for place in places)


def test_keys_that_mmengine_reads_and_those_of_other_code_can_be_set(tmp_path):
    (tmp_path / "c.py").write_text("mine = dict(number=3)\nother = dict(number=4)\n")
    cfg = load_config(str(tmp_path / "c.py"), {"find_unused_parameters": True, "compile": False, "mine.number": 5})
    assert (cfg.find_unused_parameters, cfg.compile, cfg.mine.number) == (True, False, 5)
    note = "--cfg-options mine.number: MMEngine doesn't read 'mine'; it has an effect only if your own code reads it."
    assert merge_options(cfg, {"mine.number": 6, "sync_bn": "torch"}) == [note]


def test_keys_of_older_releases_and_those_that_look_like_others(tmp_path):
    (tmp_path / "c.py").write_text(
        "optimizer = dict(type='SGD')\nlaod_from = 'x'\nlr_config = dict(step=8)\nproject = 'mine'\n"
        "img_scale = (9, 9)\ntest_pipeline = [dict(type='Resize')]\n"
        "val_dataloader = dict(dataset=dict(pipeline=test_pipeline, img_scale=img_scale))\n"
    )
    assert check_keys(load_config(str(tmp_path / "c.py"))) == [
        "'optimizer' is a key from older releases that nothing reads any more; set optim_wrapper.optimizer.",
        "nothing reads the config's 'laod_from'; did you mean 'load_from'?",
        "'lr_config' is a key from older releases that nothing reads any more; set param_scheduler.",
    ]
    (tmp_path / "d.py").write_text(
        "data = dict(r='x')\nrunner = [1]\noptimizer = dict(lr=1)\nn = [i for i in runner]\n"
        "experiment_name = f'{data}'\noptim_wrapper = dict(optimizer={**optimizer, 'type': 'SGD'})\n"
    )
    assert check_keys(load_config(str(tmp_path / "d.py"))) == []
    for config in (DETECTOR, SEGMENTOR, PSPNET):
        cfg = load_config(config)
        assert check_keys(cfg) == []
        cfg.optim_wrapper.optimizer = dict(type="AdamW", lr=1.0)
        assert check_keys(cfg) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = b", "c.py' can't be read: NameError: name 'b' is not defined"),
        ("custom_imports = dict(imports=['nosuch'])", "c.py' can't be read: ImportError: Failed to import custom"),
        ("custom_imports = 'nosuch'", "c.py' can't be read: TypeError"),
    ],
)
def test_files_that_fail_when_they_are_run(tmp_path, text, expected):
    (tmp_path / "c.py").write_text(text + "\n")
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_config(str(tmp_path / "c.py"))


def test_parts_that_are_no_dicts():
    cfg = load_config(DETECTOR)
    cfg.default_hooks = []
    assert check_keys(cfg) == []
    cfg.default_hooks = [dict(type="EMAHook")]
    with pytest.raises(ValueError, match=r"default_hooks is \[.*\]: expected a dict\."):
        check_keys(cfg)


def test_values_that_are_equal_by_accident(tmp_path):
    """A variable is taken for the source of a field where that has its name, or it is a part or a path."""
    text = "project = 'nccl'\nsteps = 3\nsizes = (9, 9)\nleft = (9, 9)\nenv_cfg = dict(dist_cfg=dict(backend='nccl'))\n"
    text += "train_cfg = dict(max_iters=3)\nparam_scheduler = dict(left=(9, 9), sizes_too=(9, 9))\n"
    (tmp_path / "c.py").write_text(text)
    for option in ("project", "steps", "sizes"):
        cfg = load_config(str(tmp_path / "c.py"))
        assert len(merge_options(cfg, {option: 5})) == 1
        assert cfg[option] == 5
    with pytest.raises(ValueError, match=r"made from it: param_scheduler.left, param_scheduler.sizes_too\."):
        load_config(str(tmp_path / "c.py"), {"left": 5})
    both = {"left": 5, "param_scheduler.left": 5, "param_scheduler.sizes_too": 5}
    assert load_config(str(tmp_path / "c.py"), both).param_scheduler.left == 5


def test_a_new_key_beside_one_that_looks_like_it_is_told():
    cfg = load_config(DETECTOR)
    (note,) = merge_options(cfg, {"model.test_cfg.rcnn.score_tr": 0.5, "model.test_cfg.rcnn.min_bbox_size": 3})
    assert note == "--cfg-options model.test_cfg.rcnn.score_tr adds 'score_tr' beside 'score_thr': is it misspelt?"


def test_modules_of_an_option_are_imported(tmp_path, monkeypatch):
    (tmp_path / "module_of_an_option.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    load_config(DETECTOR, {"custom_imports.imports": ["nat_dense", "module_of_an_option"]})
    assert "module_of_an_option" in sys.modules
    with pytest.raises(ImportError, match="Failed to import nat_dens"):
        load_config(DETECTOR, {"custom_imports.imports": ["nat_dens"]})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model.roi_head.bbox_head.reg_class_agnostic", "False", "reg_class_agnostic is the text 'False': write it"),
        ("resume", "True", "resume is the text 'True': write it without quotes"),
        ("work_dir", 5, "work_dir is 5: expected a folder's name"),
    ],
)
def test_values_of_another_kind(field, value, expected):
    cfg = load_config(DETECTOR)
    cfg.merge_from_dict({field: value})
    with pytest.raises(ValueError, match=expected):
        check_keys(cfg)


def test_texts_of_other_programs():
    cfg = load_config(DETECTOR)
    cfg.visualizer.vis_backends = [dict(type="WandbVisBackend", init_kwargs=dict(tags="True"))]
    check_keys(cfg)


@pytest.mark.parametrize("value", ["dict(type='Pretrained')", "{'type':'Pretrained'}"])
def test_a_dict_on_the_command_line(value, capsys):
    with pytest.raises(SystemExit):
        load_tool("train").main([DETECTOR, "--cfg-options", f"model.backbone.init_cfg={value}"])
    error = capsys.readouterr().err.strip()
    assert error.endswith(
        "model.backbone.init_cfg: a dict can't be given here; set its fields, model.backbone.init_cfg.FIELD=VALUE"
    )
