"""Checks what MMDetection takes for granted about COCO annotation files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nat_dense.listing import listing

REQUIRED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}
"""The lists of an instances file, and the keys that MMDetection reads from each entry without a default."""

BEYOND = 0.2
"""If more than this share of boxes reach beyond their image, their format may be another one."""


def check_coco_file(file: Path, name: str, masks: bool, annotated: bool = True) -> dict[str, Any]:
    """Reads an annotation file and checks that it is one.

    Args:
        file: the file.
        name: where it stands in the config, for messages.
        masks: whether each annotation needs a "segmentation".
        annotated: whether there must be annotations; test-dev's file of images has no such list.

    Returns:
        The content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, lacks lists or keys, or refers to images or categories that it doesn't hold.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{name}: no file {str(file)!r}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name}: {str(file)!r} is not JSON ({error}).") from error
    for key, fields in REQUIRED.items():
        if key == "annotations" and not annotated:
            content.setdefault(key, [])
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{name}: {str(file)!r} has no list {key!r}; a COCO file holds {', '.join(REQUIRED)}.")
        needed = (*fields, "segmentation") if masks and key == "annotations" else fields
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise ValueError(f"{name}: {str(file)!r}: {key}[{i}] is {entry!r}, not an object with keys.")
            missing = [field for field in needed if field not in entry]
            if missing:
                raise ValueError(f"{name}: {str(file)!r}: {key}[{i}] lacks {', '.join(map(repr, missing))}.")
    _check_entries(content, f"{name}: {str(file)!r}")
    return content


def _check_entries(content: dict[str, Any], where: str) -> None:
    """Checks the values that MMDetection relies on: references, boxes, and unique ids."""
    if not content["images"]:
        raise ValueError(f"{where} lists no images.")
    images, categories = (_ids(content, key, where) for key in ("images", "categories"))
    seen: set[Any] = set()
    for i, annotation in enumerate(content["annotations"]):
        if annotation["category_id"] not in categories:
            raise ValueError(
                f"{where}: annotations[{i}] has category_id {annotation['category_id']!r}, which no category has"
                f"{_as_text(annotation['category_id'], categories)}."
            )
        if annotation["image_id"] not in images:
            raise ValueError(
                f"{where}: annotations[{i}] has image_id {annotation['image_id']!r}, which no image has"
                f"{_as_text(annotation['image_id'], images)}."
            )
        if annotation.get("ignore"):  # MMDetection passes it over
            continue
        if annotation["id"] in seen:
            raise ValueError(f"{where}: annotations[{i}] has the same id as another one: {annotation['id']!r}.")
        seen.add(annotation["id"])
        box = annotation["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, (int, float)) for x in box):
            raise ValueError(f"{where}: annotations[{i}].bbox is {box!r}: expected [x, y, width, height] in pixels.")
        if annotation.get("iscrowd") not in (0, 1, None):
            raise ValueError(f"{where}: annotations[{i}].iscrowd is {annotation['iscrowd']!r}: expected 0 or 1.")
        if not isinstance(annotation["area"], (int, float)):
            raise ValueError(f"{where}: annotations[{i}].area is {annotation['area']!r}: expected a number of pixels.")


def _as_text(given: Any, known: set[Any]) -> str:
    """What to add if an id is text in one place and a number in the other."""
    return next((f" (there is {other!r})" for other in known if str(other) == str(given)), "")


def _ids(content: dict[str, Any], key: str, where: str) -> set[Any]:
    """The ids of images or categories; of entries with the same id, MMDetection uses the last for all.

    An image that is listed twice with the same fields counts as one.
    """
    first: dict[Any, int] = {}
    for i, entry in enumerate(content[key]):
        other = first.setdefault(entry["id"], i)
        if other != i and (key != "images" or entry != content[key][other]):
            raise ValueError(f"{where}: {key}[{i}] has the same id as {key}[{first[entry['id']]}]: {entry['id']!r}.")
    return set(first)


def of_classes(content: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """The content with only the annotations of these classes, as MMDetection reads it; all if none is given."""
    ids = {category["id"] for category in content["categories"] if not classes or category["name"] in classes}
    return content | dict(annotations=[a for a in content["annotations"] if a["category_id"] in ids])


def check_boxes(content: dict[str, Any], where: str) -> list[str]:
    """Reports boxes that MMDetection leaves out of training: smaller than a pixel, or outside their image.

    Args:
        content: what `check_coco_file` returned.
        where: the name of the file, for messages.

    Returns:
        Warnings for the user.

    Raises:
        ValueError: no others are left, for example because boxes are fractions of the image, or all are crowds.
    """
    sizes = _sizes(content)
    counted = [annotation for annotation in content["annotations"] if not annotation.get("ignore")]
    if counted and all(annotation.get("iscrowd") for annotation in counted):
        raise ValueError(
            f"{where}: all {len(counted)} annotations are crowds (iscrowd=1), on which MMDetection doesn't train."
        )
    fits = [_is_trained_with(a, *sizes[a["image_id"]]) for a in counted]
    trained = [a for a, fit in zip(counted, fits, strict=True) if fit]
    left_out = [a for a, fit in zip(counted, fits, strict=True) if not fit]
    beyond = [a for a in trained if _reaches_beyond(a["bbox"], *sizes[a["image_id"]])]
    notices = []
    if len(beyond) > BEYOND * len(counted):
        example = f"{beyond[0]['bbox']} (id {beyond[0]['id']!r}) on {'x'.join(map(str, sizes[beyond[0]['image_id']]))}"
        notices.append(
            f"{where}: {len(beyond)} of {len(counted)} boxes reach beyond their image, such as {example} pixels: are "
            "they [x, y, width, height], or [x1, y1, x2, y2] by mistake?"
        )
    if not left_out:
        return notices
    first = left_out[0]
    size = "x".join(map(str, sizes[first["image_id"]]))
    example = f"{first['bbox']} (id {first['id']!r}) on {size} pixels"
    found = f"smaller than a pixel, with area 0 or outside their image, such as {example}"
    if len(left_out) == len(counted):
        raise ValueError(f"{where}: all {len(counted)} boxes are {found}: expected [x, y, width, height] in pixels.")
    return [*notices, f"{where}: {len(left_out)} of {len(counted)} boxes are left out: {found}."]


def check_outlines(content: dict[str, Any], where: str) -> list[str]:
    """Reports outlines without area, whose objects MMDetection leaves out entirely; arguments as in `check_boxes`.

    Raises:
        ValueError: no others are left, or one is empty or not an outline, on which MMDetection fails in mid-epoch.
    """
    sizes = _sizes(content)
    counted = [a for a in content["annotations"] if not a.get("ignore")]
    for annotation in counted:
        outline = annotation.get("segmentation")
        is_readable = isinstance(outline, dict) or (
            isinstance(outline, list) and outline and all(isinstance(part, list) for part in outline)
        )
        if not is_readable and _is_trained_with(annotation, *sizes[annotation["image_id"]]):
            raise ValueError(
                f"{where}: the annotation with id {annotation['id']!r} has the segmentation {str(outline)[:80]}, on "
                "which MMDetection fails. Remove it, or give it an outline: [[x1, y1, x2, y2, x3, y3, ...]]."
            )
    outlines = [a for a in counted if isinstance(a.get("segmentation"), list)]
    empty = [a for a in outlines if a["segmentation"] and not any(_is_outline(part) for part in a["segmentation"])]
    if not empty:
        return []
    found = f"no outline of three points or more, such as {str(empty[0]['segmentation'])[:80]} (id {empty[0]['id']!r})"
    if len(empty) == len(counted):
        raise ValueError(f"{where}: all {len(empty)} objects have {found}: expected lists of [x1, y1, x2, y2, ...].")
    return [f"{where}: {len(empty)} of {len(counted)} objects are left out, since they have {found}."]


def _sizes(content: dict[str, Any]) -> dict[Any, tuple[int, int]]:
    """Width and height of each image, by its id."""
    return {image["id"]: (image["width"], image["height"]) for image in content["images"]}


def _is_outline(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0


def _reaches_beyond(box: list[float], width: float, height: float) -> bool:
    """By more than a pixel, which rounding may add."""
    return box[0] + box[2] > width + 1 or box[1] + box[3] > height + 1


def _is_trained_with(annotation: dict[str, Any], width: float, height: float) -> bool:
    x, y, box_width, box_height = annotation["bbox"]
    is_inside = min(x + box_width, width) > max(x, 0) and min(y + box_height, height) > max(y, 0)
    return is_inside and min(box_width, box_height) >= 1 and annotation["area"] > 0


def check_categories(content: dict[str, Any], classes: Sequence[str], file: str, ignore_others: bool) -> None:
    """Checks that the file's categories are the config's classes, in the same order.

    MMDetection numbers the labels in the file's order and names them in the config's; where the two differ, it
    silently trains and evaluates under wrong names.

    Args:
        content: what `check_coco_file` returned.
        classes: the dataset's classes.
        file: the name of the file, for messages.
        ignore_others: whether annotations of other classes may be left out of training.

    Raises:
        ValueError: a class is only on one side, or the orders differ.
    """
    names = [category["name"] for category in content["categories"]]
    others = [name for name in names if name not in classes]
    if others and not ignore_others:
        raise ValueError(
            f"{file!r} has classes that the config doesn't have: {_quoted(others)}; the config's: {_quoted(classes)}. "
            "Set the dataset's metainfo.classes (and num_classes of the heads), or leave these out: --cfg-options "
            "data_checks.other_classes=ignore."
        )
    common = [name for name in names if name in classes]
    absent = [name for name in classes if name not in common]
    if absent:
        raise ValueError(
            f"{file!r} has no category for the config's classes {_quoted(absent)}; the file's: {_quoted(names)}."
        )
    if common != list(classes):
        raise ValueError(
            f"{file!r} lists its categories in another order ({_quoted(common)}) than the config's classes "
            f"({_quoted(classes)}), and MMDetection would mix them up. Give metainfo.classes in the file's order."
        )


def _quoted(names: Sequence[str]) -> str:
    return listing(map(repr, names))
