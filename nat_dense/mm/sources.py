"""The datasets of a config that read images, and what their classes make of their fields."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS

from nat_dense.mm.fields import known_class, type_name
from nat_dense.mm.pipelines import datasets_of, is_wrapper

COCO_DATASET = "mmdet.datasets.coco.CocoDataset"
SEGMENTATION_DATASET = "mmseg.datasets.basesegdataset.BaseSegDataset"


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
            if not _is_file(given):
                raise ValueError(
                    f"{self.name}.metainfo.classes is the text {given!r}: expected several names, or one and a comma, "
                    f"({given!r},), or a file that lists them."
                )
            given = Path(given).read_text(encoding="utf-8").splitlines()
        return tuple(given or self.cls.METAINFO.get("classes") or ())

    def argument(self, name: str) -> Any:
        """A field of the dataset: the config's, else the default of its class."""
        parameters = [inspect.signature(base.__init__).parameters.get(name) for base in self.cls.__mro__]
        defaults = [p.default for p in parameters if p is not None and p.default is not p.empty]
        return self.cfg.get(name, defaults[0] if defaults else None)

    def path(self, value: str | None) -> Path:
        return Path(self.cfg.get("data_root") or "", value or "")

    def transforms(self, name: str) -> list[dict]:
        """The configs of the transforms of this type in the pipeline, but for those inside of others."""
        return [t for t in self.cfg.get("pipeline") or [] if isinstance(t, dict) and type_name(t) == name]

    def transform(self, name: str) -> dict:
        """The first of them, or an empty one."""
        return next(iter(self.transforms(name)), {})


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a name that is too long
        return False


def sources_of(dataset: Any, name: str) -> Iterator[Source]:
    """The datasets of a config that are no wrappers, where their type is a class; arguments as for `datasets_of`."""
    for place, config in datasets_of(dataset, name):
        if not is_wrapper(config) and isinstance(cls := known_class(place, config, DATASETS), type):
            yield Source(place, config, cls)
