"""Whole segmentors and detectors' maps as ONNX files, through the command line."""

import json

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from nat_dense.mm.config import load_config
from nat_dense.mm.onnx import graph_of
from nat_dense.models import NAT
from tests.mm.small import REPOSITORY, load_tool

CONFIGS = REPOSITORY / "configs/quickstart"
SEGMENTOR = str(CONFIGS / "nat-nano_upernet_1xb4_shapes.py")
DETECTOR = str(CONFIGS / "mask-rcnn_nat-nano_fpn_1xb4_shapes.py")

export = load_tool("export_onnx").main


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A file of random weights for each config."""
    files = {}
    for config in (SEGMENTOR, DETECTOR):
        cfg = load_config(config)
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        content = dict(
            state_dict=MODELS.build(cfg.model).state_dict(), meta=dict(dataset_meta=dict(classes=["a", "b"]))
        )
        files[config] = str(tmp_path_factory.mktemp("weights") / "epoch_1.pth")
        torch.save(content, files[config])
    return files


def test_a_segmentor_gives_logits_of_the_image(checkpoints):
    graph = graph_of(load_config(SEGMENTOR), checkpoints[SEGMENTOR])
    assert (graph.channels, graph.output_names) == (3, ["logits"])
    assert graph.metadata["part"] == "logits"
    assert graph.metadata["channel_order"] == "RGB"
    assert json.loads(graph.metadata["classes"]) == ["a", "b"]
    assert len(json.loads(graph.metadata["mean"])) == len(json.loads(graph.metadata["std"])) == 3
    with torch.no_grad():
        assert graph.module(torch.rand(1, 3, 50, 70)).shape == (1, 7, 50, 70)


def test_four_channels_without_a_mean(tmp_path):
    cfg = load_config(SEGMENTOR, {"model.backbone.in_chans": 4})
    cfg.model.data_preprocessor.mean = cfg.model.data_preprocessor.std = None
    init_default_scope(cfg.default_scope)
    torch.save(MODELS.build(cfg.model).state_dict(), tmp_path / "weights.pth")
    graph = graph_of(cfg, str(tmp_path / "weights.pth"), "backbone")
    assert graph.channels == 4
    with torch.no_grad():
        assert len(graph.module(torch.rand(1, graph.channels, 32, 32))) == 4


def test_parts_of_a_detector(checkpoints):
    sizes = {}
    for part in (None, "backbone"):
        graph = graph_of(load_config(DETECTOR), checkpoints[DETECTOR], part)
        assert graph.output_names is None
        with torch.no_grad():
            sizes[graph.metadata["part"]] = [tuple(m.shape[1:]) for m in graph.module(torch.rand(1, 3, 64, 96))]
    assert sizes == {
        "neck": [(48, 16, 24), (48, 8, 12), (48, 4, 6), (48, 2, 3)],
        "backbone": [(32, 16, 24), (64, 8, 12), (128, 4, 6), (256, 2, 3)],
    }


def test_a_window_that_slides_is_told(checkpoints):
    cfg = load_config(SEGMENTOR, {"model.test_cfg": dict(mode="slide", crop_size=(64, 64), stride=(32, 32))})
    assert "the file takes whole images" in graph_of(cfg, checkpoints[SEGMENTOR]).notices[-1]


def test_weights_of_another_model_are_refused(checkpoints):
    with pytest.raises(ValueError, match="belongs to another model"):
        graph_of(load_config(SEGMENTOR), checkpoints[DETECTOR])


def test_weights_of_a_backbone_alone_are_refused(tmp_path):
    torch.save(NAT(arch="nano").state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="holds only a backbone; expected the weights of the whole model"):
        graph_of(load_config(SEGMENTOR), str(tmp_path / "backbone.pth"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--part", "logits", "--shape", "64", "64"],
            "part='logits': MaskRCNN has no such part to export, only backbone",
        ),
        (["--shape", "0", "64"], "image_size=(0, 64): expected a height and a width in pixels"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, checkpoints, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        export([DETECTOR, checkpoints[DETECTOR], "-o", str(tmp_path / "model.onnx"), *arguments])
    assert stopped.value.code == 2
    assert f"export_onnx.py: error: {message}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("config", [SEGMENTOR, DETECTOR], ids=["upernet", "mask-rcnn"])
def test_the_file_computes_what_the_model_does(config, dynamic, checkpoints, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    path = tmp_path / "model.onnx"
    options = ["--dynamic"] if dynamic else []
    export([config, checkpoints[config], "-o", str(path), "--shape", "96", "128", *options])
    assert "1 x 96 x 128 pixels: differs from the model by at most" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["part"] == ("logits" if config == SEGMENTOR else "neck")
    module = graph_of(load_config(config), checkpoints[config]).module
    for size in [(1, 3, 96, 128), *([(2, 3, 75, 201)] if dynamic else [])]:
        image = torch.randn(size)
        with torch.no_grad():
            wanted = module(image)
        wanted = [wanted] if isinstance(wanted, torch.Tensor) else wanted
        for found, expected in zip(session.run(None, {"image": image.numpy()}), wanted, strict=True):
            assert np.abs(found - expected.numpy()).max() < 1e-4
