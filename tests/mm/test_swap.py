"""The backbone swap on shipped configs: models are built on the meta device, so nothing is downloaded or computed."""

import copy
import random
import time

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from nat_dense.mm.config import load_config
from nat_dense.mm.meta import build_on_meta
from nat_dense.mm.swap import SwapRefusedError, plan_swap, swap_backbone
from nat_dense.mm.swap.changes import ABSENT, Change, as_text, changes_between, differences
from nat_dense.mm.swap.maps import FeatureMap, choose_stages, measure
from nat_dense.mm.swap.plan import BACKBONES

MASK_RCNN = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
PSPNET = "mmseg::pspnet/pspnet_r101-d8_4xb2-40k_cityscapes-512x1024.py"

SAMPLE = [
    "mmdet::atss/atss_r50_fpn_1x_coco.py",
    "mmdet::boxinst/boxinst_r50_fpn_ms-90k_coco.py",
    "mmdet::cascade_rcnn/cascade-mask-rcnn_x101-32x4d_fpn_1x_coco.py",
    "mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py",
    "mmdet::dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
    "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "mmdet::detr/detr_r50_8xb2-150e_coco.py",
    "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py",
    "mmdet::dyhead/atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco.py",
    "mmdet::faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py",
    "mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py",
    "mmdet::htc/htc_r50_fpn_1x_coco.py",
    "mmdet::hrnet/fcos_hrnetv2p-w18-gn-head_4xb4-1x_coco.py",
    "mmdet::libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py",
    "mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py",
    "mmdet::maskformer/maskformer_r50_ms-16xb1-75e_coco.py",
    "mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py",
    "mmdet::point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py",
    "mmdet::pvt/retinanet_pvtv2-b0_fpn_1x_coco.py",
    "mmdet::regnet/mask-rcnn_regnetx-3.2GF_fpn_1x_coco.py",
    "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "mmdet::solov2/solov2_r50_fpn_1x_coco.py",
    "mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py",
    "mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py",
    "mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py",
    "mmdet::yolox/yolox_tiny_8xb8-300e_coco.py",
    "mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py",
    "mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py",
    "mmseg::fastfcn/fastfcn_r50-d32_jpu_enc_4xb2-80k_cityscapes-512x1024.py",
    "mmseg::knet/knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512.py",
    "mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py",
    "mmseg::mobilenet_v2/mobilenet-v2-d8_deeplabv3plus_4xb2-80k_cityscapes-512x1024.py",
    "mmseg::ocrnet/ocrnet_hr18_4xb2-40k_cityscapes-512x1024.py",
    "mmseg::point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py",
    "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py",
    "mmseg::segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py",
    "mmseg::sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024.py",
    "mmseg::setr/setr_vit-l_pup_8xb1-80k_cityscapes-768x768.py",
    "mmseg::vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py",
]
"""40 configs, of as many families and ways to read a backbone."""


def widths(cfg: Config) -> list[int]:
    """The channels of the maps that the config's backbone returns."""
    return [m.channels for m in measure(cfg.model.backbone, cfg.default_scope)]


@pytest.mark.parametrize("name", SAMPLE)
def test_swapped_sample_builds_and_input_is_unchanged(name):
    backbone = random.Random(name).choice(sorted(set(BACKBONES) - {"nat-nano", "dinat-nano", "dinat_s-nano"}))
    cfg = load_config(name)
    before = copy.deepcopy(cfg._cfg_dict)
    swapped = swap_backbone(cfg, backbone)
    assert cfg._cfg_dict == before
    model = build_on_meta(swapped.model, swapped.default_scope)
    assert type(model.backbone).__name__ == BACKBONES[backbone][0]
    assert model.backbone.arch == BACKBONES[backbone][1]
    neck = swapped.model.get("neck")
    neck = neck[0] if isinstance(neck, list) else neck
    if neck and isinstance(neck.get("in_channels"), list):
        assert sorted(neck.in_channels) == widths(swapped)


def test_mask_rcnn_changes_only_what_the_backbone_decides():
    swap = plan_swap(load_config(MASK_RCNN), "nat-tiny")
    assert [change.path for change in swap.changes] == [
        "model.backbone",
        "model.neck.in_channels",
        "optim_wrapper.paramwise_cfg",
        "custom_imports",
    ]
    assert swap.cfg.model.backbone.to_dict() == dict(
        type="NAT",
        arch="tiny",
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_tiny.pth"),
    )
    assert swap.cfg.model.neck.in_channels == [64, 128, 256, 512]
    assert swap.notes == ["the config trains with SGD; nat-tiny was published with AdamW (--optimizer adamw)."]


def test_dilated_segmentor_reads_two_stages_and_is_told_of_the_strides():
    swap = plan_swap(load_config(PSPNET), "dinat-small")
    model = swap.cfg.model
    assert model.pretrained is None
    assert (model.backbone.out_indices, model.backbone.dilations) == ((2, 3), "segmentation")
    assert (model.decode_head.in_channels, model.decode_head.in_index) == (768, 1)
    assert (model.auxiliary_head.in_channels, model.auxiliary_head.in_index) == (384, 0)
    assert swap.notes[:2] == [
        "map 2 of the old backbone had stride 8; stage 2, with stride 16, replaces it: what reads it gets coarser "
        "features.",
        "map 3 of the old backbone had stride 8; stage 3, with stride 32, replaces it: what reads it gets coarser "
        "features.",
    ]


def test_levels_that_a_neck_skips_are_not_computed():
    cfg = load_config("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py")
    model = swap_backbone(cfg, "nat-mini").model
    assert model.backbone.out_indices == (1, 2, 3)
    assert (model.neck.in_channels, model.neck.start_level, model.neck.num_outs) == ([128, 256, 512], 0, 5)


def test_c4_model_keeps_its_shared_head_behind_a_projection():
    swap = plan_swap(load_config("mmdet::faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py"), "nat-tiny")
    assert swap.cfg.model.backbone.out_indices == (2,)
    assert swap.cfg.model.neck.to_dict() == dict(
        type="ChannelMapper", in_channels=[256], out_channels=1024, kernel_size=1
    )
    assert swap.cfg.model.rpn_head.in_channels == 1024
    assert any("shared_head" in note for note in swap.notes)
    assert swap.cfg.find_unused_parameters is True
    assert any(note.startswith("nothing reads the backbone after stage 2") for note in swap.notes)


def test_dilated_c5_detector_gets_the_stage_of_its_stride():
    cfg = load_config("mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py")
    model = swap_backbone(cfg, "nat-tiny").model
    assert model.backbone.out_indices == (2,)
    assert model.rpn_head.in_channels == model.roi_head.bbox_head.in_channels == 256
    assert model.roi_head.bbox_roi_extractor.out_channels == 256
    assert model.rpn_head.anchor_generator.strides == [16]


def test_maps_that_a_neck_passes_through_get_the_new_widths():
    cfg = load_config("mmseg::fastfcn/fastfcn_r50-d32_jpu_enc_4xb2-80k_cityscapes-512x1024.py")
    cfg.model.decode_head.add_lateral = True
    assert cfg.model.decode_head.in_channels == [512, 1024, 2048]
    model = swap_backbone(cfg, "nat-tiny").model
    assert model.neck.in_channels == (128, 256, 512)
    assert model.decode_head.in_channels == [128, 256, 2048]
    assert (model.auxiliary_head.in_channels, model.auxiliary_head.in_index) == (256, 1)


def test_maps_that_an_encoding_head_ignores_are_not_computed():
    cfg = load_config("mmseg::encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py")
    assert (cfg.model.decode_head.in_channels, cfg.model.decode_head.in_index) == ([512, 1024, 2048], (1, 2, 3))
    model = swap_backbone(cfg, "nat-tiny").model
    assert model.backbone.out_indices == (2, 3)
    assert (model.decode_head.in_channels, model.decode_head.in_index) == ([512], (1,))


def test_normalisation_follows_the_published_weights():
    cfg = load_config("mmdet::faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco.py")
    assert cfg.model.data_preprocessor.std == [1.0, 1.0, 1.0]
    preprocessor = swap_backbone(cfg, "nat-tiny").model.data_preprocessor
    assert preprocessor["mean"] == [123.675, 116.28, 103.53]
    assert preprocessor["std"] == [58.395, 57.12, 57.375]
    assert preprocessor["bgr_to_rgb"] is True


def test_unpublished_and_random_backbones_have_no_weights():
    assert "init_cfg" not in swap_backbone(load_config(MASK_RCNN), "nat-nano").model.backbone
    scratch = load_config(MASK_RCNN, {"model.backbone.init_cfg": None})
    backbone = swap_backbone(scratch, "nat-tiny").model.backbone
    assert "init_cfg" not in backbone
    assert "frozen_stages" not in backbone


def test_a_random_backbone_that_learns_slowly_is_told():
    slowly = "trains the backbone at 0.1 of the learning rate"
    cfg = load_config("mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py")
    assert any(slowly in note for note in plan_swap(cfg, "nat-nano").notes)
    assert not any(slowly in note for note in plan_swap(cfg, "nat-tiny").notes)


def test_weights_of_the_whole_old_model_are_dropped():
    cfg = load_config("mmdet::cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py")
    assert cfg.load_from
    swap = plan_swap(cfg, "nat-tiny")
    assert swap.cfg.load_from is None
    assert any(note.startswith("load_from=") for note in swap.notes)


@pytest.mark.parametrize(
    ("name", "backbone", "lr_mult"),
    [
        (MASK_RCNN, "dinat-mini", 1.0),
        ("mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py", "dinat_s-tiny", 0.1),
        ("mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py", "nat-mini", 1.0),
    ],
)
def test_biases_and_norms_of_the_backbone_do_not_decay(name, backbone, lr_mult):
    cfg = swap_backbone(load_config(name), backbone)
    cfg.model.backbone.frozen_stages = -1
    init_default_scope(cfg.default_scope)
    model = build_on_meta(cfg.model, cfg.default_scope)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    group_of = {id(group["params"][0]): group for group in optimizer.param_groups}
    for prefix, module in model.backbone.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            group = group_of[id(parameter)]
            undecayed = isinstance(module, torch.nn.LayerNorm) or name == "rpb"
            assert (group["weight_decay"] == 0) == undecayed, f"{prefix}.{name}"
            assert group["lr"] == pytest.approx(lr_mult * cfg.optim_wrapper.optimizer.lr), f"{prefix}.{name}"


def test_decay_of_everything_else_stays():
    cfg = load_config("mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py")
    init_default_scope(cfg.default_scope)
    settings = []
    for each in (cfg, swap_backbone(cfg, "nat-mini")):
        model = build_on_meta(each.model, each.default_scope)
        optimizer = build_optim_wrapper(model, each.optim_wrapper).optimizer
        group_of = {id(group["params"][0]): group for group in optimizer.param_groups}
        heads = [(name, p) for name, p in model.named_parameters() if not name.startswith("backbone.")]
        settings.append({name: (group_of[id(p)]["lr"], group_of[id(p)]["weight_decay"]) for name, p in heads})
    assert settings[0] == settings[1]


def test_layerwise_learning_rates_are_dropped_with_a_note():
    swap = plan_swap(load_config("mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py"), "nat-tiny")
    assert swap.cfg.optim_wrapper.constructor == "DefaultOptimWrapperConstructor"
    assert set(swap.cfg.optim_wrapper.paramwise_cfg) == {"custom_keys"}
    assert any("LayerDecayOptimizerConstructor" in note for note in swap.notes)


def test_adamw_has_the_published_settings_and_scales_the_schedules_lower_bound():
    cfg = load_config(PSPNET)
    assert cfg.optim_wrapper.optimizer.lr == 0.01
    assert cfg.param_scheduler[0].eta_min == 1e-4
    swap = plan_swap(cfg, "nat-tiny", "adamw")
    assert swap.cfg.optim_wrapper.optimizer == dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)
    assert swap.cfg.param_scheduler[0].eta_min == pytest.approx(6e-7)
    assert not any("SGD" in note for note in swap.notes)
    detector = swap_backbone(load_config(MASK_RCNN), "nat-tiny", "adamw")
    assert detector.optim_wrapper.optimizer == dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mmdet::ssd/ssd300_coco.py", "SSD's extra layers continue its stages"),
        ("mmdet::detectors/detectors_cascade-rcnn_r50_1x_coco.py", "feeds back into a backbone"),
        ("mmdet::cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py", "the same resolution several times"),
        ("mmdet::tridentnet/tridentnet_r50-caffe_1x_coco.py", "three branches"),
        ("mmdet::qdtrack/qdtrack_faster-rcnn_r50_fpn_4e_base.py", "wraps a trained detector in a tracker"),
        ("mmdet::rtmdet/rtmdet_x_p6_4xb8-300e_coco.py", r"strides \[8, 16, 32, 64\]"),
        ("mmdet::common/ms_3x_coco.py", "has no model"),
        ("mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py", "encoder and decoder in one"),
        ("mmseg::dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py", "token sequences"),
        ("mmseg::mobilenet_v3/mobilenet-v3-d8_lraspp_4xb4-320k_cityscapes-512x1024.py", "windows of 49 x 49"),
        ("mmseg::setr/setr_vit-l-mla_8xb1-160k_ade20k-512x512.py", "maps of one resolution"),
    ],
)
def test_refusals_say_why(name, reason):
    with pytest.raises(SwapRefusedError, match=reason):
        plan_swap(load_config(name), "nat-tiny")


def test_wrong_widths_in_the_original_are_refused():
    cfg = load_config(MASK_RCNN, {"model.neck.in_channels": [1, 2, 3, 4]})
    with pytest.raises(SwapRefusedError, match=r"model\.neck\.in_channels is \[1, 2, 3, 4\].*256, 512, 1024, 2048"):
        plan_swap(cfg, "nat-tiny")


def test_pictures_of_other_than_three_channels_are_refused():
    cfg = load_config(MASK_RCNN, {"model.backbone.in_channels": 6})
    with pytest.raises(SwapRefusedError, match="takes 6 channels"):
        plan_swap(cfg, "nat-tiny")


def test_unknown_names_are_refused_with_the_known_ones():
    cfg = load_config(MASK_RCNN)
    with pytest.raises(ValueError, match=r"no backbone 'nat-tinny'\. Did you mean 'nat-tiny'\?"):
        plan_swap(cfg, "nat-tinny")
    with pytest.raises(ValueError, match="optimizer 'sgd': expected 'adamw'"):
        plan_swap(cfg, "nat-tiny", "sgd")


def test_a_swap_takes_less_than_a_second_of_one_core():
    cfg = load_config(MASK_RCNN)
    swap_backbone(cfg, "nat-tiny")  # the first one imports the library
    start = time.process_time()
    swap_backbone(cfg, "nat-tiny")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("strides", "segments", "stages"),
    [
        ([4, 8, 16, 32], False, [0, 1, 2, 3]),
        ([8, 16, 32], False, [1, 2, 3]),
        ([16], False, [2]),
        ([4, 8, 8, 8], True, [0, 1, 2, 3]),
        ([16, 16, 16, 16], True, [0, 1, 2, 3]),
        ([8, 16, 32], True, [1, 2, 3]),
        ([2, 4, 8], True, [0, 1, 3]),
        ([16], True, [3]),
    ],
)
def test_stages_by_stride(strides, segments, stages):
    assert choose_stages([FeatureMap(8, stride) for stride in strides], segments) == stages


def test_a_deformable_backbone_is_measured_although_its_operator_knows_no_meta_tensors():
    cfg = load_config("mmdet::dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py")
    maps = measure(cfg.model.backbone, "mmdet")
    assert maps == [FeatureMap(256, 4), FeatureMap(512, 8), FeatureMap(1024, 16), FeatureMap(2048, 32)]


def test_a_backbone_with_mmcvs_synchronised_norm_is_measured_without_a_process_group():
    cfg = load_config(MASK_RCNN, {"model.backbone.norm_cfg.type": "MMSyncBN"})
    swapped = swap_backbone(cfg, "nat-tiny")
    assert cfg.model.backbone.norm_cfg.type == "MMSyncBN"
    assert swapped.model.neck.in_channels == [64, 128, 256, 512]


def test_changes_and_differences():
    old = dict(a=1, b=dict(type="X", c=2, d=3), e=[dict(f=1), dict(f=2)])
    new = dict(a=1, b=dict(type="X", c=2), e=[dict(f=1), dict(f=4)], g="new")
    assert list(changes_between(old, new)) == [
        Change("b.d", 3, ABSENT),
        Change("e.1.f", 2, 4),
        Change("g", ABSENT, "new"),
    ]
    assert differences(old, new) == dict(b=dict(_delete_=True, type="X", c=2), e=[dict(f=1), dict(f=4)], g="new")
    assert as_text(list(changes_between(old, new))).splitlines() == [
        "b.d",
        "    was 3",
        "    is  (absent)",
        "e.1.f",
        "    was 2",
        "    is  4",
        "g",
        "    was (absent)",
        "    is  new",
    ]
