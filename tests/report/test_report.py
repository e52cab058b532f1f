"""Curves, pictures and pages from known numbers and masks."""

import json

import matplotlib
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData
from PIL import Image

from nat_dense.report.curves import draw_curves, read_scalars
from nat_dense.report.page import Section, write_page
from nat_dense.report.pictures import Example, Region, _instances, _segments, draw_examples


def write_scalars(folder, entries):
    (folder / "vis_data").mkdir(parents=True)
    (folder / "vis_data" / "scalars.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_scalars_of_a_resumed_run_are_joined(tmp_path):
    write_scalars(tmp_path / "20260101_000000", [{"loss": 2.0, "step": 20}, {"loss": 1.5, "step": 40}])
    write_scalars(tmp_path / "20260101_000100", [{"loss": 1.4, "step": 40}, {"mIoU": 33.0, "step": 50}])
    scalars = read_scalars(tmp_path)
    assert scalars["loss"] == {20: 2.0, 40: 1.4}
    assert scalars["mIoU"] == {50: 33.0}


def test_a_folder_without_scalars_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no logged scalars"):
        read_scalars(tmp_path)


def test_curves_are_drawn(tmp_path):
    scalars = {"loss": {20: 2.0, 40: 1.0}, "loss_mask": {20: 0.5, 40: 0.2}, "mIoU": {40: 0.3}}
    draw_curves(scalars, {"mIoU": "mIoU"}, tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert pixels.shape == (510, 1500, 3)
    assert (pixels == (0x25, 0x63, 0xEB)).all(axis=2).any(), "the first curve's colour"


def test_unlikely_instances_are_left_out_and_likely_ones_drawn_last():
    found = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [0, 0, 4, 4]]),
        labels=torch.tensor([0, 1, 2]),
        scores=torch.tensor([0.9, 0.3, 0.6]),
        masks=torch.ones(3, 4, 4, dtype=torch.bool),
    )
    assert [(region.category, round(region.score, 2)) for region in _instances(found)] == [(2, 0.6), (0, 0.9)]


def test_a_segmentation_map_is_split_into_classes_and_void():
    regions = _segments(PixelData(data=torch.tensor([[[0, 0, 2], [2, 255, 0]]])), classes=3)
    assert [(region.category, int(region.mask.sum())) for region in regions] == [(0, 3), (2, 2), (-1, 1)]


def test_examples_are_drawn_in_their_colours(tmp_path):
    mask = np.zeros((32, 32), bool)
    mask[8:24, 8:24] = True
    example = Example(np.zeros((32, 32, 3), np.uint8), [Region(mask, 0, (8, 8, 24, 24))], [Region(mask, 1)])
    draw_examples([example], ["a", "b"], [(255, 0, 0), (0, 0, 255)], tmp_path / "examples.png")
    pixels = np.asarray(Image.open(tmp_path / "examples.png").convert("RGB")).astype(int)
    halves = {
        name: np.abs(pixels - colour).sum(axis=2) < 12 for name, colour in (("a", (140, 0, 0)), ("b", (0, 0, 140)))
    }
    left_to_right = {name: np.nonzero(half)[1].mean() for name, half in halves.items()}
    assert left_to_right["a"] < left_to_right["b"], "ground truth stands left of the prediction"


def test_a_box_at_the_top_edge_keeps_its_name(tmp_path):
    def red_pixels(top: int) -> int:
        nothing = np.zeros((64, 64), bool)
        example = Example(np.zeros((64, 64, 3), np.uint8), [], [Region(nothing, 0, (8, top, 56, top + 24))])
        draw_examples([example], ["a long name"], [(255, 0, 0)], tmp_path / "examples.png")
        pixels = np.asarray(Image.open(tmp_path / "examples.png").convert("RGB")).astype(int)
        return int(((pixels[..., 0] > 150) & (pixels[..., 1:].max(axis=2) < 100)).sum())

    assert red_pixels(top=0) > 0.8 * red_pixels(top=24)


def test_the_classes_of_segmentation_maps_are_named(tmp_path):
    maps = [Region(np.ones((8, 8), bool), category) for category in (1, -1)]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_examples(
            [Example(np.zeros((8, 8, 3), np.uint8), maps, [])], ["sky", "sea"], [(9, 9, 9)] * 2, tmp_path / "a.svg"
        )
    text = (tmp_path / "a.svg").read_text()
    assert [name in text for name in (">sea<", ">ignored<", ">sky<")] == [True, True, False]


@pytest.mark.parametrize("name", ["sea", "swimming pool", "a name of as many letters as fit into two lines"])
def test_all_names_fit_into_the_picture(tmp_path, name):
    classes = [f"{name} {i}" for i in range(40)]
    maps = [Region(np.ones((8, 8), bool), category) for category in range(40)]
    draw_examples([Example(np.zeros((8, 8, 3), np.uint8), maps, [])], classes, [(9, 9, 9)] * 40, tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert (pixels[:, [0, 1, -2, -1]] == 255).all()
    assert (pixels[[0, 1, -2, -1]] == 255).all()


def test_the_page_escapes_text(tmp_path):
    sections = [Section("<b>bold</b>", table=[("a", "b"), ("1 < 2", "3")], commands="run --this && that")]
    write_page(tmp_path / "page.html", "A & B", "intro", [("metric", "0.5")], sections, "footer")
    text = (tmp_path / "page.html").read_text()
    assert "<title>A &amp; B</title>" in text
    assert "<h2>&lt;b&gt;bold&lt;/b&gt;</h2>" in text
    assert "<td>1 &lt; 2</td><td>3</td>" in text
    assert "<pre>run --this &amp;&amp; that</pre>" in text
