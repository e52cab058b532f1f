"""Evaluators that would fail, or give a wrong metric, after an epoch are refused before it."""

import json

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, METRICS, init_default_scope

from nat_dense.mm.data_checks import check_data
from nat_dense.mm.evaluator_checks import COCO, IOU
from tests.mm.small import SIZE, TRAIN, message


def test_missing_annotation_file_of_the_evaluator(coco):
    cfg, _ = coco
    cfg.val_evaluator.ann_file = "nowhere.json"
    assert "val_evaluator.ann_file: no file 'nowhere.json'" in message(FileNotFoundError, cfg)


def test_an_evaluator_of_other_images(coco):
    """MMDetection would compare predictions with the wrong pictures, or fail after the first epoch."""
    cfg, root = coco
    file = root / "annotations" / "instances_val2017.json"
    other = root / "annotations" / "other.json"
    content = json.loads(file.read_text())
    other.write_text(json.dumps(content))
    cfg.val_evaluator.ann_file = str(other)
    assert check_data(cfg, ("val_dataloader",)) == [], "the same images in another file"
    for image in content["images"]:
        image["id"] += 1000
    for annotation in content["annotations"]:
        annotation["image_id"] += 1000
    other.write_text(json.dumps(content))
    text = message(ValueError, cfg, ("val_dataloader",))
    assert f"val_evaluator.ann_file={str(other)!r} lacks 2 of the 2 images" in text
    assert str(file) in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(metricc="bbox"), "val_evaluator: CocoMetric has no field 'metricc'. Did you mean 'metric'?"),
        (dict(type="CocoMetrics"), "val_evaluator: there is no metric 'CocoMetrics'. Did you mean 'CocoMetric'?"),
        (dict(format_only=True), "val_evaluator.format_only: set val_evaluator.outfile_prefix too"),
        (dict(metric=["bbox", "sgm"]), "val_evaluator.metric: there is no metric 'sgm'. Did you mean 'segm'?"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda node: node, lambda node: [node], lambda node: dict(metrics=[node])])
def test_misspelt_evaluators(coco, wrap, change, expected):
    cfg, _ = coco
    cfg.val_evaluator = wrap(dict(cfg.val_evaluator) | change)
    assert expected in message(ValueError, cfg)


def test_a_metric_of_segmentors_that_there_is_not(ade):
    cfg, _ = ade
    cfg.val_evaluator.iou_metrics = ["mIoU", "mIou"]
    assert "val_evaluator.iou_metrics: there is no metric 'mIou'. Did you mean 'mIoU'?" in message(ValueError, cfg)


@pytest.mark.parametrize(
    ("best", "fits"),
    [
        ("auto", True),
        ("coco/segm_mAP_50", True),
        (["coco/bbox_mAP", "coco/segm_mAP"], True),
        ("bbox_mAP", False),
        (["coco/bbox_mAP", "coco/segm_map"], False),
    ],
)
def test_what_chooses_the_best_checkpoint(coco, best, fits):
    cfg, _ = coco
    cfg.default_hooks.checkpoint.save_best = best
    if fits:
        check_data(cfg, TRAIN)
    else:
        assert "save_best: validation gives no" in message(ValueError, cfg)


@METRICS.register_module()
class OwnCocoMetric(CocoMetric):
    """May compute anything."""


@pytest.mark.parametrize(
    "change",
    [
        {"val_evaluator.classwise": True},
        {"val_evaluator.metric": ["bbox", "proposal"]},
        {"val_evaluator.type": "mmengine.OwnCocoMetric"},
        {"val_evaluator.format_only": True, "val_evaluator.outfile_prefix": "x"},
        {"val_cfg.type": "TeacherStudentValLoop"},
        {"default_hooks.checkpoint.save_best": "mine/bbox_mAP", "val_evaluator.prefix": "mine"},
    ],
    ids=["classes", "proposals", "subclass", "format", "loop", "prefix"],
)
def test_scores_that_are_not_known(coco, change):
    cfg, _ = coco
    cfg.default_hooks.checkpoint.save_best = "some/score"
    assert "save_best: validation gives no 'some/score'" in message(ValueError, cfg)
    cfg.merge_from_dict(change)
    check_data(cfg, TRAIN)


def test_scores_of_several_evaluators(coco):
    cfg, _ = coco
    cfg.default_hooks.checkpoint.save_best = "own/score"
    known = dict(cfg.val_evaluator)
    cfg.val_evaluator = [known, dict(known, type="mmengine.OwnCocoMetric")]
    check_data(cfg, TRAIN)
    cfg.val_evaluator = [known, dict(known, prefix="own")]
    assert "It gives: coco/bbox_mAP" in message(ValueError, cfg)
    cfg.val_evaluator = dict(type="MultiDatasetsEvaluator", metrics=[known], dataset_prefixes=["A"])
    check_data(cfg, TRAIN)


@pytest.mark.parametrize("kind", ["CocoMetric", "FasterCocoMetric"])
def test_the_scores_of_detectors_are_those_that_a_real_evaluation_gives(coco, kind):
    cfg, _ = coco
    chosen = ["bbox", "segm"]
    evaluator = METRICS.build(dict(cfg.val_evaluator) | dict(type=kind, metric=chosen))
    evaluator.dataset_meta = dict(classes=CocoDataset.METAINFO["classes"])
    mask = torch.zeros(1, SIZE[1], SIZE[0], dtype=torch.bool)
    box = dict(bboxes=torch.tensor([[16.0, 8.0, 64.0, 40.0]]), scores=torch.ones(1), labels=torch.tensor([0]))
    evaluator.process({}, [dict(img_id=0, ori_shape=SIZE[::-1], pred_instances=box | dict(masks=mask))])
    assert [f"coco/{score}" for name in chosen for score in COCO.scores[name]] == list(evaluator.evaluate(1))


@pytest.mark.parametrize("chosen", IOU.scores)
def test_the_scores_of_segmentors_are_those_that_a_real_evaluation_gives(chosen):
    init_default_scope("mmseg")
    evaluator = METRICS.build(dict(type="IoUMetric", iou_metrics=[chosen]))
    evaluator.dataset_meta = dict(classes=("date", "fig"))
    labels = dict(data=torch.tensor([[[0, 1]]]))
    evaluator.process({}, [dict(pred_sem_seg=labels, gt_sem_seg=labels)])
    assert set(IOU.scores[chosen]) == set(evaluator.evaluate(1))


@HOOKS.register_module()
class AddsAScore(Hook):
    """A hook of a user's."""

    def after_val_epoch(self, runner, metrics=None):
        metrics["mean"] = 0.5


def test_scores_that_a_hook_adds(coco):
    cfg, _ = coco
    cfg.custom_hooks = [dict(type="AddsAScore"), dict(type="EarlyStoppingHook", monitor="mean", rule="greater")]
    cfg.default_hooks.checkpoint.save_best = "mean"
    assert check_data(cfg, TRAIN) == []


def test_images_beside_those_that_are_taken(coco):
    cfg, root = coco
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:1]
    (root / "one.json").write_text(json.dumps(content))
    cfg.val_evaluator.ann_file = str(root / "one.json")
    assert "lacks 1 of the 2 images" in message(ValueError, cfg)
    cfg.val_dataloader.dataset.indices = 1
    assert check_data(cfg, TRAIN) == []


def test_what_stops_a_training_early(coco):
    cfg, _ = coco
    cfg.custom_hooks = [dict(type="EarlyStoppingHook", monitor="coco/bbox_mAP")]
    check_data(cfg, TRAIN)
    cfg.custom_hooks[0]["monitor"] = "coco/bbox_map"
    text = message(ValueError, cfg)
    assert "custom_hooks.0.monitor: validation gives no 'coco/bbox_map'. Did you mean 'coco/bbox_mAP'?" in text
