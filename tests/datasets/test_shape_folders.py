"""The generated image folders."""

import hashlib

import cv2
import pytest

from nat_dense.datasets import shape_folders


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def test_folders(tmp_path, capsys):
    shape_folders.main([str(tmp_path / "a"), "--train", "2", "--val", "1", "--size", "32"])
    assert "10 classes, 2 + 1 pictures each" in capsys.readouterr().out
    classes = sorted(name.replace(" ", "_") for name in shape_folders.NAMES)
    assert len(classes) == 10
    for split, count in (("train", 2), ("validation", 1)):
        assert sorted(path.name for path in (tmp_path / "a" / split).iterdir()) == classes
        assert all(len(list((tmp_path / "a" / split / name).iterdir())) == count for name in classes)
    assert cv2.imread(str(tmp_path / "a" / "train" / "star" / "00000.png")).shape == (32, 32, 3)
    assert len({sha for _, sha in digest(tmp_path / "a")}) == 30


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, count, seed in (("a", 1, 0), ("b", 1, 0), ("more", 2, 0), ("other", 1, 1)):
        shape_folders.generate(tmp_path / name, train=count, val=1, size=24, seed=seed)
    a, b, more, other = (digest(tmp_path / name) for name in ("a", "b", "more", "other"))
    assert a == b
    assert set(a) < set(more)
    assert not {sha for _, sha in a} & {sha for _, sha in other}


def test_errors(tmp_path):
    with pytest.raises(FileExistsError):
        shape_folders.generate(tmp_path)
    with pytest.raises(ValueError, match="size=8: expected at least 1, 1 and 16"):
        shape_folders.generate(tmp_path / "x", size=8)
