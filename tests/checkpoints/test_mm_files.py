"""Whole detectors and segmentors of mmdet 2.x and mmseg 0.x in the models of mmdet 3 and mmseg 1.

No head that the published models use has changed a name: the lists here are those of the old libraries, and the new
models must ask for exactly these.
"""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import Sequential
from mmengine.registry import MODELS, init_default_scope

from nat_dense import checkpoints
from nat_dense.models import NAT
from tests import golden
from tests.checkpoints.files import write_mm2

ROOT = Path(__file__).parents[2]
PARAMETERS = ("weight", "bias")
CONV_BN = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")


def names(prefix, parts):
    return [f"{prefix}.{part}" for part in parts]


def fpn_and_rpn(levels=4):
    layers = [f"neck.{kind}.{i}.conv" for kind in ("lateral_convs", "fpn_convs") for i in range(levels)]
    return layers + [f"rpn_head.{name}" for name in ("rpn_conv", "rpn_cls", "rpn_reg")]


def mask_head(prefix):
    return [f"{prefix}.convs.{i}.conv" for i in range(4)] + [f"{prefix}.upsample", f"{prefix}.conv_logits"]


def old_mask_rcnn():
    """mmdet 2.19's MaskRCNN with FPN and StandardRoIHead."""
    box = "roi_head.bbox_head"
    layers = [*fpn_and_rpn(), *(f"{box}.{n}" for n in ("fc_cls", "fc_reg", "shared_fcs.0", "shared_fcs.1"))]
    return [n for layer in (*layers, *mask_head("roi_head.mask_head")) for n in names(layer, PARAMETERS)]


def old_cascade():
    """mmdet 2.19's CascadeRCNN with three ConvFCBBoxHeads of four convolutions and one linear layer, and masks."""
    layers, result = fpn_and_rpn(), []
    for stage in range(3):
        box = f"roi_head.bbox_head.{stage}"
        layers += [f"{box}.fc_cls", f"{box}.fc_reg", f"{box}.shared_fcs.0"]
        layers += mask_head(f"roi_head.mask_head.{stage}")
        result += [n for i in range(4) for n in names(f"{box}.shared_convs.{i}", CONV_BN)]
    return result + [n for layer in layers for n in names(layer, PARAMETERS)]


def old_upernet():
    """mmseg 0.20's EncoderDecoder with UPerHead and an auxiliary FCNHead."""
    head = "decode_head"
    blocks = [f"{head}.psp_modules.{i}.1" for i in range(4)] + [f"{head}.bottleneck", f"{head}.fpn_bottleneck"]
    blocks += [f"{head}.{kind}.{i}" for kind in ("lateral_convs", "fpn_convs") for i in range(3)]
    result = [n for block in (*blocks, "auxiliary_head.convs.0") for n in names(block, CONV_BN)]
    return result + [n for h in (head, "auxiliary_head") for n in names(f"{h}.conv_seg", PARAMETERS)]


MASK_RCNN = "mask_rcnn/mask-rcnn_nat-mini_fpn_8xb2-amp-ms-crop-3x_coco.py"
CASCADE = "cascade_mask_rcnn/cascade-mask-rcnn_nat-mini_fpn_8xb2-amp-ms-crop-3x_coco.py"
UPERNET = "upernet/nat-mini_upernet_8xb2-amp-160k_ade20k-512x512.py"
SMALL = {
    MASK_RCNN: {"neck.in_channels": [32, 64, 128, 256], "roi_head.bbox_head.fc_out_channels": 16},
    UPERNET: {
        "decode_head.in_channels": [32, 64, 128, 256],
        "decode_head.channels": 16,
        "auxiliary_head.in_channels": 128,
        "auxiliary_head.channels": 16,
    },
}
"""The published models with heads that are quickly filled; names don't depend on it."""


def config_of(name):
    cfg = Config.fromfile(ROOT / "configs" / name)
    pytest.importorskip(cfg.default_scope)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    return cfg


def build(name, init_cfg=None, *, whole=None, neck=None):
    """A small model of a config, with these `init_cfg` of its backbone, of itself and of its neck."""
    cfg = config_of(name)
    small = {f"model.{key}": value for key, value in SMALL[name].items()}
    cfg.merge_from_dict(small)
    cfg.model.backbone.update(arch="nano", init_cfg=init_cfg)
    cfg.model.init_cfg = whole
    if neck:
        cfg.model.neck.init_cfg = neck
    return MODELS.build(cfg.model)


def old_file(path, model, heads, drop=()):
    """A training state with the old list of names, in the shapes that the new model has for them."""
    shapes = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
    weights = {f"backbone.{n}": golden.parameter(n, v.shape) for n, v in model.backbone.state_dict().items()}
    for name in heads:
        value = shapes[name]
        weights[name] = golden.parameter(name, value.shape) if value.is_floating_point() else torch.tensor(1234)
    return write_mm2(path, {name: value for name, value in weights.items() if not name.endswith(tuple(drop))}), weights


@pytest.mark.parametrize(
    ("config", "old"), [(MASK_RCNN, old_mask_rcnn()), (CASCADE, old_cascade()), (UPERNET, old_upernet())]
)
def test_heads_have_their_old_names(config, old):
    with torch.device("meta"):
        model = MODELS.build(config_of(config).model)
    assert {name for name in model.state_dict() if not name.startswith("backbone.")} == set(old)


@pytest.mark.parametrize(("config", "old"), [(MASK_RCNN, old_mask_rcnn()), (UPERNET, old_upernet())])
def test_old_file_into_the_new_model(tmp_path, config, old):
    model = build(config)
    path, weights = old_file(tmp_path / "old.pth", model, old)
    report = checkpoints.load(model, path)
    assert set(report.used) == set(weights)
    assert [report.absent, report.left_out, report.converted] == [{}, {}, {}]
    assert report.extras == ("meta", "optimizer")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_old_counters_and_averages(tmp_path):
    """PyTorch 0.4 saved no counters, and mmcv's averaging hook a second copy of the parameters."""
    model = build(UPERNET)
    path, weights = old_file(tmp_path / "old.pth", model, old_upernet())
    counters = {name for name in weights if name.endswith("num_batches_tracked")}
    copies = {"ema_" + name.replace(".", "_"): value + 1 for name, value in model.named_parameters()}
    write_mm2(path, {name: value for name, value in weights.items() if name not in counters} | copies)
    report = checkpoints.load(model, path)
    assert report.absent == dict.fromkeys(counters, "batch-norm-counter")
    assert report.left_out == dict.fromkeys(copies, "ema-copy")
    assert torch.equal(model.decode_head.conv_seg.bias, weights["decode_head.conv_seg.bias"])


def test_missing_head_is_an_error(tmp_path):
    model = build(MASK_RCNN)
    path, _ = old_file(tmp_path / "old.pth", model, old_mask_rcnn(), drop=["fc_cls.bias", "upsample.weight"])
    message = "2 missing: roi_head.bbox_head.fc_cls.bias, roi_head.mask_head.upsample.weight"
    with pytest.raises(ValueError, match=message):
        checkpoints.load(model, path)


def test_a_detector_without_its_output_norms_is_damaged(tmp_path):
    model = build(MASK_RCNN)
    lost = [f"norm{i}.{kind}" for i in range(4) for kind in PARAMETERS]
    path, _ = old_file(tmp_path / "old.pth", model, old_mask_rcnn(), drop=[f"backbone.{name}" for name in lost])
    with pytest.raises(ValueError, match=r"8 missing: backbone.norm0.weight, backbone.norm0.bias"):
        checkpoints.load(model, path)


def test_a_backbone_alone_is_not_a_detector(tmp_path):
    torch.save(NAT("nano").state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(
        ValueError, match=r"is a dense backbone .* give the file to the backbone, model.backbone.init_cfg"
    ):
        checkpoints.load(build(MASK_RCNN), tmp_path / "backbone.pth")


def test_model_without_our_backbone(tmp_path):
    torch.save(NAT("nano").state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="Linear has 0 NAT, DiNAT or DiNAT_s backbones; expected one"):
        checkpoints.load(torch.nn.Linear(2, 2), tmp_path / "backbone.pth")


def test_detector_init_takes_an_old_detector_for_its_backbone(tmp_path):
    model = build(MASK_RCNN)
    path, weights = old_file(tmp_path / "old.pth", model, old_mask_rcnn())
    fresh = build(MASK_RCNN, dict(type="Pretrained", checkpoint=str(path)))
    fresh.init_weights()
    assert all(torch.equal(v, weights[f"backbone.{n}"]) for n, v in fresh.backbone.state_dict().items())
    assert not torch.equal(fresh.roi_head.bbox_head.fc_cls.weight, weights["roi_head.bbox_head.fc_cls.weight"])


@pytest.mark.parametrize(("config", "old"), [(MASK_RCNN, old_mask_rcnn()), (UPERNET, old_upernet())])
def test_init_cfg_of_a_whole_model_accounts_for_every_tensor(tmp_path, config, old):
    path, weights = old_file(tmp_path / "old.pth", build(config), old)
    fresh = build(config, whole=dict(type="Pretrained", checkpoint=str(path)))
    fresh.init_weights()
    assert all(torch.equal(value, weights[name]) for name, value in fresh.state_dict().items())
    lost = [name for name in old if name.endswith("weight")][:2]
    path, _ = old_file(path, fresh, old, drop=lost)
    with pytest.raises(ValueError, match=f"2 missing: {', '.join(lost)}"):
        build(config, whole=dict(type="Pretrained", checkpoint=str(path))).init_weights()


def test_init_cfg_of_a_part_accounts_for_every_tensor_of_it(tmp_path):
    path, weights = old_file(tmp_path / "old.pth", build(MASK_RCNN), old_mask_rcnn())
    pretrained = dict(type="Pretrained", checkpoint=str(path), prefix="neck.")
    fresh = build(MASK_RCNN, neck=pretrained)
    fresh.init_weights()
    assert all(torch.equal(value, weights[f"neck.{name}"]) for name, value in fresh.neck.state_dict().items())
    assert not torch.equal(fresh.rpn_head.rpn_conv.weight, weights["rpn_head.rpn_conv.weight"])
    report = checkpoints.load(fresh.neck, path, prefix="neck")
    assert set(report.used) == set(fresh.neck.state_dict())
    assert set(report.left_out.values()) == {"outside-backbone"}
    assert "the part 'neck' of a file" in str(report)
    with pytest.raises(ValueError, match=r"nothing under prefix='head.'; the file has 'backbone', 'neck', 'roi_head'"):
        build(MASK_RCNN, neck=pretrained | dict(prefix="head")).init_weights()
    with pytest.raises(ValueError, match=r"the weights don't fit the model: 16 missing: lateral_convs.0.conv.weight"):
        build(MASK_RCNN, neck=pretrained | dict(prefix="rpn_head")).init_weights()
    with pytest.raises(
        ValueError,
        match=r"FPN has 0 NAT, .* backbones; expected one.* any other part of a model needs its prefix in the file",
    ):
        build(MASK_RCNN, neck=pretrained | dict(prefix=None)).init_weights()


def test_init_cfg_of_other_models_is_left_to_mmengine(tmp_path):
    """Which lets a file lack tensors, as stock models want it, and knows no options of ours."""
    torch.save({"0.weight": torch.full((2, 1), 3.0), "fc.weight": torch.zeros(3)}, tmp_path / "stock.pth")
    pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "stock.pth"))
    stock = Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 2), init_cfg=pretrained)
    before = stock[1].weight.clone()
    stock.init_weights()
    assert (stock[0].weight == 3).all()
    assert torch.equal(stock[1].weight, before)
    with pytest.raises(ValueError, match="init_cfg of Sequential: entry is for NAT, DiNAT and DiNAT_s"):
        Sequential(torch.nn.Linear(1, 2), init_cfg=pretrained | dict(entry="model")).init_weights()


def test_init_cfg_with_fields_of_another_initializer_says_where_they_come_from():
    """A child config's `init_cfg` is merged with its parent's, here that of the quickstart."""
    fields = dict(type="Xavier", layer="Linear") | dict(type="Pretrained", checkpoint="weights.pth")
    message = r"'Pretrained', ...\) of weights.pth has the fields layer; expected only checkpoint, .*_delete_=True"
    with pytest.raises(ValueError, match=message):
        Sequential(torch.nn.Linear(1, 2), init_cfg=fields).init_weights()
