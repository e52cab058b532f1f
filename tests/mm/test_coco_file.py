"""Bad COCO files are refused before training starts, and boxes that are left out are told of."""

import json

import pytest
from mmdet.datasets import CocoDataset
from mmengine.registry import DATASETS
from PIL import Image

from nat_dense.mm.data_checks import check_data
from tests.mm.small import TRAIN, edit_annotations, message


@pytest.mark.parametrize(
    ("bbox", "area"), [([70, 8, 0.5, 32], 16), ([96, 0, 10, 10], 100), ([-20, 0, 20, 10], 200), ([16, 8, 48, 32], 0)]
)
def test_boxes_that_are_not_trained_with(coco, bbox, area):
    cfg, root = coco
    edit_annotations(root, lambda c: c["annotations"][1].update(bbox=bbox, area=area))
    (notice,) = check_data(cfg, TRAIN)
    assert "train_dataloader.dataset.ann_file: " in notice
    assert (
        f"1 of 4 boxes are left out: smaller than a pixel, with area 0 or outside their image, such as {bbox} (id 2)"
        in notice
    )
    instances = [len(DATASETS.build(cfg.train_dataloader.dataset).get_data_info(i)["instances"]) for i in range(4)]
    assert instances == [1, 0, 1, 1]  # MMDetection says nothing of it
    edit_annotations(root, lambda c: c["annotations"][1].update(ignore=1))
    assert check_data(cfg, TRAIN) == []


def test_a_mark_of_the_byte_order(coco):
    """Which Windows puts before a text, and MMDetection doesn't read."""
    cfg, root = coco
    file = root / "annotations" / "instances_train2017.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert "is not JSON (Unexpected UTF-8 BOM" in message(ValueError, cfg)


@DATASETS.register_module()
class FiltersItself(CocoDataset):
    """A dataset of a user's, with fields of its own."""

    def filter_data(self):
        return self.data_list[: self.filter_cfg["most"]]


def test_filters_of_own_datasets(coco):
    cfg, _ = coco
    train = cfg.train_dataloader.dataset
    train.filter_cfg = dict(most=2, min_size=1000)
    assert "filter_cfg: CocoDataset has no field 'most'" in message(ValueError, cfg)
    train.type = "FiltersItself"
    assert check_data(cfg, TRAIN) == []


def test_no_image_that_filters_leave(coco):
    cfg, _ = coco
    cfg.train_dataloader.dataset.filter_cfg.min_size = 65
    assert "filter_cfg.min_size=65 leaves out smaller images: no image is left" in message(ValueError, cfg)
    cfg.train_dataloader.dataset.filter_cfg.min_size = 64
    assert check_data(cfg, TRAIN) == []
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.metainfo = dict(classes=("dog",))
    cfg.data_checks = dict(other_classes="ignore")
    assert "has no annotations of the config's classes, and filter_cfg.filter_empty_gt" in message(ValueError, cfg)


def test_boxes_as_fractions_of_the_image(coco):
    cfg, root = coco
    edit_annotations(root, lambda c: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in c["annotations"]])
    text = message(ValueError, cfg)
    assert (
        "all 4 boxes are smaller than a pixel, with area 0 or outside their image, such as [0.1, 0.1, 0.5, 0.5] (id 1)"
        in text
    )
    assert text.endswith("on 96x64 pixels: expected [x, y, width, height] in pixels.")


def test_missing_annotation_file(coco):
    cfg, root = coco
    (root / "annotations" / "instances_train2017.json").unlink()
    assert "instances_train2017.json" in message(FileNotFoundError, cfg)


def test_annotation_file_that_is_not_json(coco):
    cfg, root = coco
    (root / "annotations" / "instances_train2017.json").write_text('{"images": [')
    text = message(ValueError, cfg)
    assert "is not JSON" in text
    assert "line 1 column 13" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.pop("categories"), "has no list 'categories'"),
        (lambda c: c["images"][1].pop("file_name"), "images[1] lacks 'file_name'"),
        (lambda c: c["images"].append(7), "images[4] is 7, not an object with keys"),
        (lambda c: c["annotations"][2].pop("bbox"), "annotations[2] lacks 'bbox'"),
        (lambda c: c["annotations"][0].pop("segmentation"), "annotations[0] lacks 'segmentation'"),
        (lambda c: c["annotations"][0].update(image_id=99), "image_id 99, which no image has"),
        (lambda c: c["annotations"][0].update(category_id=99), "category_id 99, which no category has"),
        (lambda c: c["annotations"].clear(), "has no annotations, and filter_cfg.filter_empty_gt leaves out images"),
        (lambda c: c["annotations"][1].update(id=c["annotations"][0]["id"]), "annotations[1] has the same id as"),
        (lambda c: c["images"][3].update(id=1), "images[3] has the same id as images[1]: 1."),
        (lambda c: c["categories"][2].update(id=1), "categories[2] has the same id as categories[0]: 1."),
        (lambda c: c["annotations"][1].update(bbox=["1", 2, 3, 4]), "annotations[1].bbox is ['1', 2, 3, 4]"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), "annotations[1].bbox is [1, 2, 3]"),
        (lambda c: c["annotations"][1].update(area="large"), "annotations[1].area is 'large'"),
    ],
)
def test_annotation_file_that_lacks_something(coco, change, expected):
    cfg, root = coco
    edit_annotations(root, change)
    assert expected in message(ValueError, cfg)


def test_crowds_alone(coco):
    cfg, root = coco
    edit_annotations(root, lambda c: [annotation.update(iscrowd=1) for annotation in c["annotations"]])
    assert "all 4 annotations are crowds (iscrowd=1), on which MMDetection doesn't train" in message(ValueError, cfg)
    edit_annotations(root, lambda c: c["annotations"][0].update(iscrowd=0))
    assert check_data(cfg, TRAIN) == []


def test_boxes_of_two_corners(coco):
    cfg, root = coco
    edit_annotations(root, lambda c: [annotation.update(bbox=[40, 8, 64, 40]) for annotation in c["annotations"][1:]])
    (note,) = check_data(cfg, TRAIN)
    assert "3 of 4 boxes reach beyond their image, such as [40, 8, 64, 40] (id 2) on 96x64 pixels: are they [x" in note


def test_outlines_without_area(coco):
    cfg, root = coco
    edit_annotations(root, lambda c: c["annotations"][1].update(segmentation=[[1, 2], [1, 2, 3, 4]]))
    (note,) = check_data(cfg, TRAIN)
    assert "1 of 4 objects are left out, since they have no outline of three points or more, such as [[1, 2]," in note
    edit_annotations(root, lambda c: [annotation.update(segmentation=[[1, 2]]) for annotation in c["annotations"]])
    assert "all 4 objects have no outline of three points" in message(ValueError, cfg)
    assert not DATASETS.build(cfg.train_dataloader.dataset)[0]["data_samples"].gt_instances.bboxes.numel()
    cfg.train_dataloader.dataset.pipeline[1].with_mask = False
    cfg.model.roi_head.mask_head = None
    assert check_data(cfg, TRAIN) == []


def test_an_object_without_outline(coco):
    cfg, root = coco
    edit_annotations(root, lambda c: c["annotations"][1].update(segmentation=[]))
    assert "the annotation with id 2 has the segmentation [], on which MMDetection fails" in message(ValueError, cfg)
    with pytest.raises(KeyError, match="mask"):
        DATASETS.build(cfg.train_dataloader.dataset)[1]


@pytest.mark.parametrize("outline", [[0, 0, 5, 0, 5, 5], "abc", None])
def test_an_outline_that_can_not_be_read(coco, outline):
    cfg, root = coco
    edit_annotations(root, lambda c: c["annotations"][1].update(segmentation=outline))
    assert f"has the segmentation {outline}, on which MMDetection fails" in message(ValueError, cfg)
    with pytest.raises((KeyError, TypeError)):
        DATASETS.build(cfg.train_dataloader.dataset)[1]


def test_what_is_not_trained_with_may_be_as_it_likes(coco):
    """Annotations of other classes, whose boxes and outlines are no one's concern."""
    cfg, root = coco
    other = dict(id=99, image_id=1, category_id=81, bbox=[90, 60, 90, 60], area=9, iscrowd=0, segmentation=[])
    edit_annotations(root, lambda c: c["annotations"].extend(dict(other, id=99 + i) for i in range(9)))
    edit_annotations(root, lambda c: c["categories"].append(dict(id=81, name="hazelnut")))
    cfg.data_checks = dict(other_classes="ignore")
    assert check_data(cfg, TRAIN) == []
    assert len(DATASETS.build(cfg.train_dataloader.dataset)[1]["data_samples"].gt_instances) == 1


def test_nothing_to_compare_with(coco):
    cfg, root = coco
    file = root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | dict(annotations=[])))
    (note,) = check_data(cfg, TRAIN)
    assert "instances_val2017.json' has no annotations: there is nothing to compare with" in note


def test_a_class_without_its_comma(coco):
    cfg, _ = coco
    cfg.train_dataloader.dataset.metainfo = dict(classes=("date"))
    expected = "train_dataloader.dataset.metainfo.classes is the text 'date': expected several names, or one and a"
    assert expected in message(ValueError, cfg)


def test_an_image_that_stands_there_twice_is_one(coco):
    cfg, root = coco
    edit_annotations(root, lambda c: c["images"].append(dict(c["images"][1])))
    assert check_data(cfg, TRAIN) == []


def test_masks_of_a_second_loader(coco):
    cfg, _ = coco
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline.insert(1, dict(type="LoadAnnotations", with_bbox=True))
    assert pipeline[2].with_mask
    assert check_data(cfg, TRAIN) == []


def test_a_box_only_detector_needs_no_segmentation(coco):
    cfg, root = coco
    edit_annotations(root, lambda c: c["annotations"][0].pop("segmentation"))
    cfg.train_dataloader.dataset.pipeline[1].with_mask = False
    assert "roi_head.mask_head, but LoadAnnotations loads no masks. Set with_mask" in message(ValueError, cfg)
    cfg.model.roi_head.mask_head = None
    assert check_data(cfg, TRAIN) == []


def test_classes_that_the_config_does_not_have(coco):
    cfg, root = coco
    edit_annotations(root, lambda c: c["categories"].append(dict(id=81, name="hazelnut")))
    text = message(ValueError, cfg)
    assert "'hazelnut'" in text
    assert "metainfo.classes" in text
    cfg.data_checks = dict(other_classes="ignore")
    assert check_data(cfg, TRAIN) == []


def test_classes_that_the_annotations_do_not_have(coco):
    cfg, root = coco
    edit_annotations(root, lambda c: c["categories"].pop())
    assert "no category for the config's classes 'toothbrush'" in message(ValueError, cfg)


def test_classes_from_a_file(coco, tmp_path):
    cfg, _ = coco
    (tmp_path / "classes.txt").write_text("date\nfig\n")
    cfg.train_dataloader.dataset.metainfo = dict(classes=str(tmp_path / "classes.txt"))
    assert "the config's: 'date', 'fig'." in message(ValueError, cfg)


def test_classes_in_another_order(coco):
    cfg, root = coco
    edit_annotations(root, lambda c: c["categories"].reverse())
    assert "another order" in message(ValueError, cfg)


def test_mmdetection_numbers_labels_in_the_order_of_the_file(coco):
    """Why another order is refused: the label of the only class "bicycle" box becomes its place in the file."""
    cfg, root = coco
    edit_annotations(root, lambda c: c["categories"].reverse())
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert dataset.metainfo["classes"][1] == "bicycle"
    assert dataset.get_data_info(1)["instances"][0]["bbox_label"] == 78  # "hair drier" by the config's names


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(iscrowd="0"), "annotations[0].iscrowd is '0': expected 0 or 1"),
        (dict(image_id="0"), "annotations[0] has image_id '0', which no image has (there is 0)."),
        (dict(category_id="1"), "annotations[0] has category_id '1', which no category has (there is 1)."),
    ],
)
def test_numbers_as_text(coco, change, expected):
    cfg, root = coco
    edit_annotations(root, lambda content: content["annotations"][0].update(change))
    assert expected in message(ValueError, cfg)


def test_no_word_on_crowds(coco):
    cfg, root = coco
    edit_annotations(root, lambda content: content["annotations"][0].update(iscrowd=None))
    assert check_data(cfg, TRAIN) == []


def test_pictures_of_one_pixel(coco):
    cfg, root = coco
    Image.new("RGB", (1, 1)).save(root / "train2017" / "0.jpg")
    assert "0.jpg: is 1x1 pixels, its annotation says 96x64" in message(ValueError, cfg)
