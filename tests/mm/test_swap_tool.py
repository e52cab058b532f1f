"""The backbone swap on the command lines, and the configs that it writes."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import nat_dense
from nat_dense.mm.config import load_config
from nat_dense.mm.keys import check_keys
from nat_dense.mm.swap import swap_backbone
from nat_dense.models import NAT
from tests.mm.small import REPOSITORY, load_tool

MASK_RCNN = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
PSPNET = "mmseg::pspnet/pspnet_r101-d8_4xb2-40k_cityscapes-512x1024.py"
SEGFORMER = "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py"
IMPORTING = """
from mmengine.config import read_base
from mmdet.models import FPN, ResNet, RetinaHead, RetinaNet
from torch.optim import SGD

default_scope = "mmdet"
model = dict(
    type=RetinaNet,
    backbone=dict(type=ResNet, depth=50),
    neck=dict(type=FPN, in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5),
    bbox_head=dict(type=RetinaHead, num_classes=80, in_channels=256),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type=SGD, lr=0.1, weight_decay=0.0))
"""
"""A config of classes instead of their names."""


class TestTool:
    """tools/swap_backbone.py."""

    def test_writes_a_whole_config_that_mmengine_reads(self, tmp_path, capsys):
        out = tmp_path / "new" / "config.py"
        load_tool("swap_backbone").main([PSPNET, "--backbone", "nat-mini", "-o", str(out)])
        printed = capsys.readouterr().out
        assert "model.decode_head.in_channels" in printed
        assert "note: map 3 of the old backbone had stride 8" in printed
        written = Config.fromfile(str(out))
        assert "_base_" not in out.read_text()
        assert written.custom_imports.imports == ["nat_dense"]
        expected = swap_backbone(load_config(PSPNET), "nat-mini").to_dict()
        del expected["optimizer"]  # a variable of the file, which optim_wrapper has been made of
        assert written.to_dict() == expected

    def test_replaces_a_file_only_where_it_may(self, tmp_path, capsys):
        out = tmp_path / "config.py"
        out.write_text("mine = 1\n")
        command = [PSPNET, "--backbone", "nat-mini", "-o", str(out)]
        with pytest.raises(SystemExit, match="2"):
            load_tool("swap_backbone").main(command)
        assert "config.py exists; choose another name, or allow overwriting" in capsys.readouterr().err
        options = ["--cfg-options", "optim_wrapper.optimizer.lr=nan"]
        with pytest.raises(SystemExit, match="2"):  # what is written can't be read
            load_tool("swap_backbone").main([*command, "--overwrite", *options])
        assert "name 'nan' is not defined" in capsys.readouterr().err
        assert out.read_text() == "mine = 1\n"
        load_tool("swap_backbone").main([*command, "--overwrite"])
        assert "mine" not in out.read_text()
        assert list(tmp_path.iterdir()) == [out]

    def test_leaves_out_what_no_reader_needs(self, tmp_path, capsys):
        """A variable of the file would pass for a setting of older releases."""
        out = tmp_path / "config.py"
        load_tool("swap_backbone").main([SEGFORMER, "--backbone", "nat-nano", "-o", str(out)])
        assert "optimizer" in load_config(SEGFORMER)
        cfg = load_config(str(out))
        assert "optimizer" not in cfg
        assert check_keys(cfg) == []

    def test_of_a_config_that_imports_its_classes(self, tmp_path):
        file, out = tmp_path / "lazy.py", tmp_path / "config.py"
        file.write_text(IMPORTING)
        load_tool("swap_backbone").main([str(file), "--backbone", "nat-nano", "-o", str(out)])
        assert "read_base" not in out.read_text()
        assert "SGD =" not in out.read_text()
        init_default_scope("mmdet")
        model = MODELS.build(Config.fromfile(str(out)).model)
        assert type(model).__name__ == "RetinaNet"
        assert isinstance(model.backbone, NAT)

    @pytest.mark.slow
    def test_a_process_that_knows_nothing_of_nat_dense_builds_the_written_config(self, tmp_path):
        out = tmp_path / "config.py"
        load_tool("swap_backbone").main([PSPNET, "--backbone", "nat-nano", "-o", str(out)])
        program = (
            "import sys; from mmengine.config import Config; from mmengine.registry import MODELS, init_default_scope\n"
            "cfg = Config.fromfile(sys.argv[1]); init_default_scope(cfg.default_scope)\n"
            "print(type(MODELS.build(cfg.model).backbone))"
        )
        environment = os.environ | dict(PYTHONPATH=str(REPOSITORY))
        command = [sys.executable, "-c", program, str(out)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        assert "nat_dense.models.nat.NAT" in done.stdout

    def test_inherits_where_the_path_allows_it(self, tmp_path):
        out = tmp_path / "config.py"
        load_tool("swap_backbone").main([MASK_RCNN, "--backbone", "dinat-mini", "-o", str(out), "--inherit"])
        assert out.read_text().startswith(f"_base_ = {MASK_RCNN!r}\n")
        assert len(out.read_text().splitlines()) < 60
        written = Config.fromfile(str(out))
        assert written.model.backbone.type == "DiNAT"
        assert written.model.backbone.dilations == "detection"
        assert "depth" not in written.model.backbone

    def test_does_not_inherit_from_what_mmengine_alone_cannot_find(self, tmp_path, capsys):
        try:
            distribution("mmsegmentation")
        except PackageNotFoundError:
            pass
        else:
            pytest.skip("MMEngine finds mmseg:: here: the distribution is called mmsegmentation")
        out = tmp_path / "config.py"
        with pytest.raises(SystemExit, match="2"):
            load_tool("swap_backbone").main([PSPNET, "--backbone", "nat-mini", "-o", str(out), "--inherit"])
        assert "leave --inherit out" in capsys.readouterr().err
        assert not out.exists()

    def test_inherits_from_a_file_by_a_relative_path(self, tmp_path):
        base, out = tmp_path / "a" / "base.py", tmp_path / "b" / "config.py"
        base.parent.mkdir()
        base.write_text(load_config(MASK_RCNN).pretty_text)
        load_tool("swap_backbone").main([str(base), "--backbone", "nat-mini", "-o", str(out), "--inherit"])
        assert out.read_text().startswith("_base_ = '../a/base.py'\n")

    def test_refuses_in_one_line(self, tmp_path, capsys):
        out = tmp_path / "config.py"
        arguments = ["mmdet::ssd/ssd300_coco.py", "--backbone", "nat-tiny", "-o", str(out)]
        with pytest.raises(SystemExit, match="2"):
            load_tool("swap_backbone").main(arguments)
        expected = "swap_backbone.py: error: the backbone can't be exchanged: SSDVGG: SSD's extra layers"
        assert expected in capsys.readouterr().err
        assert not out.exists()

    def test_values_that_a_config_cannot_hold_are_refused(self, tmp_path, capsys):
        base, out = tmp_path / "base.py", tmp_path / "config.py"
        base.write_text(load_config(MASK_RCNN).pretty_text + "\nthreshold = float('nan')\n")
        with pytest.raises(SystemExit, match="2"):
            load_tool("swap_backbone").main([str(base), "--backbone", "nat-mini", "-o", str(out)])
        assert "a value can't be written down as text: name 'nan' is not defined" in capsys.readouterr().err
        assert not out.exists()

    def test_options_are_merged_after_the_swap(self, tmp_path):
        out = tmp_path / "config.py"
        arguments = [
            MASK_RCNN,
            "--backbone",
            "nat-mini",
            "-o",
            str(out),
            "--cfg-options",
            "model.backbone.init_cfg=None",
        ]
        load_tool("swap_backbone").main(arguments)
        assert Config.fromfile(str(out)).model.backbone.init_cfg is None


@pytest.mark.parametrize("tool", ["train", "test", "get_flops"])
def test_the_tools_take_a_backbone(tool):
    arguments = dict(train=[], test=["weights.pth"], get_flops=["--shape", "64", "64"])[tool]
    args = load_tool(tool).parse_args([MASK_RCNN, *arguments, "--backbone", "nat-nano", "--optimizer", "adamw"])
    cfg = nat_dense.mm.swap.command.load_swapped(args)
    assert (cfg.model.backbone.type, cfg.model.backbone.arch) == ("NAT", "nano")
    assert cfg.optim_wrapper.optimizer.type == "AdamW"


def test_optimizer_alone_keeps_the_backbone():
    args = load_tool("train").parse_args([MASK_RCNN, "--optimizer", "adamw"])
    cfg = nat_dense.mm.swap.command.load_swapped(args)
    assert cfg.model.backbone.type == "ResNet"
    assert cfg.optim_wrapper.optimizer.type == "AdamW"
