"""What would fail at the first validation fails before training, which otherwise goes as it would without the trial."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.mm.small import (
    DETECTOR,
    SEGMENTOR,
    ade_options,
    coco_options,
    load_tool,
    scalars,
    write_ade,
    write_coco,
)


def fails(config: str, options: list[str], tmp_path, capsys) -> str:
    """What train.py says of a validation that fails; nothing may have been trained."""
    with pytest.raises(SystemExit, match="2"):
        load_tool("train").main([config, "--work-dir", str(tmp_path / "run"), "--cfg-options", *options])
    assert not list((tmp_path / "run").rglob("*.pth"))
    assert not list((tmp_path / "run").rglob("scalars.json"))
    line, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert line.startswith("train.py: error: the first batch of validation, tried before training, fails: ")
    assert line.endswith("(--cfg-options data_checks.validation=none trains without trying)")
    assert hint == "(traceback: NAT_DENSE_DEBUG=1)"
    return line


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.test_cfg.mode=slied", "test mode are supported, but got slied"),
        ("model.test_cfg.mode=slide", "stride"),
        ("val_dataloader.dataset.pipeline.3.meta_keys=(img_path,)", "KeyError: ori_shape"),
    ],
)
def test_what_a_segmentor_is_tested_with(tmp_path, capsys, option, expected):
    assert expected in fails(SEGMENTOR, [*ade_options(write_ade(tmp_path / "ade")), option], tmp_path, capsys)


def test_what_a_detector_is_tested_with(tmp_path, capsys):
    options = [*coco_options(write_coco(tmp_path / "coco")), "model.test_cfg.rcnn.nms.iou_treshold=0.5"]
    assert "unexpected keyword argument 'iou_treshold'" in fails(DETECTOR, options, tmp_path, capsys)


def test_validation_images_of_several_sizes_in_a_batch(tmp_path, capsys):
    root = write_ade(tmp_path / "ade")
    for folder, suffix in (("images", ".jpg"), ("annotations", ".png")):
        file = root / folder / "validation" / f"1{suffix}"
        Image.open(file).resize((64, 64)).save(file)
    options = [*ade_options(root), "val_dataloader.batch_size=2"]
    assert "size in a batch should be the same" in fails(SEGMENTOR, options, tmp_path, capsys)


def test_training_goes_as_without_the_trial(tmp_path):
    """A pipeline of validation that draws numbers of its own would shift those of the training."""
    options = [*ade_options(write_ade(tmp_path / "ade")), "val_dataloader.dataset.pipeline.1.type=RandomResize"]
    options += ["val_dataloader.dataset.pipeline.1.ratio_range=(0.5,2.0)"]
    found = []
    for choice in ("try", "none"):
        folder = tmp_path / choice
        arguments = ["--work-dir", str(folder), "--seed", "3", "--cfg-options", *options]
        load_tool("train").main([SEGMENTOR, *arguments, f"data_checks.validation={choice}"])
        lines = scalars(folder)
        found.append([line["loss"] for line in lines if "loss" in line] + [lines[-1]["mIoU"]])
        found.append([random.random(), np.random.random(), torch.rand(1).item()])
    assert found[0] == found[2]
    assert found[1] == found[3]


def test_a_run_without_validation(tmp_path):
    options = [*ade_options(write_ade(tmp_path / "ade"), iterations=1), "val_dataloader=None", "val_evaluator=None"]
    load_tool("train").main([SEGMENTOR, "--work-dir", str(tmp_path), "--cfg-options", *options, "val_cfg=None"])
    assert (tmp_path / "iter_1.pth").is_file()
