"""What is wrong with a config's data is found before training starts: paths, annotation files, classes, images, labels.

A config (or `--cfg-options`) may set `data_checks`, a dict with:

- `images`: "sample" (default: look up every file, decode at most 500 a dataset), "all" (decode every one; the default
  where bad images are skipped) or "none" (look up only).
- `bad_images`: "stop" (default) or "skip": go on without the bad images, which are listed.
- `other_classes`: "stop" (default) or "ignore": annotations of classes that the config doesn't have.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS
from torch.utils.data import DataLoader

from nat_dense.mm.coco_file import check_boxes, check_categories, check_coco_file
from nat_dense.mm.config import evaluators
from nat_dense.mm.fields import check_fields, known_class
from nat_dense.mm.images import CHANNELS, Picture, find_bad_images, find_bad_labels, sample
from nat_dense.mm.pipelines import check_pipelines, datasets_of, is_wrapper

CHOICES = {"images": ("sample", "all", "none"), "bad_images": ("stop", "skip"), "other_classes": ("stop", "ignore")}
"""The fields of `data_checks` and their values, the default first."""

LOADER_FIELDS = ("num_batch_per_epoch", "disable_subprocess_warning")
"""What MMEngine's Runner takes of a dataloader beside the arguments of torch's DataLoader."""

COCO_DATASET = "mmdet.datasets.coco.CocoDataset"
SEGMENTATION_DATASET = "mmseg.datasets.basesegdataset.BaseSegDataset"
LISTED = 5
"""So many files are named in a message; the rest is counted."""


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
    left_out = set(paths)
    built.get_subset_([i for i in range(len(built)) if built.get_data_info(i)["img_path"] not in left_out])
    return built


@dataclass(frozen=True)
class Source:
    """One dataset of a config.

    Attributes:
        name: where it stands in the config, such as "train_dataloader.dataset".
        cfg: its config.
        cls: its class, a subclass of MMEngine's BaseDataset.
    """

    name: str
    cfg: Any
    cls: Any

    @property
    def reader(self) -> str:
        """Full name of the class that says how annotations are read; a subclass with a format of its own is another."""
        own = {"load_data_list", "parse_data_info"}
        base = next((base for base in self.cls.__mro__ if own & vars(base).keys()), self.cls)
        return f"{base.__module__}.{base.__name__}"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty where only the annotations know them."""
        given = (self.cfg.get("metainfo") or {}).get("classes")
        if isinstance(given, str):  # MMEngine also takes a file with a class a line.
            given = Path(given).read_text(encoding="utf-8").splitlines()
        return tuple(given or self.cls.METAINFO.get("classes") or ())

    def argument(self, name: str) -> Any:
        """A field of the dataset: the config's, else the default of its class."""
        parameters = [inspect.signature(base.__init__).parameters.get(name) for base in self.cls.__mro__]
        defaults = [p.default for p in parameters if p is not None and p.default is not p.empty]
        return self.cfg.get(name, defaults[0] if defaults else None)

    def path(self, value: str | None) -> Path:
        return Path(self.cfg.get("data_root") or "", value or "")

    def transform(self, name: str) -> dict:
        """The config of the first transform of this type in the pipeline, or an empty one."""
        pipeline = (t for t in self.cfg.get("pipeline") or [] if isinstance(t, dict))
        return next((t for t in pipeline if t.get("type") == name), {})


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
    checks = _read_choices(cfg)
    warnings = []
    for loader in loaders:
        _check_loader_fields(cfg[loader], loader)
        scored, part = _is_scored(cfg, loader), _naming_part(cfg) if loader == "test_dataloader" else None
        named: dict[str, Path] = {}
        check_pipelines(cfg[loader].get("dataset"), f"{loader}.dataset")
        for source in _sources(cfg[loader].get("dataset"), f"{loader}.dataset"):
            _check_zero_label(source)
            pictures, notices = _find_pictures(source, checks, annotated=scored)
            warnings += notices
            bad = find_bad_images(pictures, checks["images"], _expected_channels(cfg, source))
            warnings += _report_bad_images(source, bad, len(pictures), checks)
            unread = len(pictures) - len(sample(pictures, checks["images"]))
            if unread and checks["images"] != "none":
                warnings.append(
                    f"{source.name}: {unread} of {len(pictures)} images were looked up but not decoded; --cfg-options "
                    "data_checks.images=all decodes every one, before training."
                )
            _check_labels(source, [p for p in pictures if p.path not in bad], checks)
            _check_heads(cfg.model, source)
            if part:
                _check_names(source, pictures, part, named)
            if bad:  # at last: what the other checks read of the source is what is wrapped here
                _leave_out(source, bad)
    for loader in sorted(set(loaders) - {"train_dataloader"}):
        _check_evaluator(cfg, loader)
    return warnings


def _naming_part(cfg: Config) -> str | None:
    """What of an image's path names the files that a test draws or writes for it; None where it makes none."""
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
                f"{source.name}: {str(other)!r} and {str(picture.path)!r} have one name, and --show-dir and --out name "
                "files after images: one would overwrite the other's. Test them one after the other, into two folders."
            )


def _check_loader_fields(loader: dict, name: str) -> None:
    check_fields(name, "DataLoader", loader, [*LOADER_FIELDS, *inspect.signature(DataLoader).parameters])
    size = loader.get("batch_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name}.batch_size is {size!r}: expected a number of images, 1 or more.")


def _sources(dataset: Any, name: str) -> Iterator[Source]:
    """The datasets that are no wrappers, where their type is a class."""
    for place, config in datasets_of(dataset, name):
        if not is_wrapper(config) and isinstance(cls := known_class(place, config, DATASETS), type):
            yield Source(place, config, cls)


def _check_zero_label(source: Source) -> None:
    zero_is_void = source.cfg.get("reduce_zero_label")  # what a class sets itself is not known from outside
    loads = source.transform("LoadAnnotations").get("reduce_zero_label")
    if source.reader == SEGMENTATION_DATASET and None not in (loads, zero_is_void) and loads != zero_is_void:
        raise ValueError(
            f"{source.name}: reduce_zero_label is {zero_is_void}, but {loads} in its pipeline's LoadAnnotations. Leave "
            "it out there, or set both."
        )


def _read_choices(cfg: Config) -> dict[str, str]:
    given = cfg.get("data_checks") or {}
    for key, value in given.items():
        if value not in CHOICES.get(key, ()):
            fields = "; ".join(f"{name}: {', '.join(values)}" for name, values in CHOICES.items())
            raise ValueError(f"data_checks.{key}={value!r}: expected {fields}.")
    if given.get("bad_images") == "skip":  # one that is not found is not skipped
        given = dict(images="all") | given
    return {key: given.get(key, values[0]) for key, values in CHOICES.items()}


def _is_scored(cfg: Config, loader: str) -> bool:
    """Whether a run compares with annotations; a test for a server only writes what it finds."""
    found = evaluators(cfg, loader)
    return not found or not all(evaluator.get("format_only") for evaluator in found)


def _find_pictures(source: Source, checks: dict[str, str], annotated: bool) -> tuple[list[Picture], list[str]]:
    """The images of a dataset whose form is known, and warnings for the user."""
    root = source.cfg.get("data_root")
    if source.cfg.get("backend_args") or "://" in (root or ""):
        return [], []  # Remote storage: looking up every file would take longer than finding out.
    if root and not Path(root).is_dir():
        raise FileNotFoundError(
            f"{source.name}.data_root: no directory {root!r}. Set it with --cfg-options {source.name}.data_root=DIR."
        )
    prefix = source.cfg.get("data_prefix") or {}
    if source.reader == COCO_DATASET:
        folder = _folder(source, "img", prefix.get("img"))
        file = source.path(source.argument("ann_file"))
        masks = bool(source.transform("LoadAnnotations").get("with_mask"))
        content = check_coco_file(file, f"{source.name}.ann_file", masks, annotated)
        check_categories(content, source.classes, str(file), ignore_others=checks["other_classes"] == "ignore")
        trains = not source.argument("test_mode")
        leaves_out_empty = (source.cfg.get("filter_cfg") or {}).get("filter_empty_gt")
        if leaves_out_empty and trains and not content["annotations"]:
            raise ValueError(
                f"{source.name}.ann_file: {str(file)!r} has no annotations, and filter_cfg.filter_empty_gt leaves out "
                "images without any: none is left."
            )
        notices = check_boxes(content, f"{source.name}.ann_file: {str(file)!r}") if trains else []
        pictures = [Picture(folder / i["file_name"], (i["width"], i["height"])) for i in content["images"]]
        return pictures, notices
    if source.reader == SEGMENTATION_DATASET:
        images = _folder(source, "img_path", prefix.get("img_path"))
        labels = _folder(source, "seg_map_path", prefix["seg_map_path"]) if prefix.get("seg_map_path") else None
        return _segmentation_pictures(source, images, labels), []
    return [], []


def _folder(source: Source, key: str, value: str | None) -> Path:
    folder = source.path(value)
    if not folder.is_dir():
        raise FileNotFoundError(f"{source.name}.data_prefix.{key}: no directory {str(folder)!r}.")
    return folder


def _segmentation_pictures(source: Source, images: Path, labels: Path | None) -> list[Picture]:
    suffix, label_suffix = source.argument("img_suffix"), source.argument("seg_map_suffix")
    listed = source.argument("ann_file")
    if listed:
        file = source.path(listed)
        if not file.is_file():
            raise FileNotFoundError(f"{source.name}.ann_file: no file {str(file)!r}.")
        names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    else:
        names = [str(path.relative_to(images))[: -len(suffix)] for path in sorted(images.rglob(f"*{suffix}"))]
    if not names:
        raise ValueError(f"{source.name}: {str(images)!r} holds no *{suffix} file (img_suffix).")
    return [
        Picture(images / (name + suffix), label=labels / (name + label_suffix) if labels else None) for name in names
    ]


def _expected_channels(cfg: Config, source: Source) -> int:
    color_type = source.transform("LoadImageFromFile").get("color_type", "color")
    expected = len((cfg.model.get("data_preprocessor") or {}).get("mean") or (0, 0, 0))
    loaded = CHANNELS.get(color_type)
    if loaded is not None and loaded != expected:
        raise ValueError(
            f"{source.name}: LoadImageFromFile(color_type={color_type!r}) gives {loaded} channels, the model's "
            f"data_preprocessor takes {expected}."
        )
    return 0 if loaded is not None else expected


def _report_bad_images(source: Source, bad: dict[Path, str], total: int, checks: dict[str, str]) -> list[str]:
    if not bad:
        return []
    faults = _listing(f"{path}: {fault}" for path, fault in bad.items())
    message = f"{source.name}: {len(bad)} of {total} images can't be used. {faults}."
    if checks["bad_images"] == "stop":
        raise ValueError(
            f"{message} Repair or remove them, or go on without: --cfg-options data_checks.bad_images=skip."
        )
    if len(bad) == total:
        raise ValueError(f"{message} None is left to skip to.")
    missed = source.reader == COCO_DATASET and not source.name.startswith("train_")
    return [f"{message} They are skipped" + ("; mAP counts what is on them as missed." if missed else ".")]


def _leave_out(source: Source, bad: dict[Path, str]) -> None:
    wrapped = dict(source.cfg)
    source.cfg.clear()
    source.cfg.update(type="mmengine.without_images", dataset=wrapped, paths=[str(path) for path in bad])


def _check_labels(source: Source, pictures: list[Picture], checks: dict[str, str]) -> None:
    if not any(picture.label for picture in pictures):
        return
    # With a subset of the classes, MMSegmentation maps the values of all classes of the dataset.
    count = len(source.cls.METAINFO.get("classes") or source.classes)
    zero_is_void = source.argument("reduce_zero_label")
    ignored = source.argument("ignore_index")
    allowed = [*range(count + 1 if zero_is_void else count), ignored]
    faults = list(find_bad_labels(pictures, checks["images"], allowed))
    if faults:
        meaning = f"0 (void), 1 to {count}" if zero_is_void else f"0 to {count - 1}"
        raise ValueError(
            f"{source.name}: {len(faults)} label maps don't fit. Expected {meaning} and {ignored} (ignored), for "
            f"{count} classes with reduce_zero_label={zero_is_void}. {_listing(faults)}. Check the classes and "
            "reduce_zero_label, or repair the files."
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
        heads = roi_head.get(name) or model.get(name) or []
        for head in heads if isinstance(heads, (list, tuple)) else [heads]:
            found = head.get("num_classes")
            # Heads with several losses, and those of one stage that match texts, count other things than classes.
            several_losses = isinstance(head.get("loss_decode"), list)
            of_texts = name == "bbox_head" and not roi_head and found is not None and found > count
            if found in (None, count) or head.get("class_agnostic") or several_losses or of_texts:
                continue
            names = _listing(source.classes)
            raise ValueError(
                f"{name}.num_classes is {found}, but {source.name} has {count} classes ({names}). "
                f"Set num_classes={count} in every head, or the dataset's metainfo.classes."
            )


def _check_evaluator(cfg: Config, loader: str) -> None:
    name = loader.replace("dataloader", "evaluator")
    found = [s for s in _sources(cfg[loader].get("dataset"), f"{loader}.dataset") if s.reader == COCO_DATASET]
    for evaluator in evaluators(cfg, loader):
        file = evaluator.get("ann_file")
        if file and "://" not in file and not Path(file).is_file():
            raise FileNotFoundError(
                f"{name}.ann_file: no file {file!r}. Set it with --cfg-options {name}.ann_file=FILE."
            )
        if file and "://" not in file and str(evaluator.get("type")).endswith("CocoMetric") and len(found) == 1:
            _check_same_images(Path(file), f"{name}.ann_file", found[0], _is_scored(cfg, loader))


def _check_same_images(file: Path, name: str, source: Source, annotated: bool) -> None:
    """An evaluator that doesn't know the images of its dataset gives a wrong metric, or fails after an epoch."""
    own = source.path(source.argument("ann_file"))
    if not own.is_file() or own.samefile(file):  # in remote storage, or the usual case
        return
    known, tested = (
        {image["id"] for image in check_coco_file(path, where, masks=False, annotated=annotated)["images"]}
        for path, where in ((file, name), (own, f"{source.name}.ann_file"))
    )
    if not tested <= known:
        raise ValueError(
            f"{name}={str(file)!r} lacks {len(tested - known)} of the {len(tested)} images of "
            f"{source.name}.ann_file={str(own)!r}, such as id {min(tested - known, key=str)!r}: the metric would be "
            "wrong. Set both to the same file."
        )


def _listing(sentences: Any) -> str:
    sentences = list(sentences)
    more = f"; and {len(sentences) - LISTED} more" if len(sentences) > LISTED else ""
    return "; ".join(sentences[:LISTED]) + more
