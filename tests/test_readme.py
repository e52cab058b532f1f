"""Everything that the README shows is run, or compared with what is run."""

import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from nat_dense.mm.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line]
INFERENCE, OWN_CONFIG, MODULE, OPERATOR, OWN_DATA, TRANSFORMERS = PYTHON


def test_ten_lines_of_python(tmp_path, monkeypatch, capsys):
    """On an untrained model in the place where the quickstart leaves the trained one."""
    from mmdet.apis import init_detector

    from nat_dense.datasets.shapes import ShapesOptions, generate

    assert len([line for line in INFERENCE.splitlines() if line]) <= 10
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    generate("data/shapes", ShapesOptions(train=1, val=1, size=64))
    folder = tmp_path / "work_dirs" / "quickstart" / "detection"
    folder.mkdir(parents=True)
    model = init_detector(re.search(r'config = "(.*?)"', INFERENCE)[1], None, device="cpu")
    torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": model.dataset_meta}}, folder / "iter_1.pth")
    (folder / "last_checkpoint").write_text(str(folder / "iter_1.pth"))
    exec(INFERENCE.replace("score > 0.5", "score > 0"), {})
    assert re.search(r"^\w+ 0\.\d\d \[\d+, \d+, \d+, \d+\]$", capsys.readouterr().out, re.MULTILINE)


def test_modules_and_operator(capsys):
    exec(MODULE, {})
    assert capsys.readouterr().out.strip() == re.search(r"print\(.*\)  # (.*)", MODULE)[1]
    names = {}
    exec(OPERATOR, names)
    assert names["out"].shape == names["query"].shape


def test_transformers():
    pytest.importorskip("transformers")
    names = {}
    exec(TRANSFORMERS, names)
    assert names["model"](torch.zeros(1, 3, 32, 32)).logits.shape == (1, 10)


def test_own_config_builds():
    from mmdet.registry import MODELS

    cfg = load_config("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", {})
    cfg.merge_from_dict(Config.fromstring(OWN_CONFIG, ".py").to_dict())
    model = MODELS.build(cfg.model)
    assert type(model.backbone).__name__ == "NAT"
    assert [conv.conv.in_channels for conv in model.neck.lateral_convs] == [64, 128, 256, 512]


def test_own_data_config_builds(tmp_path):
    from mmdet.registry import MODELS

    path = tmp_path / "parts.py"
    path.write_text(OWN_DATA.replace('_base_ = "', f'_base_ = "{ROOT}/'))
    cfg = load_config(str(path), {})
    model = MODELS.build(cfg.model)
    assert model.roi_head.bbox_head.num_classes == model.roi_head.mask_head.num_classes == 2
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == "parts/val.json"
    assert cfg.train_dataloader.dataset.metainfo.classes == ("bolt", "nut")


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("python tools/")])
def test_commands_are_understood(line):
    _, script, *arguments = shlex.split(line, comments=True)
    spec = importlib.util.spec_from_file_location("tool", ROOT / script)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    config = vars(tool.parse_args(arguments)).get("config", "CONFIG")
    if config != "CONFIG" and "::" not in config:
        assert (ROOT / config).is_file()


@pytest.mark.parametrize("line", [line for line in SHELL if not line.startswith("python tools/")])
def test_other_commands_exist(line):
    words = shlex.split(line, comments=True)
    makefile = (ROOT / "Makefile").read_text()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
    elif words[0] == "pip":
        recipe = makefile.replace("$(TORCH)", re.search(r"TORCH \?= (.*)", makefile)[1]).replace('"', "")
        assert " ".join(words) in recipe
    elif words[0] == "python3":
        assert words[1:3] == ["-m", "venv"]
    else:
        assert os.access(ROOT / words[0], os.X_OK)


def test_links_and_paths_exist():
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if not t.startswith("http")]
    targets += re.findall(r"`((?:nat_dense|tools|configs|tests)/[\w./-]+)`", README)
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []
