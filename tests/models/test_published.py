"""The table of published dense results."""

from collections import Counter
from pathlib import Path

import pytest

from nat_dense.models.published import METHODS, PUBLISHED
from nat_dense.models.variants import DILATIONS, VARIANTS

ROOT = Path(__file__).parents[2]


def test_every_method_has_its_published_rows():
    assert Counter(row.method for row in PUBLISHED) == dict(zip(METHODS, (8, 13, 13), strict=True))
    assert len({(row.method, row.name) for row in PUBLISHED}) == len({row.checkpoint for row in PUBLISHED}) == 34


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.method}-{row.name}")
def test_row_is_complete(row):
    assert VARIANTS[row.family][row.arch].published
    assert row.dilations is None if row.family == "NAT" else row.dilations in DILATIONS[row.family]
    results = (row.box_ap, row.mask_ap) if row.task == "detection" else (row.miou, row.miou_ms)
    others = (row.miou, row.miou_ms) if row.task == "detection" else (row.box_ap, row.mask_ap)
    assert all(40 < result < 60 for result in results)
    assert others == (None, None)
    assert (ROOT / row.config).is_file()
    assert row.pretrained.endswith("_224.pth") or row.family == "NAT"


def test_names_of_the_released_files():
    files = {(row.method, row.name): row.checkpoint.removeprefix("https://shi-labs.com/projects/") for row in PUBLISHED}
    assert files["mask_rcnn", "NAT-Mini"] == "nat/checkpoints/DET/nat_mini_maskrcnn.pth"
    assert files["cascade_mask_rcnn", "NAT-Base"] == "nat/checkpoints/DET/nat_base_cascademaskrcnn.pth"
    assert files["upernet", "NAT-Tiny"] == "nat/checkpoints/SEG/nat_tiny_upernet.pth"
    assert files["mask_rcnn", "DiNAT_s-Tiny"] == "dinat/checkpoints/coco/maskrcnn_dinat_s_tiny.pth"
    assert files["cascade_mask_rcnn", "DiNAT-Large"] == "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_large.pth"
    assert files["upernet", "DiNAT_s-Large"] == "dinat/checkpoints/ade20k/upernet_dinat_s_large.pth"
