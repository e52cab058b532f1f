"""What a file was trained as, read off the config beside its weights."""

import json

import pytest
import torch
from mmengine.config import Config

from nat_dense import checkpoints
from nat_dense.checkpoints.origin import Origin, origin_of
from nat_dense.hf import DinatBackbone, DinatConfig
from nat_dense.mm.checkpoints import check_fits
from nat_dense.models import NAT, DiNAT
from tests.checkpoints.files import TINY, tiny

DILATIONS = [[1], [1, 3], [1], [2]]
HEAD = dict(type="DepthwiseSeparableASPPHead", dilations=(1, 12, 24, 36))


def written(tmp_path, backbone: dict, weights=None):
    """A file as MMEngine writes it, with the text of a config."""
    cfg = Config(dict(model=dict(backbone=backbone, decode_head=HEAD, neck=dict(dilations=[1, 2, 3]))))
    path = tmp_path / "x.pth"
    torch.save(dict(state_dict=weights or tiny().state_dict(), meta=dict(cfg=cfg.pretty_text)), path)
    return checkpoints.read(path)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        (dict(type="DiNAT", arch="tiny"), Origin("DiNAT", "classification")),
        (dict(type="DiNAT", arch="tiny", dilations="segmentation-640"), Origin("DiNAT", "segmentation-640")),
        (dict(type="DiNAT", dilations=DILATIONS), Origin("DiNAT", DILATIONS)),
        (
            dict(type="nat_dense.DiNAT_s", dilations=tuple(map(tuple, DILATIONS))),
            Origin("DiNAT_s", tuple(map(tuple, DILATIONS))),
        ),
        (dict(type="DiNAT", depths=[1, 2, 1, 1]), Origin("DiNAT", None)),
        (dict(type="NAT", arch="tiny"), Origin("NAT", None)),
        (dict(type="ResNet"), None),
        (dict(type="NAT", teacher=dict(type="DiNAT")), None),
    ],
)
def test_configs_of_mmengine(tmp_path, backbone, expected):
    found = origin_of(written(tmp_path, backbone))
    if expected and isinstance(expected.dilations, tuple):  # a config makes lists of tuples, or not
        found = Origin(found.family, tuple(map(tuple, found.dilations)))
    assert found == expected


def test_variables_of_the_file(tmp_path):
    """They stand before the model that was made of them."""
    variable = "bb = dict(arch='tiny', dilations='classification', type='NAT')"
    text = variable + "\nmodel = dict(\n    backbone=dict({}type='DiNAT'))"
    for fields, expected in (("dilations='detection', ", "detection"), ("dilations=[[1 2]], ", None)):
        torch.save(dict(state_dict=tiny().state_dict(), meta=dict(cfg=text.format(fields))), tmp_path / "x.pth")
        assert origin_of(checkpoints.read(tmp_path / "x.pth")) == (Origin("DiNAT", expected) if expected else None)


def test_files_without_a_config(tmp_path):
    for meta in ({}, dict(cfg=3), dict(cfg="")):
        torch.save(dict(state_dict=tiny().state_dict(), meta=meta), tmp_path / "x.pth")
        assert origin_of(checkpoints.read(tmp_path / "x.pth")) is None


def test_folders_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    config = DinatConfig(**{name: TINY[name] for name in ("embed_dim", "depths", "num_heads", "kernel_size")})
    config.dilations = [[1] * depth for depth in TINY["depths"]]
    config.dilations[1][0] = 3
    DinatBackbone(config).save_pretrained(tmp_path)
    assert origin_of(checkpoints.read(tmp_path)) == Origin("DiNAT", config.dilations)
    assert "the config stored with the weights has a DiNAT" in checkpoints.inspect(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="swin")))
    assert origin_of(checkpoints.read(tmp_path)) is None


def test_other_dilations_than_those_of_the_training_are_told(tmp_path):
    trained = [[1] * depth for depth in TINY["depths"]]
    trained[0][0] = 2
    checkpoint = written(tmp_path, dict(type="DiNAT", dilations=trained), DiNAT(**TINY).state_dict())
    assert check_fits(DiNAT(**TINY, dilations=trained), checkpoint) == []
    (note,) = check_fits(NAT(**TINY), checkpoint)
    assert f"was trained as DiNAT with dilations {trained}, but this model has" in note
    assert "[[2]" in checkpoints.inspect(checkpoint.path)


def test_the_dilations_go_into_a_folder_for_transformers(tmp_path):
    trained = [[1] * depth for depth in TINY["depths"]]
    trained[0][0] = 2
    checkpoint = written(tmp_path, dict(type="DiNAT", dilations=trained))
    checkpoints.convert(checkpoint.path, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["dilations"]) == ("dinat", trained)


def test_a_work_dir_names_its_checkpoint(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "iter_2.pth")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    for source, kind in ((tmp_path, FileNotFoundError), (tmp_path / "last_checkpoint", ValueError)):
        with pytest.raises(kind, match=r"pass .*iter_2\.pth"):
            checkpoints.read(source)
