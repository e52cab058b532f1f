"""The datasets of a config that read images, and what their classes make of their fields."""

import copy
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS

from nat_dense.mm.errors import at_least, describe
from nat_dense.mm.fields import OF_ANY_OBJECT, fields_of, known_class, type_name
from nat_dense.mm.pipelines import datasets_of, is_wrapper

COCO_DATASET = "mmdet.datasets.coco.CocoDataset"
SEGMENTATION_DATASET = "mmseg.datasets.basesegdataset.BaseSegDataset"


@dataclass(frozen=True)
class Source:
    """One dataset of a config.

    Attributes:
        name: where it stands in the config, such as "train_dataloader.dataset".
        cfg: its config.
        cls: its class.
    """

    name: str
    cfg: Any
    cls: Any

    @property
    def reader(self) -> str:
        """Full name of the class that says how annotations are read; a subclass with its own format is named itself."""
        own = {"load_data_list", "parse_data_info"}
        base = next((base for base in self.cls.__mro__ if own & vars(base).keys()), self.cls)
        return f"{base.__module__}.{base.__name__}"

    @cached_property
    def dataset(self) -> Any:
        """The dataset itself, without its pipeline and, where its class can be built so, before it has read anything.

        Its class may set any field: only the dataset knows. Some look for their files at the end of their constructors;
        failing there is left to the checks, which say more.

        Raises:
            FileNotFoundError: it lacks a file that its class needs to be built.
            ValueError: it can't be built for another reason.
        """
        own = {key: value for key, value in self.cfg.items() if key not in OF_ANY_OBJECT}
        known = fields_of(self.cls)
        changed: dict[str, Any] = dict(pipeline=[]) if "pipeline" in own else {}
        if known is None or "lazy_init" in known:
            changed["lazy_init"] = True
        for fields in (own | changed, own):  # its constructor may set these itself, or need its pipeline
            dataset = self.cls.__new__(self.cls)
            try:
                with at_least(logging.ERROR), DATASETS.switch_scope_and_registry(self.cfg.get("_scope_")):
                    dataset.__init__(**copy.deepcopy(fields))
                return dataset
            except Exception as error:  # constructors raise what they like
                if hasattr(dataset, "pipeline"):  # which MMEngine's constructor sets last
                    return dataset
                failure = error
        kind = FileNotFoundError if isinstance(failure, FileNotFoundError) else ValueError
        raise kind(f"{self.name}: {describe(failure)}") from failure

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty where only the annotations know them."""
        if self.reader in (COCO_DATASET, SEGMENTATION_DATASET):
            given = self.dataset.metainfo.get("classes")
        else:  # of whose constructors nothing is known
            named = (self.cfg.get("metainfo") or {}).get("classes")
            given = named or getattr(self.cls, "METAINFO", {}).get("classes")
            if isinstance(given, str) and os.path.isfile(given):
                given = Path(given).read_text(encoding="utf-8").splitlines()
        if isinstance(given, str):  # MMEngine also takes a file with one class per line; any other text stays as it is.
            raise ValueError(
                f"{self.name}.metainfo.classes is the text {given!r}: expected several names, or one and a comma, "
                f"({given!r},), or a file that lists them."
            )
        return tuple(given or ())

    def transforms(self, name: str) -> list[dict]:
        """The configs of the transforms of this type in the pipeline, except those inside others."""
        return [t for t in self.cfg.get("pipeline") or [] if isinstance(t, dict) and type_name(t) == name]

    def transform(self, name: str) -> dict:
        """The first of them, or an empty one."""
        return next(iter(self.transforms(name)), {})


def sources_of(dataset: Any, name: str) -> Iterator[Source]:
    """The datasets of a config that are not wrappers, if their type is a class; arguments as for `datasets_of`."""
    for place, config in datasets_of(dataset, name):
        if not is_wrapper(config) and isinstance(cls := known_class(place, config, DATASETS), type):
            yield Source(place, config, cls)
