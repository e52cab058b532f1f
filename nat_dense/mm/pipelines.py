"""The datasets of a config, including those inside wrappers, and the transforms of their pipelines."""

import copy
from collections.abc import Iterator
from typing import Any

from mmengine.registry import DATASETS, TRANSFORMS

from nat_dense.mm.errors import describe
from nat_dense.mm.fields import check_node

NESTING = {
    "mmcv.transforms.processing.MultiScaleFlipAug": "transforms",
    "mmcv.transforms.processing.TestTimeAug": "transforms",
    "mmcv.transforms.wrappers.Compose": "transforms",
    "mmcv.transforms.wrappers.KeyMapper": "transforms",
    "mmcv.transforms.wrappers.RandomApply": "transforms",
    "mmcv.transforms.wrappers.RandomChoice": "transforms",
    "mmdet.datasets.transforms.augment_wrappers.AutoAugment": "policies",
    "mmdet.datasets.transforms.augment_wrappers.RandAugment": "aug_space",
    "mmdet.datasets.transforms.wrappers.ProposalBroadcaster": "transforms",
}
"""Transforms that hold others of the registry, and in which field. (Others hold those of another library.)"""


def datasets_of(dataset: Any, name: str) -> Iterator[tuple[str, dict]]:
    """A dataset's config and those inside it, if it is a wrapper such as RepeatDataset or ConcatDataset.

    Args:
        dataset: the config.
        name: where it stands in the whole config.

    Returns:
        Of each, the place in the whole config and the config; what is inside comes before it.
    """
    if not isinstance(dataset, dict):
        return
    yield from datasets_of(dataset.get("dataset"), f"{name}.dataset")
    for i, part in enumerate(dataset.get("datasets") or []):
        yield from datasets_of(part, f"{name}.datasets[{i}]")
    yield name, dataset


def is_wrapper(dataset: dict) -> bool:
    """Whether the config of a dataset has others inside."""
    return "dataset" in dataset or "datasets" in dataset


def check_datasets(dataset: Any, name: str) -> None:
    """Checks the fields and pipelines of a dataset, and of those inside it; arguments as for `datasets_of`.

    Raises:
        ValueError: there is no such dataset, it has no such field, or as in `check_transforms`.
    """
    for place, config in datasets_of(dataset, name):
        check_node(place, config, DATASETS)
        if isinstance(config.get("pipeline"), dict):
            raise ValueError(f"{place}.pipeline is one transform, {config['pipeline']!r}: expected a list of them.")
        if config.get("pipeline") is not None:
            check_transforms(config["pipeline"], f"{place}.pipeline")


def check_transforms(transforms: Any, name: str) -> None:
    """Checks that transforms exist and have the fields that they are given, including those inside others.

    Args:
        transforms: the config of one or a function, or a list of them or of such lists, as in a choice.
        name: where it stands in the config, for messages.

    Raises:
        ValueError: there is no such transform, it has no such field, its fields don't fit, or something else stands in
            its place.
    """
    if isinstance(transforms, (list, tuple)):
        for i, part in enumerate(transforms):
            check_transforms(part, f"{name}[{i}]")
    elif isinstance(transforms, dict):
        cls = check_node(name, transforms, TRANSFORMS)
        bases = (f"{base.__module__}.{base.__name__}" for base in getattr(cls, "__mro__", ()))
        field = next((NESTING[base] for base in bases if base in NESTING), None)
        with TRANSFORMS.switch_scope_and_registry(transforms.get("_scope_")):
            if field in transforms:
                check_transforms(transforms[field], f"{name}.{field}")
            _build(transforms, name)
    elif not callable(transforms):
        raise ValueError(f"{name} is {transforms!r}: expected the config of a transform, or a list of them.")


def _build(transform: dict, name: str) -> None:
    """Builds a transform, since many hand fields on to others that they build, and fit values to each other."""
    try:
        TRANSFORMS.build(copy.deepcopy(transform))
    except Exception as error:  # constructors raise what they like
        raise ValueError(f"{name}: {describe(error)}") from error
