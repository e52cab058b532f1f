"""Bad data is refused before training starts, with a message that names it."""

import importlib
import re
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope
from mmseg.datasets import BaseSegDataset
from PIL import Image

from nat_dense.mm.config import load_config
from nat_dense.mm.data_checks import CHOICES, _check_heads, check_data
from nat_dense.mm.sources import sources_of
from tests.mm.small import DETECTOR, SIZE, TRAIN, coco_options, message, parse_options, write_coco


def test_good_data_passes_without_a_word(coco, ade):
    init_default_scope("mmdet")
    assert check_data(coco[0], TRAIN) == []
    init_default_scope("mmseg")
    assert check_data(ade[0], TRAIN) == []


@DATASETS.register_module()
class Plots(BaseSegDataset):
    """A data set of a user's, as MMSegmentation's tutorial writes one: fields are set by its constructor."""

    METAINFO: ClassVar[dict] = dict(classes=("road", "roof"), palette=[[0, 0, 0], [255, 0, 0]])

    def __init__(self, **kwargs):
        super().__init__(img_suffix=".png", seg_map_suffix=".png", reduce_zero_label=True, **kwargs)


@DATASETS.register_module()
class Parts(CocoDataset):
    """One that has all of its fields from its constructor, and takes no others."""

    def __init__(self, root: str, pipeline: list):
        super().__init__(
            data_root=root, ann_file="annotations/instances_train2017.json", data_prefix=dict(img="train2017/"),
            metainfo=dict(classes=CocoDataset.METAINFO["classes"]), pipeline=pipeline,
        )  # fmt: skip


@DATASETS.register_module()
class Eager(CocoDataset):
    """One that is not built without reading, nor without its pipeline."""

    def __init__(self, pipeline: list, **kwargs):
        assert pipeline[0]["type"] == "LoadImageFromFile"
        super().__init__(pipeline=pipeline, lazy_init=False, **kwargs)


@DATASETS.register_module()
class OwnFormat(BaseDataset):
    """One whose annotations nothing is known of, nor its constructor."""

    METAINFO: ClassVar[dict] = dict(classes=CocoDataset.METAINFO["classes"])

    def __init__(self, pipeline: list):
        raise RuntimeError("not now")

    def load_data_list(self):
        return []


def test_datasets_that_are_not_built_without_reading(coco):
    cfg, root = coco
    cfg.train_dataloader.dataset.type = "Eager"
    assert check_data(cfg, TRAIN) == []
    (root / "train2017" / "2.jpg").unlink()
    assert f"{root / 'train2017' / '2.jpg'}: no such file" in message(ValueError, cfg)
    cfg.train_dataloader.dataset = dict(type="OwnFormat", pipeline=cfg.train_dataloader.dataset.pipeline)
    assert check_data(cfg, TRAIN) == []


def test_datasets_that_set_their_fields_themselves(coco, ade):
    cfg, root = ade
    for image in root.glob("images/*/*.jpg"):
        Image.open(image).save(image.with_suffix(".png"))
        image.unlink()
    for loader in TRAIN:
        cfg[loader].dataset.type = "Plots"
        cfg[loader].dataset.pop("reduce_zero_label", None)
        for transform in cfg[loader].dataset.pipeline:
            transform.pop("reduce_zero_label", None)
    cfg.model.decode_head.num_classes = cfg.model.auxiliary_head.num_classes = 2
    init_default_scope("mmseg")
    assert check_data(cfg, TRAIN) == []
    Image.fromarray(np.full((SIZE[1], SIZE[0]), 3, np.uint8)).save(root / "annotations" / "training" / "1.png")
    assert "Expected 0 (void), 1 to 2 and 255 (ignored)" in message(ValueError, cfg)

    cfg, root = coco
    pipeline = cfg.train_dataloader.dataset.pipeline
    init_default_scope("mmdet")
    cfg.train_dataloader.dataset = dict(type="Parts", root=str(root), pipeline=pipeline)
    assert check_data(cfg, TRAIN) == []
    (root / "train2017" / "2.jpg").unlink()
    assert f"{root / 'train2017' / '2.jpg'}: no such file" in message(ValueError, cfg)


def test_missing_data_root(coco):
    cfg, _ = coco
    cfg.train_dataloader.dataset.data_root = "nowhere"
    text = message(FileNotFoundError, cfg)
    assert "'nowhere'" in text
    assert "--cfg-options train_dataloader.dataset.data_root=DIR" in text


def test_missing_image_folder(coco, ade):
    for (cfg, root), scope, folder in ((coco, "mmdet", "val2017"), (ade, "mmseg", "images/validation")):
        init_default_scope(scope)
        (root / folder).rename(root / "moved")
        assert folder in message(FileNotFoundError, cfg)


def test_missing_label_folder(ade):
    cfg, root = ade
    (root / "annotations/training").rename(root / "moved")
    assert "data_prefix.seg_map_path" in message(FileNotFoundError, cfg)


def test_heads_with_another_number_of_classes(coco, ade):
    init_default_scope("mmdet")
    coco[0].model.roi_head.mask_head.num_classes = 3
    assert "mask_head.num_classes is 3, but train_dataloader.dataset has 80 classes" in message(ValueError, coco[0])
    init_default_scope("mmseg")
    ade[0].model.decode_head.num_classes = 19
    assert "decode_head.num_classes is 19" in message(ValueError, ade[0])


@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "text", "resized"])
def test_bad_images_stop_the_run_or_are_skipped_aloud(coco, fault):
    cfg, root = coco
    file = root / "train2017" / "2.jpg"
    expected = dict(missing="no such file", empty="0 bytes", resized="its annotation says 96x64")
    if fault == "missing":
        file.unlink()
    elif fault == "resized":
        Image.open(file).resize((SIZE[1], SIZE[0])).save(file)
    else:
        content = dict(empty=b"", text=b"no image", truncated=file.read_bytes()[:-800])[fault]
        file.write_bytes(content)
    text = message(ValueError, cfg)
    assert f"{file}: " in text
    assert expected.get(fault, "can't be decoded") in text

    cfg.data_checks = dict(bad_images="skip")
    (warning,) = check_data(cfg, TRAIN)
    assert str(file) in warning
    assert "1 of 4 images" in warning
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert [Path(dataset.get_data_info(i)["img_path"]).name for i in range(len(dataset))] == ["0.jpg", "1.jpg", "3.jpg"]


def test_what_a_sample_leaves_out_is_said_and_nothing_is_left_out_where_bad_images_are_skipped(coco, monkeypatch):
    monkeypatch.setattr("nat_dense.mm.images.SAMPLE", 2)
    cfg, root = coco
    (root / "train2017" / "1.jpg").write_bytes(b"no image")  # between those of the sample
    (warning,) = check_data(cfg, TRAIN)
    assert "train_dataloader.dataset: 2 of 4 images were looked up but not decoded" in warning
    cfg.data_checks = dict(bad_images="skip")
    (warning,) = check_data(cfg, TRAIN)
    assert "1.jpg" in warning
    assert "They are skipped." in warning


def test_skipped_images_of_a_validation_count_as_missed(coco):
    cfg, root = coco
    (root / "val2017" / "1.jpg").write_bytes(b"no image")
    cfg.data_checks = dict(bad_images="skip")
    (warning,) = check_data(cfg, ("val_dataloader",))
    assert "mAP counts the objects in them as missed" in warning


@pytest.mark.parametrize("option", ["default_hooks.visualization.draw=True", "test_evaluator.output_dir=out"])
def test_images_of_one_name_where_files_are_named_after_them(ade, option):
    cfg, root = ade
    for folder in ("images", "annotations"):
        kept = root / folder / "validation"
        for part in ("a", "b"):
            shutil.copytree(kept, root / folder / "parts" / part)
    parts = dict(img_path="images/parts", seg_map_path="annotations/parts")
    cfg.test_dataloader.dataset.data_prefix = parts
    test = ("test_dataloader",)
    assert check_data(cfg, test) == []
    cfg.merge_from_dict(parse_options([option]))
    assert "two test images share a name" in message(ValueError, cfg, test)
    parts["img_path"], parts["seg_map_path"] = "images/parts/a", "annotations/parts/a"
    cfg.test_dataloader.dataset.data_prefix = parts
    assert check_data(cfg, test) == []


def test_skipped_images_of_a_dataset_with_classes_of_its_own(tmp_path):
    """The other checks go on reading the dataset, not what leaves its images out."""
    init_default_scope("mmdet")
    root = write_coco(tmp_path / "coco", classes=("bolt", "nut"))
    cfg = load_config(DETECTOR, parse_options(coco_options(root)))
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.metainfo = dict(classes=("bolt", "nut"))
    heads = cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head
    for head in heads:
        head.num_classes = 2
    (root / "train2017" / "2.jpg").unlink()
    cfg.data_checks = dict(bad_images="skip")
    assert len(check_data(cfg, TRAIN)) == 1
    assert len(DATASETS.build(cfg.train_dataloader.dataset)) == 3
    heads[0].num_classes = 80
    assert "has 2 classes (bolt; nut). Set num_classes=2" in message(ValueError, cfg)


@pytest.mark.parametrize("root", ["./data/", "data//", "data/../data"])
def test_skipped_images_under_paths_of_any_form(tmp_path, monkeypatch, root):
    """What is left out is compared with what MMDetection joins, which it leaves as it is."""
    init_default_scope("mmdet")
    write_coco(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    cfg = load_config(DETECTOR, parse_options(coco_options(Path("data"))))
    cfg.train_dataloader.dataset.data_root = root
    Path("data/train2017/2.jpg").unlink()
    cfg.data_checks = dict(bad_images="skip")
    check_data(cfg, ("train_dataloader",))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert [Path(dataset.get_data_info(i)["img_path"]).name for i in range(3)] == ["0.jpg", "1.jpg", "3.jpg"]
    assert len(dataset) == 3


def test_images_larger_than_pillow_opens(coco, monkeypatch):
    """OpenCV, which loads them, has another limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert check_data(coco[0], TRAIN) == []


def test_the_images_of_a_segmentor_are_those_that_mmsegmentation_finds(ade):
    cfg, root = ade
    images, labels = root / "images/training", root / "annotations/training"
    (images / "._0.jpg").write_bytes(b"what macOS leaves beside a file")
    for folder in (images, labels):
        shutil.move(folder, folder.with_name("elsewhere"))
        folder.mkdir()
        (folder / "linked").symlink_to(folder.with_name("elsewhere"))
    assert check_data(cfg, ("train_dataloader",)) == []
    assert len(DATASETS.build(cfg.train_dataloader.dataset)) == 4
    (images / "linked/1.jpg").write_bytes(b"")
    assert "1.jpg: an empty file" in message(ValueError, cfg)


def test_skipped_images_of_a_segmentor(ade):
    cfg, root = ade
    (root / "images/training/0.jpg").write_bytes(b"")
    cfg.data_checks = dict(bad_images="skip")
    assert "They are skipped." in check_data(cfg, TRAIN)[0]
    assert len(DATASETS.build(cfg.train_dataloader.dataset)) == 3


def test_labels_that_are_reduced_at_one_place_alone(ade):
    cfg, _ = ade
    cfg.train_dataloader.dataset.reduce_zero_label = False
    assert "reduce_zero_label is False, but True in its pipeline's LoadAnnotations" in message(ValueError, cfg)
    del cfg.train_dataloader.dataset["reduce_zero_label"]
    cfg.train_dataloader.dataset.pipeline[1].reduce_zero_label = False
    assert "reduce_zero_label is True, but False in its pipeline's LoadAnnotations" in message(ValueError, cfg)


def test_crops_larger_than_what_smaller_images_are_padded_to(ade):
    cfg, _ = ade
    cfg.model.data_preprocessor.size = (64, 48)
    (note,) = check_data(cfg, TRAIN)
    assert "crops of (64, 64) pixels are larger than model.data_preprocessor.size=(64, 48)" in note
    cfg.model.data_preprocessor.size = (96, 64)
    assert check_data(cfg, TRAIN) == []


@pytest.mark.parametrize("size", [0, -1, "two", True])
def test_impossible_batch_size(coco, size):
    cfg, _ = coco
    cfg.train_dataloader.batch_size = size
    assert f"train_dataloader.batch_size is {size!r}: expected a number" in message(ValueError, cfg)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("batchsize=2", ": DataLoader has no field 'batchsize'. Did you mean 'batch_size'?"),
        ("num_workers=-1", ".num_workers is -1: expected a number of processes, or 0 for none."),
        ("num_workers=two", ".num_workers is 'two': expected"),
        ("sampler.type=DefaultSamplr", ".sampler: there is no data sampler 'DefaultSamplr'. Did you mean"),
        ("sampler.shufle=True", ".sampler: DefaultSampler has no field 'shufle'. Did you mean 'shuffle'?"),
        ("batch_sampler.type=AspectRatioBatchSamplr", ".batch_sampler: there is no data sampler"),
        ("collate_fn.type=pseudo_colate", ".collate_fn: there is no function 'pseudo_colate'. Did you mean"),
        ("dataset.indices=0", ".dataset.indices is 0: no image is left."),
        ("dataset.filter_cfg.min_sze=32", ".dataset.filter_cfg: CocoDataset has no field 'min_sze'. Did you mean"),
    ],
)
def test_misspelt_or_impossible_fields_of_a_loader(coco, option, expected):
    cfg, _ = coco
    cfg.merge_from_dict(parse_options([f"train_dataloader.{option}"]))
    assert message(ValueError, cfg).startswith(f"train_dataloader{expected}")


def test_images_that_are_looked_up_only(coco):
    cfg, root = coco
    (root / "train2017" / "2.jpg").write_bytes(b"no image")
    cfg.data_checks = dict(images="none")
    assert check_data(cfg, TRAIN) == []


def test_no_image_is_left(coco):
    cfg, root = coco
    for file in (root / "train2017").iterdir():
        file.write_bytes(b"")
    cfg.data_checks = dict(bad_images="skip")
    assert "No readable image is left" in message(ValueError, cfg)


def test_images_of_four_channels(coco):
    cfg, root = coco
    cfg.train_dataloader.dataset.pipeline[0].color_type = "unchanged"
    assert check_data(cfg, TRAIN) == []
    Image.open(root / "train2017" / "0.jpg").convert("RGBA").save(root / "train2017" / "0.jpg", "PNG")
    assert "has 4 channels, the model takes 3" in message(ValueError, cfg)
    cfg.train_dataloader.dataset.pipeline[0].color_type = "grayscale"
    assert "gives 1 channels, the model takes 3" in message(ValueError, cfg)


def test_channels_that_nothing_says(coco):
    """Models that normalise in the pipeline have no mean; loaders of other kinds give what they like."""
    cfg, root = coco
    for file in (root / "train2017").iterdir():
        Image.open(file).convert("RGBA").save(file, "PNG")
    loader = cfg.train_dataloader.dataset.pipeline[0]
    loader.color_type = "unchanged"
    cfg.model.data_preprocessor.mean = cfg.model.data_preprocessor.std = None
    cfg.model.backbone.in_chans = 4
    assert check_data(cfg, ("train_dataloader",)) == []
    cfg.model.data_preprocessor.mean = [0] * 5
    assert "has 4 channels, the model takes 5" in message(ValueError, cfg)
    cfg.train_dataloader.dataset.pipeline[0] = dict(type="LoadMultiChannelImageFromFiles")
    assert check_data(cfg, ("train_dataloader",)) == []
    cfg.train_dataloader.dataset.pipeline[0] = loader
    cfg.model.data_preprocessor.mean = [0] * 3
    loader.color_type = "color_ignore_orientation"
    Image.open(root / "train2017" / "0.jpg").convert("L").save(root / "train2017" / "0.jpg", "PNG")
    assert check_data(cfg, ("train_dataloader",)) == []


@pytest.mark.parametrize(
    "config",
    [
        "mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py",  # 80 things in the heads, 133 classes in the dataset
        "mmdet::v3det/faster_rcnn_r50_fpn_8x4_sample1e-3_mstrain_v3det_2x.py",  # a file names the classes
        "mmdet::lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py",
        "mmdet::mm_grounding_dino/grounding_dino_swin-t_pretrain_obj365_goldg.py",  # 256 tokens
        "mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py",  # an auxiliary head for outlines
    ],
)
def test_heads_that_count_other_things_are_left_alone(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = Path("data/V3Det/annotations/category_name_13204_v3det_2023_v1.txt")
    names.parent.mkdir(parents=True)
    names.write_text("".join(f"class {i}\n" for i in range(13204)))
    cfg = load_config(config)
    init_default_scope(cfg.default_scope)
    for loader in TRAIN:
        for source in sources_of(cfg[loader].dataset, loader):
            _check_heads(cfg.model, source)


def test_every_choice_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "checks.md").read_text()
    documented = re.findall(r"^\|(?: `(\w+)`)? +\| `(\w+)` \|", page, re.MULTILINE)
    fields: dict[str, list[str]] = {}
    for field, value in documented:
        fields.setdefault(field or list(fields)[-1], []).append(value)
    assert fields == {field: list(values) for field, values in CHOICES.items()}


def test_misspelt_check(coco):
    coco[0].data_checks = dict(bad_images="ignore")
    assert "data_checks.bad_images='ignore': expected" in message(ValueError, coco[0])


def test_remote_data_is_left_to_its_file_backend(coco):
    cfg, _ = coco
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = None
        loader.dataset.update(ann_file="http://server/coco.json", data_prefix=dict(img="http://server/images/"))
    cfg.val_evaluator.ann_file = "http://server/coco.json"
    assert check_data(cfg, TRAIN) == []


def test_unknown_dataset_type(coco):
    coco[0].train_dataloader.dataset.type = "CoocDataset"
    assert "no dataset 'CoocDataset'. Did you mean 'CocoDataset'?" in message(ValueError, coco[0])


def test_a_dataset_of_another_library_is_proposed_with_its_scope(coco):
    importlib.import_module("mmseg.datasets")
    coco[0].train_dataloader.dataset.type = "ADE20KDataset"
    assert "no dataset 'ADE20KDataset'. Did you mean 'mmseg.ADE20KDataset'?" in message(ValueError, coco[0])


def test_wrapped_datasets_are_checked(coco):
    cfg, root = coco
    (root / "train2017" / "2.jpg").write_bytes(b"")
    cfg.train_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=cfg.train_dataloader.dataset)
    assert "train_dataloader.dataset.dataset: 1 of 4 images" in message(ValueError, cfg)
    cfg.data_checks = dict(bad_images="skip")
    check_data(cfg, TRAIN)
    assert len(DATASETS.build(cfg.train_dataloader.dataset)) == 6


def test_label_values_outside_the_classes(ade):
    cfg, root = ade
    file = root / "annotations/training/1.png"
    label = np.asarray(Image.open(file)).copy()
    label[0, 0], label[0, 1] = 151, 200
    Image.fromarray(label).save(file)
    text = message(ValueError, cfg)
    assert f"{file}: holds the values [151, 200]" in text
    assert "0 (void), 1 to 150 and 255 (ignored), for 150 classes with reduce_zero_label=True" in text


def test_labels_of_a_dataset_without_void(ade):
    cfg, _ = ade
    classes = ("wall", "box")
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.update(type="BaseSegDataset", reduce_zero_label=False, metainfo=dict(classes=classes))
        loader.dataset.update(img_suffix=".jpg", seg_map_suffix=".png")
        for transform in loader.dataset.pipeline:
            transform.pop("reduce_zero_label", None)
    cfg.model.decode_head.num_classes = cfg.model.auxiliary_head.num_classes = 2
    assert "holds the values [2]" in message(ValueError, cfg)  # 0, 1 and 2 are three classes


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda file: file.unlink(), "no label map"),
        (lambda file: file.write_bytes(b""), "can't be decoded"),
        (lambda file: Image.open(file).convert("RGB").save(file), "has 3 channels"),
        (lambda file: Image.open(file).resize((10, 10)).save(file), "is 10x10 pixels, its image 96x64"),
    ],
)
def test_bad_label_maps(ade, change, expected):
    cfg, root = ade
    file = root / "annotations/validation/0.png"
    change(file)
    text = message(ValueError, cfg)
    assert str(file) in text
    assert expected in text


def test_empty_image_folder(ade):
    cfg, root = ade
    for file in (root / "images/training").iterdir():
        file.unlink()
    assert "holds no *.jpg file" in message(ValueError, cfg)
