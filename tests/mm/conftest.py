"""Configs on small data."""

import pytest
from mmengine.registry import init_default_scope

from nat_dense.mm.config import load_config
from tests.mm.small import DETECTOR, SEGMENTOR, ade_options, coco_options, parse_options, write_ade, write_coco


@pytest.fixture
def coco(tmp_path):
    """A detector's config on small data, and where the data lies."""
    init_default_scope("mmdet")
    root = write_coco(tmp_path / "coco")
    return load_config(DETECTOR, parse_options(coco_options(root))), root


@pytest.fixture
def ade(tmp_path):
    """A segmentor's config on small data, and where the data lies."""
    init_default_scope("mmseg")
    root = write_ade(tmp_path / "ade")
    return load_config(SEGMENTOR, parse_options(ade_options(root))), root
