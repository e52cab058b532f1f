"""The generated set: the same bytes from the same seed, both label forms in agreement, as hard as documented."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from nat_dense.datasets import difficulty, shapes
from nat_dense.datasets.scene import CLASSES, MIN_VISIBLE
from nat_dense.datasets.shapes import FIRST_THING, GROUND, VOID, ShapesOptions, generate

OPTIONS = ShapesOptions(train=40, val=20, size=96, seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    assert generate(root, OPTIONS) is True
    return root


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes(data, tmp_path):
    generate(tmp_path / "again", OPTIONS)
    assert digests(tmp_path / "again") == digests(data)
    assert len(digests(data)) == 2 * (40 + 20) + 3


def test_another_seed_other_pictures(data, tmp_path):
    generate(tmp_path / "other", ShapesOptions(train=40, val=20, size=96, seed=4))
    images = {value for name, value in digests(data).items() if name.endswith(".jpg")}
    assert images.isdisjoint(digests(tmp_path / "other").values())


def test_no_picture_twice(data):
    images = [value for name, value in digests(data).items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images) == 60


def test_a_longer_set_begins_with_the_shorter_one(data, tmp_path):
    generate(tmp_path / "short", ShapesOptions(train=5, val=2, size=96, seed=3))
    short, long = digests(tmp_path / "short"), digests(data)
    names = [name for name in short if name.endswith((".jpg", ".png"))]
    assert len(names) == 14
    assert all(short[name] == long[name] for name in names)


@pytest.mark.parametrize(("split", "count"), [("training", 40), ("validation", 20)])
def test_coco_and_index_maps_agree(data, split, count):
    coco = COCO(str(data / "annotations" / f"instances_{split}.json"))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(coco.getImgIds()) == count
    crowds = 0
    for image in coco.loadImgs(coco.getImgIds()):
        path = data / "images" / split / image["file_name"]
        assert cv2.imread(str(path)).shape == (image["height"], image["width"], 3) == (96, 96, 3)
        expected = np.full((96, 96), GROUND, np.uint8)
        for annotation in coco.imgToAnns[image["id"]]:
            mask = coco.annToMask(annotation).astype(bool)
            assert annotation["area"] == mask.sum() > 0
            rows, columns = np.nonzero(mask)
            left, top = columns.min(), rows.min()
            assert annotation["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
            assert (expected[mask] == GROUND).all(), "visible parts overlap"
            expected[mask] = VOID if annotation["iscrowd"] else FIRST_THING + annotation["category_id"] - 1
            assert isinstance(annotation["segmentation"], dict if annotation["iscrowd"] else list)
            crowds += annotation["iscrowd"]
        labels = cv2.imread(str(data / "annotations" / split / path.with_suffix(".png").name), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(labels, expected)
    assert crowds >= 1


def test_nothing_is_hidden_beyond_recognition(data):
    annotations = json.loads((data / "annotations" / "instances_training.json").read_text())["annotations"]
    hidden = [annotation["occlusion"] for annotation in annotations if not annotation["iscrowd"]]
    assert max(hidden) <= 1 - MIN_VISIBLE + 1e-4
    assert min(hidden) >= 0


def test_colour_is_not_enough(tmp_path):
    """Colour helps (chance is 17 %) but leaves many things in doubt."""
    generate(tmp_path / "set", ShapesOptions(train=80, val=40, size=96))
    told = difficulty.measure(tmp_path / "set", "validation")["% of things whose class the mean colour tells"]
    assert 50 < told < 92


def test_difficulty_is_measured_from_the_files(data, capsys):
    numbers = difficulty.measure(data, "training")
    assert numbers["pictures"] == 40
    assert 3 <= numbers["things per picture"] <= 8
    assert numbers["% of things hidden by more than a tenth"] > 25
    assert numbers["contrast at the outline, CIELAB: 10 % have less than"] < 40
    assert sum(numbers[f"% of things that are a {name}"] for name in CLASSES) == pytest.approx(100)
    difficulty.main([str(data)])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| | training | validation |"
    assert "| pictures | 40 | 20 |" in table


def test_the_contrast_of_a_known_picture(tmp_path, monkeypatch):
    """A red square on black: CIELAB (53.24, 80.09, 67.20) against (0, 0, 0) is 117.3 apart."""
    for folder in ("images", "annotations"):
        (tmp_path / folder / "training").mkdir(parents=True)
    image = np.zeros((64, 64, 3), np.uint8)
    image[20:40, 10:30] = (0, 0, 255)
    cv2.imwrite(str(tmp_path / "images" / "training" / "a.png"), image)
    labels = np.where(image[..., 2] > 0, FIRST_THING, GROUND).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "annotations" / "training" / "a.png"), labels)
    polygon = [10, 20, 30, 20, 30, 40, 10, 40]
    square = {"image_id": 1, "category_id": 1, "iscrowd": 0, "area": 400, "bbox": [10, 20, 20, 20], "occlusion": 0.25}
    coco = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{**square, "segmentation": [polygon]}]}
    (tmp_path / "annotations" / "instances_training.json").write_text(json.dumps(coco))
    monkeypatch.setattr(difficulty, "CLASSES", ("square",))
    numbers = difficulty.measure(tmp_path, "training")
    assert numbers["contrast at the outline, CIELAB: 50 % have less than"] == pytest.approx(117.3, abs=0.1)
    assert numbers["square root of the area, px: 50 % have less than"] == 20
    assert numbers["% of pixels that are things"] == pytest.approx(100 * 400 / 4096)


def test_a_complete_set_is_left_alone(data):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    assert generate(data, OPTIONS) is False
    assert before == {path: path.stat().st_mtime_ns for path in data.rglob("*")}


def test_other_content_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not a generated shapes set \(no dataset.json\)"):
        generate(tmp_path, OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_other_options_are_refused(data):
    with pytest.raises(FileExistsError, match=r"'seed': 3.*not with.*'seed': 4"):
        generate(data, ShapesOptions(train=40, val=20, size=96, seed=4))


def test_a_damaged_set_is_refused(tmp_path):
    options = ShapesOptions(train=2, val=1, size=64)
    generate(tmp_path / "set", options)
    (tmp_path / "set" / "images" / "training" / "training_00001.jpg").unlink()
    with pytest.raises(FileExistsError, match=r"images/training has 1 .jpg files, not 2"):
        generate(tmp_path / "set", options)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "set", OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train=0: expected a whole number of at least 1"),
        ({"val": -3}, "val=-3: expected a whole number of at least 1"),
        ({"size": 20}, "size=20: expected a whole number of at least 48"),
        ({"seed": -1}, "seed=-1: expected a whole number of at least 0"),
        ({"train": 1.5}, "train=1.5: expected a whole number of at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ShapesOptions(**options)


def test_command_line(tmp_path, capsys):
    arguments = [str(tmp_path / "set"), "--train", "3", "--val", "2", "--size", "64", "--seed", "1"]
    shapes.main(arguments)
    assert "written, 3 + 2 pictures" in capsys.readouterr().out
    shapes.main(arguments)
    assert "already complete, 3 + 2 pictures" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        shapes.main([*arguments, "--val", "0"])
    assert "val=0: expected a whole number of at least 1" in capsys.readouterr().err
