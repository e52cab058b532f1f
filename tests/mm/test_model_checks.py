"""A wrong model is refused before anything is written, in one sentence."""

import copy
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from nat_dense.mm import model_checks
from nat_dense.mm.config import load_config
from nat_dense.mm.flops import count_config
from nat_dense.mm.machine import fit_to_machine
from nat_dense.mm.model_checks import check_last_batch, check_model, fetch_initial_weights
from nat_dense.models import NAT
from tests.mm.small import DETECTOR, NANO, SEGMENTOR, ade_options, parse_options, write_ade


def detector(*options: str):
    init_default_scope("mmdet")
    return load_config(DETECTOR, parse_options([*NANO, "model.neck.in_channels=[32,64,128,256]", *options]))


def segmentor(*options: str):
    init_default_scope("mmseg")
    heads = ["model.decode_head.in_channels=[32,64,128,256]", "model.auxiliary_head.in_channels=128"]
    return load_config(SEGMENTOR, parse_options([*NANO, *heads, *options]))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.data_preprocessor.std=[1,0,1]", "model.data_preprocessor.std has a 0"),
        ("model.data_preprocessor.mean=[a,b,c]", "model.data_preprocessor.mean is ['a', 'b', 'c']: expected a number"),
        ("model.backbone.arch=tinny", "arch='tinny'"),
        ("model.backbone.depths=[1,1,1]", "depths=(1, 1, 1)"),
        ("model.backbone.num_heads=[3,2,4,8]", "dim=32 is not divisible by num_heads=3"),
        ("model.backbone.dilations=[[1],[1],[1],[1]]", "dilations has [1, 1, 1, 1] numbers a stage"),
        ("model.backbone.kernel_size=6", "kernel_size=6: expected an odd number"),
        ("model.backbone.frozen_stages=5", "frozen_stages=5"),
        ("model.backbone.frozen_stage=1", "has no field 'frozen_stage'. Did you mean 'frozen_stages'?"),
        ("model.backbone.drop_path_rate=1.5", "drop_path_rate=1.5"),
        ("model.backbone.in_chans=4", "expected [batch, 4, height, width]"),
        ("model.neck.in_channels=[64,128,256,512]", "model.neck.in_channels is [64, 128, 256, 512]"),
        ("model.backbone.out_indices=(1,2,3)", "maps have [64, 128, 256] channels"),
    ],
)
def test_wrong_fields(option, expected):
    with pytest.raises(ValueError, match=r".") as raised:
        check_model(detector(option))
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.type=MaskRCN", "model: there is no model 'MaskRCN'. Did you mean 'MaskRCNN'?"),
        ("model.backbone.type=NATT", "model.backbone: there is no model 'NATT'. Did you mean 'NAT'?"),
        ("model.backbone.type=mmdet.NAT", "model.backbone: there is no model 'mmdet.NAT'. Did you mean 'NAT'?"),
        ("model.neck.type=mmseg.UPerHea", "model.neck: there is no model 'mmseg.UPerHea'."),
        ("model.neck.norm_cfg.type=BNN", "model.neck.norm_cfg: there is no model 'BNN'. Did you mean 'BN'?"),
        ("model.roi_head.bbox_head.loss_cls.type=Cross", "model.roi_head.bbox_head.loss_cls: there is no model"),
        ("model.rpn_head.anchor_generator.type=AnchorGen", "model.rpn_head.anchor_generator: there is no task util"),
        ("model.train_cfg.rpn.assigner.type=MaxIoU", "model.train_cfg.rpn.assigner: there is no task util 'MaxIoU'"),
        ("model.roi_head.bbox_head.foo=1", "model.roi_head.bbox_head: Shared2FCBBoxHead has no field 'foo'."),
        ("model.neck.num_outs=1", "model: AssertionError: assert num_outs >="),
    ],
)
def test_a_part_that_can_not_be_built_is_named(option, expected):
    cfg = detector(option)
    for build in (check_model, lambda cfg: count_config(cfg, 64, 64)):
        with pytest.raises(ValueError, match=re.escape(expected)):
            build(cfg)


def test_of_a_layers_fields_the_unexpected_one_is_named():
    cfg = detector()
    cfg.model.neck.norm_cfg = dict(type="BN", requires_grad=True, foo=1)
    with pytest.raises(ValueError, match=r"^model.neck.norm_cfg: BatchNorm2d has no field 'foo'\."):
        check_model(cfg)


@pytest.mark.parametrize(
    "config",
    [
        "fpg/faster-rcnn_r50_fpg_crop640-50e_coco.py",
        "cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py",
        "ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py",
    ],
)
def test_parts_with_types_of_other_kinds_are_not_blamed(config):
    init_default_scope("mmdet")
    with pytest.raises(ValueError, match="invalid depth 7"):
        check_model(load_config(f"mmdet::{config}", {"model.backbone.depth": 7, "model.backbone.init_cfg": None}))


def test_head_that_does_not_fit_its_map():
    with pytest.raises(ValueError, match=r"auxiliary_head.in_channels is 256"):
        check_model(segmentor("model.auxiliary_head.in_channels=256"))
    with pytest.raises(ValueError, match=r"auxiliary_head.in_index is 4"):
        check_model(segmentor("model.auxiliary_head.in_index=4"))


def test_a_head_that_reads_all_maps_as_one():
    fcn = dict(type="FCNHead", in_channels=[32, 64, 128, 256], in_index=[0, 1, 2, 3], input_transform="resize_concat")
    cfg = segmentor()
    cfg.model.decode_head = dict(fcn, channels=480, num_convs=1, kernel_size=1, concat_input=False, num_classes=150)
    check_model(cfg)
    cfg.model.decode_head.in_channels[0] = 64
    with pytest.raises(ValueError, match=r"decode_head.in_channels is 512, but .* 480 channels"):
        check_model(cfg)


def test_missing_initial_weights():
    cfg = detector()
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint="nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"model.backbone.init_cfg.checkpoint: no file 'nowhere.pth'"):
        check_model(cfg)


@pytest.mark.parametrize("source", ["nat-tinyy", "torchvision://resnet50"])
@pytest.mark.parametrize("field", ["backbone.init_cfg", "pretrained"])
def test_initial_weights_that_can_not_be_read_here(monkeypatch, field, source):
    monkeypatch.setattr(model_checks.importlib.util, "find_spec", lambda name: None)
    cfg = segmentor()
    if field == "pretrained":
        cfg.model.pretrained = source
    else:
        cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=source)
    expected = "Did you mean 'nat-tiny'?" if source == "nat-tinyy" else "torchvision, which is not installed"
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(expected)) as raised:
        check_model(cfg)
    assert f"model.{field}=None trains from scratch" in str(raised.value)


def test_initial_weights_of_a_server_that_is_not_there():
    cfg = detector()
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint="http://127.0.0.1:9/nat.pth")
    model, _ = check_model(cfg)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1.*init_cfg=None trains from scratch"):
        fetch_initial_weights(model)


def test_the_config_is_left_as_it_was(tmp_path):
    """MMSegmentation's models write into what they are built from, and the Runner builds from the same."""
    init_default_scope("mmseg")
    file = tmp_path / "weights.pth"
    torch.save({}, file)
    cfg = load_config("mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py", {"model.pretrained": str(file)})
    before = copy.deepcopy(cfg.model)
    check_model(cfg)
    assert cfg.model == before


def test_a_config_without_a_model(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("epochs = 3\n")
    with pytest.raises(ValueError, match=r"empty\.py has no model"):
        check_model(Config.fromfile(str(file)))


def test_initial_weights_that_are_none_or_do_not_fit(tmp_path):
    file = tmp_path / "weights.pth"
    cfg = detector()
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(file))
    file.write_text("not found")
    with pytest.raises(ValueError, match=str(file)):
        check_model(cfg)
    torch.save(NAT(arch="tiny").state_dict(), file)
    with pytest.raises(ValueError, match="the weights don't fit the model"):
        check_model(cfg)
    torch.save(NAT(arch="nano").state_dict(), file)
    before = torch.get_rng_state()
    check_model(cfg)
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_weights_by_published_name():
    """Nothing is fetched by the check."""
    cfg = detector()
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint="nat-tiny")
    assert check_model(cfg)[0].backbone.init_cfg["checkpoint"] == "nat-tiny"


def test_initial_weights_from_a_folder(tmp_path):
    cfg = detector()
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path))
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(tmp_path))):
        check_model(cfg)
    torch.save(NAT(arch="mini").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="the weights don't fit the model"):
        check_model(cfg)
    torch.save(NAT(arch="nano").state_dict(), tmp_path / "pytorch_model.bin")
    check_model(cfg)


def test_batch_norm_with_one_image():
    cfg = segmentor("train_dataloader.batch_size=1")
    fit_to_machine(cfg)  # SyncBN of several processes could have more than one image
    with pytest.raises(ValueError, match=r"batch_size is 1, but decode_head.psp_modules.0 applies batch norm"):
        check_model(cfg)
    group_norm = dict(type="GN", num_groups=4)
    cfg.model.decode_head.norm_cfg = cfg.model.auxiliary_head.norm_cfg = group_norm
    check_model(cfg)


@pytest.mark.parametrize(
    ("images", "batch_size", "processes", "fits"),
    [(5, 2, 1, False), (4, 2, 1, True), (5, 2, 2, False), (7, 2, 2, True)],
)
def test_batch_norm_with_one_image_left_over(tmp_path, monkeypatch, images, batch_size, processes, fits):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("SLURM_NTASKS", "7")  # an allocation in which torchrun runs
    cfg = segmentor(*ade_options(write_ade(tmp_path / "ade", train=images)))
    cfg.train_dataloader.update(batch_size=batch_size, sampler=dict(type="DefaultSampler", shuffle=True))
    fit_to_machine(cfg)
    cfg.launcher = "pytorch"
    model, _ = check_model(cfg)
    if not fits:
        with pytest.raises(ValueError, match=f"the last of {images} images .* Set train_dataloader.drop_last=True"):
            check_last_batch(cfg, model)
        cfg.train_dataloader.drop_last = True
    check_last_batch(cfg, model)


def test_frozen_stages_of_random_weights_are_told():
    (note,) = check_model(detector("model.backbone.frozen_stages=1"))[1]
    assert note.startswith("model.backbone.frozen_stages is 1, but no pretrained weights are configured")
    assert check_model(detector("model.backbone.frozen_stages=1"), training=False)[1] == []
    assert check_model(detector("model.backbone.frozen_stages=1", "load_from=x.pth"))[1] == []


def test_batches_of_one_image_where_no_size_is_given(tmp_path):
    cfg = segmentor(*ade_options(write_ade(tmp_path / "ade")))
    del cfg.train_dataloader.batch_size
    cfg.train_dataloader.sampler = dict(type="DefaultSampler", shuffle=True)
    fit_to_machine(cfg)
    with pytest.raises(ValueError, match="batch_size is 1, but"):
        check_model(cfg)
    cfg.model.decode_head.norm_cfg = cfg.model.auxiliary_head.norm_cfg = dict(type="GN", num_groups=4)
    check_last_batch(cfg, check_model(cfg)[0])


def test_four_channels_without_a_mean():
    cfg = detector("model.backbone.in_chans=4")
    cfg.model.data_preprocessor.mean = cfg.model.data_preprocessor.std = None
    check_model(cfg)
    count_config(cfg, 64, 64)


def test_torch_fails_late_on_batch_norm_with_one_image():
    """Why it is refused: nothing but the first training step would tell."""
    model, _ = check_model(segmentor())
    maps = tuple(torch.rand(1, 32 * 2**i, 16 >> i, 16 >> i) for i in range(4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model.decode_head.train()(maps)


@pytest.mark.parametrize(
    ("dilations", "warns"),
    [("detection", False), ("segmentation", True), ("segmentation-640", True), ("classification", True), (None, True)],
)
def test_dilations_of_another_task_warn(dilations, warns):
    cfg = detector("model.backbone.type=DiNAT")
    cfg.model.backbone.dilations = dilations
    _, warnings = check_model(cfg)
    assert len(warnings) == warns
    assert all(repr(dilations or "classification") in warning for warning in warnings)


def test_dilations_of_a_segmentor():
    assert check_model(segmentor("model.backbone.type=DiNAT", "model.backbone.dilations=segmentation"))[1] == []
    assert len(check_model(segmentor("model.backbone.type=DiNAT", "model.backbone.dilations=detection"))[1]) == 1


def test_checking_does_not_change_the_random_state():
    cfg = detector()
    torch.manual_seed(0)
    check_model(cfg)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("family", ["NAT", "DiNAT", "DiNAT_s"])
def test_biases_and_norms_do_not_decay_and_nothing_is_left_out(family):
    cfg = detector(
        f"model.backbone.type={family}", *(["model.backbone.dilations=detection"] if family != "NAT" else [])
    )
    fit_to_machine(cfg)
    model, _ = check_model(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decay) == set(names.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    without = {name for name, value in decay.items() if value == 0}
    assert without == {name for name in decay if name.endswith(".rpb") or "norm" in name}
    assert {value for name, value in decay.items() if name not in without} == {0.05}
    depth = sum((2, 2, 4, 2))
    assert sum(name.endswith(".rpb") for name in without) == depth
    # Two norms a block, each with weight and bias, are the least there must be.
    assert len(without) > depth + 4 * depth
