"""What nothing declares is compared with what a model's classes ask for."""

import pytest
from mmdet.models.dense_heads import RetinaHead
from mmengine.registry import MODELS, init_default_scope

from nat_dense.mm.build_errors import parts_of
from nat_dense.mm.config import load_config
from nat_dense.mm.free_fields import check_free_fields
from nat_dense.mm.model_checks import check_model
from tests.mm.small import DETECTOR, NANO, SEGMENTOR, parse_options

RETINA = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
MASK2FORMER = "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py"
DEFORMABLE = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"
READ_DEEPER = (
    "mmdet::dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py",  # self.train_cfg.dynamic_rcnn.iou_topk
    "mmdet::pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py",  # **self.train_cfg.isr
)
SEMI = "mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py"


def load(config: str, field: str | None = None):
    cfg = load_config(config, {field: 1} if field else {})
    init_default_scope(cfg.default_scope)
    return cfg


def check(config: str, field: str | None = None) -> list[str]:
    cfg = load(config, field)
    return check_free_fields(cfg.model, parts_of(cfg.model))


@pytest.mark.parametrize(
    ("config", "field", "meant"),
    [
        (DETECTOR, "model.train_cfg.rpn_proposl", "rpn_proposal"),
        (DETECTOR, "model.train_cfg.rpn.pos_weigth", "pos_weight"),
        (DETECTOR, "model.train_cfg.rpn_proposal.nms_prre", "nms_pre"),
        (DETECTOR, "model.train_cfg.rcnn.sampler.neg_pos_u", "neg_pos_ub"),  # RandomSampler takes any field
        (DETECTOR, "model.test_cfg.rpn.min_box_size", "min_bbox_size"),
        (DETECTOR, "model.test_cfg.rcnn.mask_thr_binry", "mask_thr_binary"),
        (RETINA, "model.test_cfg.scor_thr", "score_thr"),
        (DEFORMABLE, "model.test_cfg.max_per_im", "max_per_img"),
        (MASK2FORMER, "model.test_cfg.panoptc_on", "panoptic_on"),
        (SEMI, "model.semi_train_cfg.sup_weigth", "sup_weight"),
        (SEMI, "model.detector.test_cfg.rpn.nms_per", "nms_pre"),
        (SEGMENTOR, "model.test_cfg.strid", "stride"),
    ],
)
def test_misspelt_fields(config, field, meant):
    place, _, given = field.rpartition(".")
    with pytest.raises(ValueError, match=f"^{place}: nothing reads a field {given!r}. Did you mean {meant!r}\\?$"):
        check(config, field)


@pytest.mark.parametrize("config", [DETECTOR, SEGMENTOR, RETINA, DEFORMABLE, MASK2FORMER, SEMI, *READ_DEEPER])
def test_configs_as_they_are(config):
    assert check(config) == []


def test_fields_of_fields():
    """RepPoints asks for train_cfg["init"]["assigner"], and for no border."""
    notes = check("mmdet::reppoints/reppoints-moment_r50_fpn_1x_coco.py")
    assert [note.partition(":")[0] for note in notes] == [
        "model.train_cfg.init.allowed_border",
        "model.train_cfg.refine.allowed_border",
    ]


def test_a_field_that_is_like_no_other_is_told():
    place = "model.test_cfg.rcnn.confidence"
    cfg = load_config(DETECTOR, parse_options([*NANO, "model.neck.in_channels=[32,64,128,256]", f"{place}=0.5"]))
    init_default_scope("mmdet")
    _, warnings = check_model(cfg)
    assert warnings == [f"{place}: no class of this model reads a field of this name."]


@MODELS.register_module()
class AsksForMore(RetinaHead):
    """A head of a user's, which asks for a field of its own."""

    def predict_by_feat(self, *args, cfg=None, **kwargs):
        cfg = self.test_cfg if cfg is None else cfg
        self.scores = cfg.get("scores_thr", 0)
        return super().predict_by_feat(*args, cfg=cfg, **kwargs)


def test_fields_of_own_classes():
    cfg = load(RETINA, "model.test_cfg.scores_thr")
    with pytest.raises(ValueError, match="Did you mean 'score_thr'"):
        check_free_fields(cfg.model, parts_of(cfg.model))
    cfg.model.bbox_head.type = "AsksForMore"
    assert check_free_fields(cfg.model, parts_of(cfg.model)) == []
    cfg.model.test_cfg["nms_" + "prr"] = 5  # a word that doesn't stand here; a function elsewhere may read it
    (note,) = check_free_fields(cfg.model, parts_of(cfg.model))
    assert note.startswith(
        f"model.test_cfg.nms_{'prr'}: no class of this model reads a field of this name. Did you mean 'nms_pr"
    )


def test_nms_needs_no_type():
    cfg = load(RETINA)
    cfg.model.test_cfg.nms = dict(iou_threshold=0.5)
    assert check_free_fields(cfg.model, parts_of(cfg.model)) == []
