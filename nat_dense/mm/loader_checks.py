"""Checks before training that a config's dataloaders end, and that they agree with each other and with the model."""

import inspect
from typing import Any

from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.registry import DATA_SAMPLERS, FUNCTIONS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.utils.data import DataLoader

from nat_dense.listing import listing
from nat_dense.mm.fields import as_list, check_fields, check_node, class_of, default_loop, is_foreign, known_class
from nat_dense.mm.sources import SEGMENTATION_DATASET, Source

LOADER_FIELDS = ("num_batch_per_epoch", "disable_subprocess_warning")
"""What MMEngine's Runner reads from a dataloader besides the arguments of torch's DataLoader."""


def check_loader(cfg: Config, name: str) -> None:
    """Checks the fields of a dataloader, and that its loop comes to an end.

    Args:
        cfg: the config; its `default_scope` must be active.
        name: such as "train_dataloader".

    Raises:
        ValueError: a field is misspelt or not a number, or the sampler never ends where the loop waits for its end.
    """
    loader = cfg[name]
    check_fields(name, "DataLoader", loader, [*LOADER_FIELDS, *inspect.signature(DataLoader).parameters])
    size = loader.get("batch_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name}.batch_size is {size!r}: expected a number of images, 1 or more.")
    workers = loader.get("num_workers", 0)
    if not isinstance(workers, int) or workers < 0:
        raise ValueError(f"{name}.num_workers is {workers!r}: expected a number of processes, or 0 for none.")
    for field in ("sampler", "batch_sampler"):
        if isinstance(loader.get(field), dict):
            check_node(f"{name}.{field}", loader[field], DATA_SAMPLERS)
    if isinstance(loader.get("collate_fn"), dict):
        known_class(f"{name}.collate_fn", loader["collate_fn"], FUNCTIONS)
    place = name.replace("dataloader", "cfg")
    loop = class_of(default_loop(place, cfg.get(place) or {}), LOOPS)
    sampler = loader.get("sampler")
    never_ends = isinstance(sampler, dict) and class_of(sampler, DATA_SAMPLERS) is InfiniteSampler
    if isinstance(batches := loader.get("batch_sampler"), dict) and is_foreign(class_of(batches, DATA_SAMPLERS)):
        never_ends = False  # it may end where its sampler doesn't
    if never_ends and loop in (EpochBasedTrainLoop, ValLoop, TestLoop):
        raise ValueError(
            f"{name}.sampler is an InfiniteSampler, but {place} ({loop.__name__}) runs until its sampler ends. Set "
            f"{name}.sampler.type=DefaultSampler."
        )


def notes_of_pair(model: dict, training: Source, other: Source) -> list[str]:
    """Reports a dataset that reads its labels differently from the training's.

    Args:
        model: the model's config; a model that matches texts has no order of classes.
        training: a dataset that is trained on.
        other: one that is validated or tested on.

    Raises:
        ValueError: they have the same classes in another order, so predictions would be assigned to the wrong classes.
    """
    ours, theirs = training.classes, other.classes
    if ours != theirs and sorted(ours) == sorted(theirs) and not model.get("language_model"):
        raise ValueError(
            f"{other.name} has the classes of {training.name} in another order ({listing(theirs)} instead of "
            f"{listing(ours)}): predictions would be assigned to the wrong classes. Give both the same order."
        )
    if not training.reader == other.reader == SEGMENTATION_DATASET:
        return []
    reduced = [source.dataset.reduce_zero_label for source in (training, other)]
    if reduced[0] == reduced[1]:
        return []
    return [
        f"reduce_zero_label is {reduced[0]} in {training.name} and {reduced[1]} in {other.name}: unless their label "
        "maps differ in the same way, one of them reads every class as its neighbour."
    ]


def notes_of_preprocessing(model: dict, source: Source) -> list[str]:
    """Reports what a dataset's pipeline and the model's preprocessor both do."""
    if not source.transforms("Normalize") or not (model.get("data_preprocessor") or {}).get("mean"):
        return []
    return [
        f"{source.name}: its pipeline has Normalize, and model.data_preprocessor normalises again; remove one of them."
    ]


def notes_of_padding(model: dict, source: Source) -> list[str]:
    """Reports that a model trains on what its preprocessor adds to smaller label maps."""
    preprocessor = model.get("data_preprocessor") or {}
    padding, ignored = preprocessor.get("seg_pad_val", 255), _ignored_labels(model)
    if source.reader != SEGMENTATION_DATASET or not preprocessor.get("size") or not ignored or padding in ignored:
        return []
    return [
        f"model.data_preprocessor.seg_pad_val: a padding value of {padding} is a class for the heads (ignore_index "
        f"{', '.join(map(str, ignored))}), so they would train on padding."
    ]


def _ignored_labels(model: dict) -> list[Any]:
    return [head.get("ignore_index", 255) for head in as_list(model.get("decode_head"))]


def notes_of_prefix(source: Source, read: set[str]) -> list[str]:
    """Reports folders in `data_prefix` that nothing reads; `read` are those that the dataset reads."""
    if is_foreign(source.cls):
        return []
    parameter = inspect.signature(source.cls.__init__).parameters.get("data_prefix")
    default = parameter.default if parameter and isinstance(parameter.default, dict) else {}
    known = read | set(default)
    return [
        f"nothing reads {source.name}.data_prefix.{key}; the dataset reads {', '.join(sorted(read))}."
        for key in source.cfg.get("data_prefix") or {}
        if key not in known
    ]
