"""The two examples, run as users run them, on sets of a few pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import golden

pytest.importorskip("transformers", reason="transformers is missing: pip install 'nat_dense[hf]'")
pytest.importorskip("accelerate", reason="accelerate is missing: pip install 'nat_dense[hf]'")
pytest.importorskip("mmengine", reason="the data sets are drawn with what comes with the mm extra")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(example: str, *arguments: str) -> str:
    environment = os.environ | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    command = [sys.executable, str(ROOT / "examples" / example), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_classifier_and_then_a_dense_model(tmp_path):
    """What the example saves starts a dense backbone by init_cfg, and a second run of the example."""
    from nat_dense.datasets import shape_folders
    from nat_dense.models import NAT

    shape_folders.generate(tmp_path / "data", train=4, val=1, size=32)
    small = ("--epochs", "1", "--batch", "20")
    out = run("transformers_classification.py", str(tmp_path / "data"), str(tmp_path / "a"), "--size", "32", *small)
    assert "'eval_top1'" in out
    backbone = NAT(arch="nano", init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "a")))
    before = backbone.levels[0].blocks[0].attn.qkv.weight.clone()
    backbone.init_weights()
    assert not torch.equal(backbone.levels[0].blocks[0].attn.qkv.weight, before)
    again = ("--model", str(tmp_path / "a"))
    out = run("transformers_classification.py", str(tmp_path / "data"), str(tmp_path / "b"), *again, *small)
    assert "'eval_top1'" in out


def test_segmentation(tmp_path):
    from transformers import UperNetForSemanticSegmentation

    from nat_dense.datasets.shapes import ShapesOptions, generate

    generate(tmp_path / "data", ShapesOptions(train=4, val=2, size=64))
    out = run("transformers_segmentation.py", str(tmp_path / "data"), str(tmp_path / "out"), "--epochs", "1")
    assert "'eval_mIoU'" in out
    import nat_dense.hf  # noqa: F401  (UPerNet's backbone is found through the Auto classes)

    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    assert model(golden.tensor("image", (1, 3, 64, 64))).logits.shape == (1, 7, 64, 64)
