"""Operation counts of whole models: by hand, against MMEngine's analysis, and against the published figures."""

import json
from collections import Counter

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nat_dense.mm.config import load_config
from nat_dense.mm.flops import EXTRA_KINDS, MAC_KINDS, OperationCounter, count_config, count_model
from nat_dense.models import NAT, DiNAT, DiNATClassifier, DiNATsClassifier, NATClassifier
from nat_dense.models.published import PUBLISHED
from nat_dense.models.variants import VARIANTS
from tests.mm.small import DETECTOR, NANO, SEGMENTOR, load_tool

get_flops = load_tool("get_flops").main
published_costs = load_tool("published_costs")


@pytest.fixture(scope="module")
def costs():
    return published_costs.count_published()


def counted(run) -> Counter:
    with torch.no_grad(), OperationCounter() as counter:
        run()
    return counter.counts


# --- the counter ------------------------------------------------------------------------------------------------------


def test_layers_counted_by_hand():
    with torch.device("meta"):
        x = torch.empty(2, 3, 8, 10)
        conv, norm, batch_norm = nn.Conv2d(3, 6, 3, stride=2), nn.LayerNorm(6), nn.BatchNorm2d(6).eval()
        linear, up = nn.Linear(6, 4), nn.ConvTranspose2d(6, 5, 2, stride=2)

        def run() -> None:
            y = batch_norm(conv(x))  # [2, 6, 3, 4]
            linear(norm(y.permute(0, 2, 3, 1)))
            up(y)
            F.interpolate(y, size=(6, 8), mode="bilinear")
            F.interpolate(y, size=(6, 8), mode="nearest")
            F.adaptive_avg_pool2d(y, 2)
            F.adaptive_avg_pool2d(y, 1)
            F.gelu(y + y).softmax(1)

        counts = counted(run)
    tokens = 2 * 3 * 4
    assert counts == {
        "convolution": tokens * 6 * 3 * 3 * 3 + tokens * 6 * 5 * 2 * 2,
        "matmul": tokens * 6 * 4,
        "norm": tokens * 6 * (5 + 2),
        "resize": (4 + 1) * 2 * 6 * 6 * 8,
        "pool": 2 * tokens * 6,
    }


def test_macs_are_half_of_what_torch_counts():
    with torch.device("meta"):
        model, image = NAT(arch="nano").eval(), torch.empty(1, 3, 96, 128)
    with FlopCounterMode(display=False) as torch_counter:
        model(image)
    counts = counted(lambda: model(image))
    assert 2 * sum(counts[kind] for kind in MAC_KINDS) == torch_counter.get_total_flops()
    assert counts["na2d_bias"] * 2 * 32 == counts["na2d"]  # heads of 32 channels


def test_gradients_change_no_count():
    """In grad mode the operator for packed tokens runs."""
    with torch.device("meta"):
        model, image = NAT(arch="nano").eval(), torch.empty(1, 3, 96, 128)
    with torch.enable_grad(), OperationCounter() as counter:
        model(image)
    assert counter.counts == counted(lambda: model(image))


@pytest.mark.parametrize("dilations", [None, "segmentation"])
def test_mmengine_counts_the_same(dilations):
    """On the CPU, where MMEngine traces a real run; the dilated maps are smaller than their windows."""
    model = DiNAT(arch="nano", dilations=dilations).eval()
    image = torch.zeros(1, 3, 32, 64)
    theirs = FlopAnalyzer(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    total, by_operator = theirs.total(), theirs.by_operator()
    ours = counted(lambda: model.to("meta")(image.to("meta")))
    assert total == sum(ours.values()) > 0
    assert (by_operator["na2d"], by_operator["na2d_bias"]) == (ours["na2d"], ours["na2d_bias"])


# --- the published figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.method}-{row.name}")
def test_published_parameters_and_cost(costs, row):
    total = costs[row].total
    assert round(total.parameters / 1e6) == row.params_m
    assert round(total.operations / 1e9) == row.gmacs


def test_multiply_adds_alone_are_not_what_was_published(costs):
    """As docs/flops.md says: the rough counts of norms and resizes decide 27 rows."""
    assert sum(round(cost.total.macs / 1e9) == row.gmacs for row, cost in costs.items()) == 7


def test_parts_of_a_detector(costs):
    (row,) = (row for row in PUBLISHED if row.config in DETECTOR)
    parts = {part.name: part for part in costs[row].parts}
    assert list(parts) == ["backbone", "neck", "rpn_head", "roi_head.bbox_head", "roi_head.mask_head"]
    assert costs[row].total.parameters == 47_540_502
    fully_connected = 256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 80)
    assert parts["roi_head.bbox_head"].macs == parts["roi_head.bbox_head"].operations == 1000 * fully_connected
    assert parts["roi_head.mask_head"].note == "100 detections"
    assert {kind: n for kind, n in parts["backbone"].counts.items() if kind == "na2d"} == {"na2d": 4_064_256_000}


def test_auxiliary_head_has_parameters_and_no_cost(costs):
    (row,) = (row for row in PUBLISHED if row.config in SEGMENTOR)
    auxiliary = costs[row].parts[-1]
    assert (auxiliary.name, auxiliary.operations, auxiliary.note) == ("auxiliary_head", 0, "training only")
    assert auxiliary.parameters == 256 * 256 * 9 + 2 * 256 + 256 * 150 + 150


def test_document_has_the_current_table(costs):
    document = published_costs.DOCUMENT.read_text()
    assert document == published_costs.with_table(document, published_costs.markdown_table(costs))


def test_published_classification_costs():
    """The published figures with one digit; the three that differ from ours are named in docs/flops.md."""
    classifiers = {"NAT": NATClassifier, "DiNAT": DiNATClassifier, "DiNAT_s": DiNATsClassifier}
    differing = {}
    for family, rows in VARIANTS.items():
        for arch, row in rows.items():
            if not row.published:
                continue
            with torch.device("meta"):
                model = classifiers[family](arch).eval()
                image = torch.empty(1, 3, row.image_size, row.image_size)
            cost = sum(counted(lambda model=model, image=image: model(image)).values()) / 1e9
            if round(cost, 1) != row.gmacs:
                differing[f"{family}-{arch}"] = round(cost, 2)
    assert differing == {"DiNAT-large": 30.53, "DiNAT_s-small": 8.77, "DiNAT_s-base": 15.47}


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_writes_table_and_json(capsys, tmp_path):
    file = tmp_path / "cost.json"
    options = ["model.test_cfg.rpn.max_per_img=500", *NANO, "model.neck.in_channels=[32,64,128,256]"]
    get_flops([DETECTOR, "--shape", "64", "96", "--json", str(file), "--cfg-options", *options])
    assert "roi_head.bbox_head: 500 proposals" in " ".join(capsys.readouterr().out.split())
    cost = json.loads(file.read_text())
    assert (cost["config"], cost["height"], cost["width"]) == (DETECTOR, 64, 96)
    parts, total = cost["parts"], cost["total"]
    assert parts["neck"]["by_kind"]["convolution"] == parts["neck"]["macs"] > 0
    for key in ("parameters", "macs", "operations"):
        assert total[key] == sum(part[key] for part in parts.values())
    with pytest.raises(SystemExit, match="2"):
        get_flops([DETECTOR, "--shape", "32", "32", "--json", str(file)])
    assert "cost.json exists; choose another name" in capsys.readouterr().err
    assert json.loads(file.read_text()) == cost
    assert total["operations"] - total["macs"] == sum(total["by_kind"][kind] for kind in EXTRA_KINDS) > 0


def test_model_that_can_not_be_built_on_the_meta_device():
    """Swin reads values of a tensor while it is built."""
    cost = count_config(load_config("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"), 800, 1280)
    assert cost.total.parameters == 47_794_602
    assert round(cost.total.operations / 1e9) == 267


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("mmdet::detr/detr_r50_8xb2-150e_coco.py", [], "DETR has encoder, decoder, query_embedding"),
        ("mmdet::htc/htc_r50_fpn_1x_coco.py", [], "roi_head is a HybridTaskCascadeRoIHead"),
        ("mmdet::fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py", [], "FastRCNN has no rpn_head"),
        ("mmdet::_base_/datasets/coco_instance.py", [], "coco_instance.py has no model"),
        (DETECTOR, ["--cfg-options", "model.neck.in_channels=[1,2,3,4]"], "neck (FPN) can't be run on shapes alone"),
    ],
)
def test_what_can_not_be_counted_is_said_in_one_line(config, options, message, capsys):
    with pytest.raises(SystemExit) as exit_status:
        get_flops([config, "--shape", "64", "96", *options])
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err


def test_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="image of 0 x 96 pixels: expected a height and a width of at least 1"):
        count_model(nn.Linear(1, 1, device="meta"), 0, 96)


def test_model_without_a_backbone_is_refused():
    with pytest.raises(ValueError, match="Linear has no backbone"):
        count_model(nn.Linear(1, 1, device="meta"), 8, 8)
