"""Finds what is wrong with a config's data before training starts: paths, annotation files, classes, images, labels.

A config (or `--cfg-options`) may set `data_checks`, a dict with:

- `images`: "sample" (default: look up every file, decode at most 500 per dataset), "all" (decode every one; the default
  where bad images are skipped) or "none" (look up only).
- `bad_images`: "stop" (default) or "skip": continue without the bad images, which are listed.
- `other_classes`: "stop" (default) or "ignore": annotations of classes that the config doesn't have.
- `validation`: "try" (default: validate one batch before training, see `first_batch`) or "none".
"""

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from nat_dense.listing import listing
from nat_dense.mm.channels import configured_channels
from nat_dense.mm.config import evaluators
from nat_dense.mm.evaluator_checks import check_evaluators, coco_files, is_scored
from nat_dense.mm.fields import as_list
from nat_dense.mm.images import CHANNELS, Picture, find_bad_images, find_bad_labels, sample
from nat_dense.mm.loader_checks import (
    check_loader,
    notes_of_padding,
    notes_of_pair,
    notes_of_preprocessing,
)
from nat_dense.mm.pictures import find_pictures
from nat_dense.mm.pipelines import check_datasets
from nat_dense.mm.sources import COCO_DATASET, SEGMENTATION_DATASET, Source, sources_of

CHOICES = {
    "images": ("sample", "all", "none"),
    "bad_images": ("stop", "skip"),
    "other_classes": ("stop", "ignore"),
    "validation": ("try", "none"),
}
"""The fields of `data_checks` and their values, the default first."""


@DATASETS.register_module()
def without_images(dataset: dict, paths: list[str]) -> Any:
    """Builds a dataset and leaves images out of it.

    Args:
        dataset: config of a dataset of MMDetection or MMSegmentation.
        paths: the image files to leave out.

    Returns:
        The dataset itself, with its other images.
    """
    built = DATASETS.build(dataset)
    built.full_init()
    left_out = {Path(path) for path in paths}  # the library may write one as "./x.jpg"
    built.get_subset_([i for i in range(len(built)) if Path(built.get_data_info(i)["img_path"]) not in left_out])
    return built


def check_data(cfg: Config, loaders: tuple[str, ...]) -> list[str]:
    """Checks the datasets and evaluators that a run will use.

    With `bad_images="skip"`, bad images are taken out of the config's datasets, in place.

    Args:
        cfg: the config; its `default_scope` must be active.
        loaders: the names of the dataloaders that the run uses.

    Returns:
        Warnings for the user.

    Raises:
        FileNotFoundError: a data root, an annotation file or an image folder is missing.
        ValueError: annotations, classes, images or labels that the run would trip over.
    """
    checks = read_choices(cfg)
    warnings: list[str] = []
    trained: list[Source] = []
    for loader in loaders:
        check_loader(cfg, loader)
        scored, part = is_scored(cfg, loader), _naming_part(cfg) if loader == "test_dataloader" else None
        named: dict[str, Path] = {}
        check_datasets(cfg[loader].get("dataset"), f"{loader}.dataset")
        for source in sources_of(cfg[loader].get("dataset"), f"{loader}.dataset"):
            ignores, files = checks["other_classes"] == "ignore", coco_files(cfg, loader)
            pictures, notices = find_pictures(source, ignore_others=ignores, annotated=scored, scored=files)
            warnings += notices
            bad = find_bad_images(pictures, checks["images"], _expected_channels(cfg, source))
            warnings += _report_bad_images(source, bad, len(pictures), checks)
            unread = len(pictures) - len(sample(pictures, checks["images"]))
            if unread and checks["images"] != "none":
                warnings.append(
                    f"{source.name}: {unread} of {len(pictures)} images were looked up but not decoded; --cfg-options "
                    "data_checks.images=all decodes them all before training."
                )
            _check_zero_label(source)
            _check_labels(source, [p for p in pictures if p.path not in bad], checks)
            _check_heads(cfg.model, source)
            warnings += notes_of_preprocessing(cfg.model, source)
            if loader == "train_dataloader":
                trained.append(source)
                warnings += notes_of_padding(cfg.model, source)
                warnings += _notes_of_crops(cfg, source)
                _check_masks(cfg.model, source)
            elif trained:
                warnings += notes_of_pair(cfg.model, trained[0], source)
            if part:
                _check_names(source, pictures, part, named)
            if bad:  # last: this wraps what the other checks read of the source
                _leave_out(source, bad)
    for loader in sorted(set(loaders) - {"train_dataloader"}):
        warnings += check_evaluators(cfg, loader)
    return list(dict.fromkeys(warnings))


def _naming_part(cfg: Config) -> str | None:
    """The part of an image's path that a test names its output files after; None if it writes none."""
    if any(evaluator.get("output_dir") for evaluator in evaluators(cfg, "test_dataloader")):
        return "stem"
    hook = (cfg.get("default_hooks") or {}).get("visualization") or {}
    return "name" if hook.get("draw") else None


def _check_names(source: Source, pictures: list[Picture], part: str, named: dict[str, Path]) -> None:
    """Refuses images that share this part of their path; `named` has those of the dataset's other sources."""
    for picture in pictures:
        other = named.setdefault(getattr(picture.path, part), picture.path)
        if other != picture.path:
            raise ValueError(
                f"{source.name}: two test images share a name, {str(other)!r} and {str(picture.path)!r}, so one output "
                "would overwrite the other. Test the datasets separately, each with its own --show-dir / --out."
            )


def _check_zero_label(source: Source) -> None:
    loads = source.transform("LoadAnnotations").get("reduce_zero_label")
    if source.reader != SEGMENTATION_DATASET or loads is None:
        return
    if loads != (zero_is_void := source.dataset.reduce_zero_label):
        raise ValueError(
            f"{source.name}: reduce_zero_label is {zero_is_void}, but {loads} in its pipeline's LoadAnnotations. "
            "Remove it there, or set both to the same value."
        )


def _notes_of_crops(cfg: Config, source: Source) -> list[str]:
    """MMSegmentation pads to a fixed size; images smaller than a larger crop can't be batched."""
    size = (cfg.model.get("data_preprocessor") or {}).get("size")
    crop = source.transform("RandomCrop").get("crop_size")
    if source.reader != SEGMENTATION_DATASET or not size or not crop:
        return []
    crop = (crop, crop) if isinstance(crop, int) else tuple(crop)
    if crop[0] <= size[0] and crop[1] <= size[1]:
        return []
    return [
        f"{source.name}: crops of {crop} pixels are larger than model.data_preprocessor.size={tuple(size)}, to which "
        "smaller images are padded: a batch that has one fails. Set both to the same size."
    ]


def read_choices(cfg: Config) -> dict[str, str]:
    """The choices of a config's `data_checks`; raises ValueError if one isn't among `CHOICES`."""
    given = cfg.get("data_checks") or {}
    for key, value in given.items():
        if value not in CHOICES.get(key, ()):
            fields = "; ".join(f"{name}: {', '.join(values)}" for name, values in CHOICES.items())
            raise ValueError(f"data_checks.{key}={value!r}: expected {fields}.")
    if given.get("bad_images") == "skip":  # one that is not found is not skipped
        given = dict(images="all") | given
    return {key: given.get(key, values[0]) for key, values in CHOICES.items()}


def _expected_channels(cfg: Config, source: Source) -> int:
    """The channels that a file must have for the model; 0 where the loader converts, or isn't known."""
    loader, expected = source.transform("LoadImageFromFile"), configured_channels(cfg.model)
    if not loader:
        return 0
    color_type = loader.get("color_type", "color")
    loaded = CHANNELS.get(color_type)
    if loaded is not None and loaded != expected:
        raise ValueError(
            f"{source.name}: LoadImageFromFile(color_type={color_type!r}) gives {loaded} channels, the model takes "
            f"{expected}."
        )
    return 0 if loaded is not None else expected


def _report_bad_images(source: Source, bad: dict[Path, str], total: int, checks: dict[str, str]) -> list[str]:
    if not bad:
        return []
    faults = listing((f"{path}: {fault}" for path, fault in bad.items()), between="; ")
    message = f"{source.name}: {len(bad)} of {total} images can't be used. {faults}."
    if checks["bad_images"] == "stop":
        raise ValueError(f"{message} Repair or remove them, or skip them: --cfg-options data_checks.bad_images=skip.")
    if len(bad) == total:
        raise ValueError(f"{message} No readable image is left.")
    missed = source.reader == COCO_DATASET and not source.name.startswith("train_")
    return [f"{message} They are skipped" + ("; mAP counts the objects in them as missed." if missed else ".")]


def _leave_out(source: Source, bad: dict[Path, str]) -> None:
    wrapped = dict(source.cfg)
    source.cfg.clear()
    source.cfg.update(type="mmengine.without_images", dataset=wrapped, paths=[str(path) for path in bad])


def _check_labels(source: Source, pictures: list[Picture], checks: dict[str, str]) -> None:
    if not any(picture.label for picture in pictures):
        return
    # With a subset of the classes, MMSegmentation maps the values of all classes of the dataset.
    count = len(source.cls.METAINFO.get("classes") or source.classes)
    zero_is_void, ignored = source.dataset.reduce_zero_label, source.dataset.ignore_index
    allowed = [*range(count + 1 if zero_is_void else count), ignored]
    faults = list(find_bad_labels(pictures, checks["images"], allowed))
    if faults:
        meaning = f"0 (void), 1 to {count}" if zero_is_void else f"0 to {count - 1}"
        raise ValueError(
            f"{source.name}: {len(faults)} label maps don't fit. Expected {meaning} and {ignored} (ignored), for "
            f"{count} classes with reduce_zero_label={zero_is_void}. {listing(faults, between='; ')}. Check the "
            "classes and reduce_zero_label, or repair the files."
        )


def _check_heads(model: dict, source: Source) -> None:
    """Every head must know as many classes as the dataset; both libraries fail late, or never, where it doesn't."""
    if source.reader not in (COCO_DATASET, SEGMENTATION_DATASET):
        return
    count = len(source.classes)
    if not count:
        return
    roi_head = model.get("roi_head") or {}
    for name in ("bbox_head", "mask_head", "decode_head", "auxiliary_head"):
        for head in as_list(roi_head.get(name) or model.get(name)):
            found = head.get("num_classes")
            # Heads with several losses, and single-stage heads that match texts, count other things than classes.
            several_losses = isinstance(head.get("loss_decode"), list)
            of_texts = name == "bbox_head" and not roi_head and found is not None and found > count
            if found in (None, count) or head.get("class_agnostic") or several_losses or of_texts:
                continue
            names = listing(source.classes, between="; ")
            raise ValueError(
                f"{name}.num_classes is {found}, but {source.name} has {count} classes ({names}). "
                f"Set num_classes={count} in every head, or the dataset's metainfo.classes."
            )


def _check_masks(model: dict, source: Source) -> None:
    """The mask head of a two-stage detector trains on masks, which must be loaded."""
    loads = source.transforms("LoadAnnotations")
    has_head = bool((model.get("roi_head") or {}).get("mask_head"))
    if has_head and source.reader == COCO_DATASET and loads and not any(load.get("with_mask") for load in loads):
        raise ValueError(
            f"{source.name}: the model has a roi_head.mask_head, but LoadAnnotations loads no masks. Set "
            "with_mask=True there, or roi_head.mask_head=None."
        )
