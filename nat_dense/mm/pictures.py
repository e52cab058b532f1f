"""The images that a dataset names, looked up, with what is wrong with its annotations."""

from pathlib import Path

from mmengine.fileio import list_dir_or_file

from nat_dense.mm.coco_file import check_boxes, check_categories, check_coco_file, check_outlines, of_classes
from nat_dense.mm.fields import check_fields, is_foreign
from nat_dense.mm.images import Picture
from nat_dense.mm.loader_checks import notes_of_prefix
from nat_dense.mm.sources import COCO_DATASET, SEGMENTATION_DATASET, Source

FILTERS = ("filter_empty_gt", "min_size")
"""What datasets that read files like CocoDataset look for in `filter_cfg`."""


def find_pictures(
    source: Source, *, ignore_others: bool, annotated: bool, scored: set[Path]
) -> tuple[list[Picture], list[str]]:
    """Looks up the images of a dataset, and checks the annotations of one of COCO's form.

    Args:
        source: the dataset.
        ignore_others: whether it may have annotations of other classes than the config.
        annotated: whether annotations are compared with.
        scored: the annotation files that COCO's metrics read themselves.

    Returns:
        The images, none if they are in remote storage or of an unknown form; and notes for the user.

    Raises:
        FileNotFoundError: the data root, an annotation file or an image folder is missing.
        ValueError: annotations that the run would trip over, or no image.
    """
    if source.reader not in (COCO_DATASET, SEGMENTATION_DATASET) or source.cfg.get("backend_args"):
        return [], []
    root = source.cfg.get("data_root")
    if root and "://" not in str(root) and not Path(root).is_dir():  # first: some constructors read from there
        raise FileNotFoundError(
            f"{source.name}.data_root: no directory {root!r}. Set it with --cfg-options {source.name}.data_root=DIR."
        )
    dataset = source.dataset
    prefix = dataset.data_prefix
    if any("://" in str(place) for place in (dataset.data_root, dataset.ann_file, *prefix.values())):
        return [], []  # Remote storage: looking up every file would take longer than finding out.
    if source.cfg.get("indices") in (0, [], ()):
        raise ValueError(f"{source.name}.indices is {source.cfg['indices']!r}: no image is left.")
    if source.reader == COCO_DATASET:
        return _of_coco(source, ignore_others, annotated, scored)
    return _of_segmentation(source)


def _of_coco(
    source: Source, ignore_others: bool, annotated: bool, scored: set[Path]
) -> tuple[list[Picture], list[str]]:
    dataset, file = source.dataset, Path(source.dataset.ann_file)
    where = f"{source.name}.ann_file: {str(file)!r}"
    own_filter = is_foreign(next(base for base in source.cls.__mro__ if "filter_data" in vars(base)))
    filters = {} if own_filter else dataset.filter_cfg or {}
    check_fields(f"{source.name}.filter_cfg", source.cls.__name__, filters, FILTERS)
    folder = _folder(source, "img")
    notices = notes_of_prefix(source, {"img", "seg"})
    masks = any(load.get("with_mask") for load in source.transforms("LoadAnnotations"))
    content = check_coco_file(file, f"{source.name}.ann_file", masks, annotated)
    check_categories(content, source.classes, str(file), ignore_others=ignore_others)
    trains = not dataset.test_mode
    if trains:
        notices += _check_trained(content, of_classes(content, source.classes), filters, where, masks)
    if annotated and not trains and not content["annotations"]:
        notices.append(f"{where} has no annotations: there is nothing to compare with, and mAP will be -1.")
    if annotated and file.resolve() in scored and any(a["id"] == 0 for a in content["annotations"]):
        notices.append(
            f"{where} has an annotation with id 0, which COCO's evaluation always counts as missed: number "
            "annotations from 1."
        )
    pictures = [Picture(folder / i["file_name"], (i["width"], i["height"])) for i in content["images"]]
    return pictures, notices


def _check_trained(content: dict, known: dict, filters: dict, where: str, masks: bool) -> list[str]:
    """Checks that MMDetection's filters leave something to train on; returns notes on what they leave out."""
    if filters.get("filter_empty_gt") and not known["annotations"]:
        of = " of the config's classes" if content["annotations"] else ""
        raise ValueError(
            f"{where} has no annotations{of}, and filter_cfg.filter_empty_gt leaves out images without any: no "
            "image is left."
        )
    least = filters.get("min_size", 0)
    if all(min(image["width"], image["height"]) < least for image in content["images"]):
        raise ValueError(f"{where}: filter_cfg.min_size={least} leaves out smaller images: no image is left.")
    notices = check_boxes(known, where)
    return notices + (check_outlines(known, where) if masks else [])


def _of_segmentation(source: Source) -> tuple[list[Picture], list[str]]:
    dataset = source.dataset
    images = _folder(source, "img_path")
    # If left out, it is the root.
    root = Path(dataset.data_root or "")
    has_labels = Path(dataset.data_prefix.get("seg_map_path") or root) != root
    labels = _folder(source, "seg_map_path") if has_labels else None
    return _segmentation_pictures(source, images, labels), notes_of_prefix(source, {"img_path", "seg_map_path"})


def _folder(source: Source, key: str) -> Path:
    folder = Path(source.dataset.data_prefix.get(key) or source.dataset.data_root or "")
    if not folder.is_dir():
        raise FileNotFoundError(f"{source.name}.data_prefix.{key}: no directory {str(folder)!r}.")
    return folder


def _segmentation_pictures(source: Source, images: Path, labels: Path | None) -> list[Picture]:
    suffix, label_suffix = source.dataset.img_suffix, source.dataset.seg_map_suffix
    if source.dataset.ann_file:
        file = Path(source.dataset.ann_file)
        if not file.is_file():
            raise FileNotFoundError(f"{source.name}.ann_file: no file {str(file)!r}.")
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        found = list_dir_or_file(str(images), list_dir=False, suffix=suffix, recursive=True)  # as MMSegmentation does
        names = sorted(name[: -len(suffix)] for name in found)
    if not names:
        raise ValueError(f"{source.name}: {str(images)!r} holds no *{suffix} file (img_suffix).")
    return [
        Picture(images / (name + suffix), label=labels / (name + label_suffix) if labels else None) for name in names
    ]
