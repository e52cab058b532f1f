"""Transforms are checked before training starts, wherever they stand."""

import re
from importlib.util import find_spec

import pytest
from mmengine.registry import init_default_scope

from nat_dense.mm.data_checks import check_data
from nat_dense.mm.pipelines import check_transforms
from tests.mm.small import TRAIN, message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(type="Resiz"), "train_dataloader.dataset.pipeline[2]{}: there is no transform 'Resiz'. Did you mean"),
        (dict(scal=(9, 9)), "pipeline[2]{}: Resize has no field 'scal'. Did you mean 'scale'?"),
        (dict(type=""), "pipeline[2]{} has no type: expected the transform's name"),
        (dict(type=3), "pipeline[2]{}: type=3: expected the transform's name, or its class"),
    ],
)
@pytest.mark.parametrize(
    ("wrap", "inside"),
    [
        (lambda transform: transform, ""),
        (lambda transform: dict(type="RandomChoice", transforms=[[transform]]), ".transforms[0][0]"),
        (lambda transform: dict(type="TransformBroadcaster", transforms=transform), ".transforms"),
        (lambda transform: dict(type="mmdet.ProposalBroadcaster", transforms=[transform]), ".transforms[0]"),
        (lambda transform: dict(type="AutoAugment", policies=[[transform]]), ".policies[0][0]"),
        (lambda transform: dict(type="RandAugment", aug_space=[[transform]]), ".aug_space[0][0]"),
    ],
    ids=["alone", "choice", "broadcast", "proposals", "policies", "space"],
)
def test_misspelt_transforms(coco, wrap, inside, change, expected):
    cfg, _ = coco
    cfg.train_dataloader.dataset.pipeline[2] = wrap(dict(type="Resize", scale=(9, 9)) | change)
    assert expected.format(inside) in message(ValueError, cfg)


@pytest.mark.parametrize("pipeline", [None, [], [len], [dict(type="AutoAugment")]], ids=str)
def test_pipelines_with_nothing_to_check(coco, pipeline):
    cfg, _ = coco
    cfg.train_dataloader.dataset.pipeline = pipeline
    check_data(cfg, TRAIN)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(time=2), "train_dataloader.dataset: RepeatDataset has no field 'time'. Did you mean 'times'?"),
        (dict(times="2"), "train_dataloader.dataset.times is '2': expected int, without quotes."),
        (dict(type="RepeatDatset"), "train_dataloader.dataset: there is no dataset 'RepeatDatset'. Did you mean"),
    ],
)
def test_misspelt_wrappers(coco, change, expected):
    cfg, _ = coco
    cfg.train_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=cfg.train_dataloader.dataset) | change
    assert expected in message(ValueError, cfg)


def test_a_misspelt_field_of_a_dataset(coco):
    cfg, _ = coco
    cfg.train_dataloader.dataset.serialise_data = True
    assert "CocoDataset has no field 'serialise_data'. Did you mean 'serialize_data'?" in message(ValueError, cfg)


def test_one_transform_where_a_list_of_them_belongs(coco):
    cfg, _ = coco
    cfg.train_dataloader.dataset.pipeline = dict(type="Resize", scale=(9, 9))
    assert "train_dataloader.dataset.pipeline is one transform, {'type': 'Resize'" in message(ValueError, cfg)


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        (["Resize"], "pipeline[0] is 'Resize': expected the config of a transform, or a list of them"),
        ([[None]], "pipeline[0][0] is None: expected"),
        ("Resize", "pipeline is 'Resize': expected"),
        ([dict(type="RandomChoice", transforms=None)], "pipeline[0].transforms is None: expected"),
    ],
)
def test_what_is_no_transform(transforms, expected):
    init_default_scope("mmdet")
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_transforms(transforms, "pipeline")


def test_transforms_inside_are_of_the_scope_of_the_one_outside():
    init_default_scope("mmdet")
    inside = dict(type="AdjustGamma")  # MMSegmentation's
    check_transforms(dict(type="RandomApply", _scope_="mmseg", transforms=[inside]), "pipeline[0]")
    with pytest.raises(ValueError, match=r"there is no transform 'AdjustGamma'\. Did you mean 'mmseg\.AdjustGamma'"):
        check_transforms(dict(type="RandomApply", transforms=[inside]), "pipeline[0]")


def test_pipeline_of_a_wrapper(coco):
    cfg, _ = coco
    part = cfg.train_dataloader.dataset
    mixed = dict(type="MultiImageMixDataset", dataset=part, pipeline=[dict(type="Mosaicc")])
    cfg.train_dataloader.dataset = mixed
    assert "train_dataloader.dataset.pipeline[0]: there is no transform 'Mosaicc'. Did" in message(ValueError, cfg)


def test_transforms_of_another_library(coco):
    """Their names are not those of the registry, and the library must be there."""
    cfg, _ = coco
    flip = dict(type="HorizontalFlip", p=0.5)
    cfg.train_dataloader.dataset.pipeline[2] = dict(type="Albu", transforms=[flip])
    if find_spec("albumentations"):
        check_data(cfg, TRAIN)
    else:
        assert "pipeline[2]: RuntimeError: albumentations is not installed" in message(ValueError, cfg)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (dict(type="RandomResize", scale=(9, 9), keep_ration=True), "got an unexpected keyword argument 'keep_ration'"),
        (dict(type="RandomChoice", transforms=[[], []], prob=[0.1, 0.2, 0.7]), "pipeline[0]: AssertionError"),
        (dict(type="MultiBranch", branch_field=["a"], a=dict(type="Resiz")), "pipeline[0]: KeyError: Resiz is not in"),
        (dict(type="RandomFlip", prob=1.5), "pipeline[0]: AssertionError"),
        (dict(type="RandomApply", transforms=[dict(type="RandomFlip", prob=2)]), "pipeline[0].transforms[0]: probs"),
        (dict(type="Resize"), "pipeline[0]: AssertionError: `scale` and"),
    ],
    ids=lambda value: value.get("type") if isinstance(value, dict) else "",
)
def test_fields_that_the_constructor_does_not_take(transform, expected):
    init_default_scope("mmdet")
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_transforms([transform], "pipeline")
