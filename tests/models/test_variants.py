"""The table of published architectures, against what the models really have."""

import json

import pytest
import torch

from nat_dense import models
from nat_dense.models import variants
from tests import golden

CLASSIFIERS = {"NAT": models.NATClassifier, "DiNAT": models.DiNATClassifier, "DiNAT_s": models.DiNATsClassifier}
ROWS = [(family, arch) for family, rows in variants.VARIANTS.items() for arch in rows]


@pytest.mark.parametrize(("family", "arch"), ROWS)
def test_parameters_are_exact(family, arch):
    row = variants.variant(family, arch)
    with torch.device("meta"):
        found = sum(p.numel() for p in CLASSIFIERS[family](arch).parameters())
    assert row.params is None or found == row.params
    assert row.published == (arch != "nano")


@pytest.mark.parametrize("name", json.loads((golden.DATA / "param_counts.json").read_text())["counts"])
def test_parameters_of_the_original(name):
    counts = json.loads((golden.DATA / "param_counts.json").read_text())["counts"][name]
    if name.startswith("dinat_s_"):
        family, arch = "DiNAT_s", name.removeprefix("dinat_s_")
    else:
        family, arch = {"nat": "NAT", "dinat": "DiNAT"}[name.split("_")[0]], "-".join(name.split("_")[1:])
    with torch.device("meta"):
        for key, expected in counts.items():
            if key == "backbone":
                model = getattr(models, family)(arch)
            else:
                model = CLASSIFIERS[family](arch, num_classes=int(key.removeprefix("classification_")))
            assert sum(p.numel() for p in model.parameters()) == expected, key


def test_presets_are_distinct_and_complete():
    assert sum(row.published for rows in variants.VARIANTS.values() for row in rows.values()) == 4 + 7 + 5
    urls = [row.checkpoint for rows in variants.VARIANTS.values() for row in rows.values() if row.published]
    assert len(set(urls)) == len(urls)
