"""Dataloaders that never end, or disagree with each other or with the model."""

import itertools
import json
import shutil

import pytest
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import BatchSampler

from nat_dense.mm.data_checks import check_data
from tests.mm.small import TRAIN, edit_annotations, message

INFINITE = dict(type="InfiniteSampler", shuffle=True)


def test_a_training_by_epochs_that_never_ends(coco):
    cfg, _ = coco
    cfg.train_dataloader.sampler = INFINITE
    expected = "train_dataloader.sampler is an InfiniteSampler, but train_cfg (EpochBasedTrainLoop) runs until"
    assert expected in message(ValueError, cfg)
    cfg.train_cfg = dict(max_epochs=1)
    assert expected in message(ValueError, cfg)
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=4)
    assert check_data(cfg, TRAIN) == []


@DATA_SAMPLERS.register_module()
class TwoBatches(BatchSampler):
    """Batches of a user's, which end."""

    def __iter__(self):
        return itertools.islice(super().__iter__(), 2)


def test_batches_that_end_where_their_sampler_does_not(coco):
    cfg, _ = coco
    cfg.train_dataloader.update(sampler=INFINITE, batch_sampler=dict(type="TwoBatches", drop_last=False))
    assert check_data(cfg, TRAIN) == []


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_validation_that_never_ends(ade, name):
    cfg, _ = ade
    cfg[f"{name}_dataloader"].sampler = INFINITE
    loop = dict(val="ValLoop", test="TestLoop")[name]
    assert f"{name}_cfg ({loop}) runs until" in message(ValueError, cfg, (f"{name}_dataloader",))


def test_classes_of_the_validation_in_another_order(ade):
    cfg, _ = ade
    classes = ("wall", "building", "sky")
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.num_classes = 3
    for loader, names in ((cfg.train_dataloader, classes), (cfg.val_dataloader, classes[::-1])):
        loader.dataset.metainfo = dict(classes=names, palette=[[0, 0, 0]] * 3)
    text = message(ValueError, cfg)
    assert "in another order (sky, building, wall instead of wall, building, sky)" in text
    cfg.val_dataloader.dataset.metainfo.classes = classes
    assert check_data(cfg, TRAIN) == []


def test_labels_that_the_validation_alone_reduces(ade):
    cfg, _ = ade
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.update(type="BaseSegDataset", metainfo=dict(classes=tuple(map(str, range(150)))))
        loader.dataset.update(img_suffix=".jpg", seg_map_suffix=".png", reduce_zero_label=True)
    for transform in (cfg.train_dataloader.dataset.pipeline[1], cfg.val_dataloader.dataset.pipeline[2]):
        transform.pop("reduce_zero_label", None)
    assert check_data(cfg, TRAIN) == []
    del cfg.val_dataloader.dataset.reduce_zero_label
    (note,) = check_data(cfg, TRAIN)
    assert "reduce_zero_label is True in train_dataloader.dataset and False in val_dataloader.dataset" in note


def test_images_that_are_normalised_twice(coco):
    cfg, _ = coco
    cfg.val_dataloader.dataset.pipeline.insert(1, dict(type="Normalize", mean=[0.0], std=[1.0]))
    (note,) = check_data(cfg, TRAIN)
    assert "val_dataloader.dataset: its pipeline has Normalize" in note
    cfg.model.data_preprocessor.mean = cfg.model.data_preprocessor.std = None
    assert check_data(cfg, TRAIN) == []


def test_padding_that_is_a_class(ade):
    cfg, _ = ade
    cfg.model.data_preprocessor.seg_pad_val = 0
    train = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=[train, train])
    (note,) = check_data(cfg, TRAIN)
    assert "seg_pad_val: a padding value of 0 is a class for the heads (ignore_index 255)" in note
    assert check_data(cfg, ("test_dataloader",)) == []
    cfg.model.decode_head.ignore_index = 0
    assert check_data(cfg, TRAIN) == []


@pytest.mark.parametrize("task", ["coco", "ade"])
def test_folders_that_nobody_reads(request, task):
    cfg, _ = request.getfixturevalue(task)
    cfg.train_dataloader.dataset.data_prefix["image"] = "x/"
    (note,) = check_data(cfg, TRAIN)
    read = dict(coco="img, seg", ade="img_path, seg_map_path")[task]
    assert note == f"nothing reads train_dataloader.dataset.data_prefix.image; the dataset reads {read}."


def test_the_annotation_of_id_0_in_a_validation(coco):
    cfg, root = coco
    file = root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["id"] -= 1
    file.write_text(json.dumps(content))
    edit_annotations(root, lambda content: content["annotations"][0].update(id=0))  # in training it is as any other
    (note,) = check_data(cfg, TRAIN)
    assert "instances_val2017.json' has an annotation with id 0, which COCO's evaluation always counts" in note
    cfg.val_evaluator.ann_file = None  # it then numbers them itself
    assert check_data(cfg, TRAIN) == []
    cfg.val_evaluator.update(ann_file=str(file), format_only=True, outfile_prefix="x")
    assert check_data(cfg, TRAIN) == []


def test_an_evaluator_of_other_images_of_the_same_ids(coco):
    cfg, root = coco
    other = root / "annotations" / "other.json"
    shutil.copy(root / "annotations" / "instances_val2017.json", other)
    cfg.val_evaluator.ann_file = str(other)
    assert check_data(cfg, TRAIN) == []
    other.write_text(other.read_text().replace('"1.jpg"', '"a/1.jpg"'))
    assert check_data(cfg, TRAIN) == []
    other.write_text(other.read_text().replace("a/1.jpg", "7.jpg"))  # as a copy of the images might be called
    (note,) = check_data(cfg, TRAIN)
    assert "id 1 is '7.jpg' there and '1.jpg' here; the metric will be wrong. Ignore" in note
    other.write_text(other.read_text().replace('"width": 96', '"width": 97'))
    assert "id 1 is '7.jpg' there and '1.jpg' here, of another size: the" in message(ValueError, cfg)
