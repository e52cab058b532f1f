"""Finds missing, empty and broken image and label files before training starts."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

SAMPLE = 500
"""How many files of a larger set are decoded, evenly spaced; smaller sets are decoded entirely."""

CHANNELS = {"color": 3, "color_ignore_orientation": 3, "grayscale": 1, "grayscale_ignore_orientation": 1}
"""Channels that mmcv's `LoadImageFromFile` gives for each `color_type`; "unchanged" gives those of the file."""


@dataclass(frozen=True)
class Picture:
    """One image of a dataset.

    Attributes:
        path: the image file.
        size: (width, height) in pixels that the annotations state, or None.
        label: the file of its label map, or None.
    """

    path: Path
    size: tuple[int, int] | None = None
    label: Path | None = None


def sample(pictures: Sequence[Picture], how_many: str) -> Sequence[Picture]:
    """The pictures to decode: "all", "none", or an evenly spaced "sample" of at most `SAMPLE`."""
    if how_many == "none":
        return []
    step = 1 if how_many == "all" else -(-len(pictures) // SAMPLE)
    return pictures[::step] if pictures else []


def find_bad_images(pictures: Sequence[Picture], how_many: str, channels: int) -> dict[Path, str]:
    """Finds images that can't be used. Every file is looked up, a sample is decoded.

    Args:
        pictures: the images of a dataset.
        how_many: see `sample`.
        channels: channels that the model expects of a file that is loaded unchanged; 0 where the loader converts.

    Returns:
        Path and fault of each bad image.
    """
    bad = {}
    with ThreadPoolExecutor() as pool:
        for picture, fault in zip(pictures, pool.map(_file_fault, pictures), strict=True):
            if fault:
                bad[picture.path] = fault
        present = [picture for picture in sample(pictures, how_many) if picture.path not in bad]
        for picture, fault in zip(present, pool.map(lambda p: _image_fault(p, channels), present), strict=True):
            if fault:
                bad[picture.path] = fault
    return bad


def _file_fault(picture: Picture) -> str | None:
    try:
        size = picture.path.stat().st_size
    except OSError:
        return "no such file"
    return None if size else "an empty file (0 bytes)"


def _image_fault(picture: Picture, channels: int) -> str | None:
    try:
        with Image.open(picture.path) as image:
            width, height = _upright_size(image)
            bands = len(image.getbands())
            # Reading all of a JPEG at an eighth of its size finds truncated files at a fraction of the cost.
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
    except Image.DecompressionBombError:  # more pixels than Pillow opens; OpenCV may
        return None
    except Exception as error:  # Pillow's decoders raise whatever the bytes lead them to.
        return f"can't be decoded ({error})"
    if picture.size and picture.size != (width, height):
        return f"is {width}x{height} pixels, its annotation says {picture.size[0]}x{picture.size[1]}"
    if channels and bands != channels:
        return f"has {bands} channels, the model takes {channels} (LoadImageFromFile with color_type='color' converts)"
    return None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter
    return (image.height, image.width) if turned else image.size


def find_bad_labels(pictures: Sequence[Picture], how_many: str, allowed: Sequence[int]) -> Iterator[str]:
    """Finds label maps that don't fit their image or the classes.

    Args:
        pictures: images with their label files.
        how_many: see `sample`.
        allowed: every value that a label map may hold.

    Yields:
        One message for each fault.
    """
    for picture in pictures:
        if picture.label is None or not picture.label.is_file():
            yield f"{picture.path}: no label map {picture.label}"
    with ThreadPoolExecutor() as pool:
        yield from filter(None, pool.map(lambda p: _label_fault(p, allowed), sample(pictures, how_many)))


def _label_fault(picture: Picture, allowed: Sequence[int]) -> str | None:
    if picture.label is None or not picture.label.is_file():
        return None
    try:
        with Image.open(picture.label) as label, Image.open(picture.path) as image:
            values, size, image_size = np.asarray(label), label.size, _upright_size(image)
    except Image.DecompressionBombError:
        return None
    except Exception as error:  # Pillow's decoders raise whatever the bytes lead them to.
        return f"{picture.label}: can't be decoded ({error})"
    if values.ndim != 2:
        return (
            f"{picture.label}: has {values.shape[-1]} channels; a label map holds one class index per pixel (mode L or "
            "P)"
        )
    if size != image_size:
        return f"{picture.label}: is {size[0]}x{size[1]} pixels, its image {image_size[0]}x{image_size[1]}"
    wrong = np.setdiff1d(values, allowed)
    return f"{picture.label}: holds the values {wrong[:5].tolist()}" if wrong.size else None
