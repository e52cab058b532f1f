"""MMDetection's and MMSegmentation's own Python interface with our configs and the checkpoints of our tools."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from nat_dense.checkpoints import read
from nat_dense.mm.config import load_config
from tests.mm.small import (
    DETECTOR,
    NANO,
    SEGMENTOR,
    SIZE,
    ade_options,
    coco_options,
    load_tool,
    parse_options,
    picture,
    write_ade,
    write_coco,
)


@pytest.fixture(scope="module", params=["detector", "segmentor"])
def trained(request, tmp_path_factory):
    """The task, the config that a short run wrote into its work-dir, and its checkpoint."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "detector":
        config, checkpoint = DETECTOR, "epoch_1.pth"
        options = coco_options(write_coco(root / "data", train=2, val=1))
    else:
        config, checkpoint = SEGMENTOR, "iter_1.pth"
        options = ade_options(write_ade(root / "data", train=2, val=1), iterations=1)
    load_tool("train").main([config, "--work-dir", str(root / "run"), "--cfg-options", *options])
    return request.param, root / "run" / Path(config).name, root / "run" / checkpoint


@pytest.mark.parametrize("as_array", [False, True])
def test_a_trained_model_predicts(trained, tmp_path, as_array):
    task, config, checkpoint = trained
    image = tmp_path / "image.png"
    picture(0).save(image)
    image = np.asarray(picture(0))[:, :, ::-1] if as_array else str(image)
    if task == "detector":
        from mmdet.apis import inference_detector, init_detector

        model = init_detector(str(config), str(checkpoint), device="cpu")
        instances = inference_detector(model, image).pred_instances
        assert len(instances) > 0
        assert instances.masks.shape == (len(instances), SIZE[1], SIZE[0])
        assert model.dataset_meta["classes"][0] == "person"
    else:
        from mmseg.apis import inference_model, init_model

        model = init_model(str(config), str(checkpoint), device="cpu")
        labels = inference_model(model, image).pred_sem_seg.data
        assert labels.shape == (1, SIZE[1], SIZE[0])
        assert model.dataset_meta["classes"][0] == "wall"
    weights = read(checkpoint).tensors
    assert torch.equal(model.state_dict()["backbone.norm3.weight"], weights["backbone.norm3.weight"])


@pytest.mark.parametrize("path", [DETECTOR, SEGMENTOR])
def test_configs_are_read_by_mmengine_alone(path):
    """The configs need none of our tools: mm's own read them, and building registers the backbones by itself."""
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(parse_options(NANO))
    init_default_scope(cfg.default_scope)
    assert type(MODELS.build(cfg.model.backbone)).__name__ == "NAT"
    assert cfg.model == load_config(path, parse_options(NANO)).model
