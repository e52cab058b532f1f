"""Finds what is wrong with a config's evaluators before they compute anything, which is after an epoch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, LOOPS, METRICS
from mmengine.runner import ValLoop

from nat_dense.mm.coco_file import check_coco_file
from nat_dense.mm.config import evaluators
from nat_dense.mm.errors import did_you_mean
from nat_dense.mm.fields import as_list, check_node, class_of, default_loop, dicts_in, is_foreign, type_name
from nat_dense.mm.sources import COCO_DATASET, Source, sources_of

COCO_SCORES = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


@dataclass(frozen=True)
class Metric:
    """What an evaluator computes.

    Attributes:
        field: the field that chooses.
        default: the choice if the field is left out.
        scores: the choices and what each of them adds to the result; None if that depends on other fields.
        more: fields that add or remove scores.
    """

    field: str
    default: str
    scores: dict[str, tuple[str, ...] | None]
    more: tuple[str, ...] = ()


COCO = Metric(
    field="metric",
    default="bbox",
    scores={
        "bbox": tuple(f"bbox_{score}" for score in COCO_SCORES),
        "segm": tuple(f"segm_{score}" for score in COCO_SCORES),
        "proposal": None,
        "proposal_fast": None,
    },
    more=("classwise", "metric_items"),
)
IOU = Metric(
    field="iou_metrics",
    default="mIoU",
    scores={
        "mIoU": ("aAcc", "mIoU", "mAcc"),
        "mDice": ("aAcc", "mDice", "mAcc"),
        "mFscore": ("aAcc", "mFscore", "mPrecision", "mRecall"),
    },
)
KNOWN = {
    "mmdet.evaluation.metrics.coco_metric.CocoMetric": COCO,
    "mmdet.evaluation.metrics.faster_coco_metric.FasterCocoMetric": COCO,
    "mmseg.evaluation.metrics.iou_metric.IoUMetric": IOU,
}
"""The evaluators whose scores are known; classes derived from them may compute others."""


def metric_of(cls: Any) -> Metric | None:
    """What an evaluator of exactly this class computes, where that is known; it then keeps nothing but `results`."""
    return KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")


def is_scored(cfg: Config, loader: str) -> bool:
    """Whether a run compares with annotations; a test for a server only writes what it finds."""
    found = evaluators(cfg, loader)
    return not found or not all(evaluator.get("format_only") for evaluator in found)


def _is_of_coco(evaluator: dict) -> bool:
    return type_name(evaluator).endswith("CocoMetric")


def coco_files(cfg: Config, loader: str) -> set[Path]:
    """The annotation files that COCO's metrics of a dataloader read themselves."""
    coco = filter(_is_of_coco, evaluators(cfg, loader))
    return {Path(file).resolve() for evaluator in coco if (file := evaluator.get("ann_file")) and "://" not in file}


def check_evaluators(cfg: Config, loader: str) -> list[str]:
    """Checks the evaluators that go with a dataloader, and that what chooses the best checkpoint is among their scores.

    Args:
        cfg: the config; its `default_scope` must be active.
        loader: "val_dataloader" or "test_dataloader".

    Returns:
        Notes for the user on an evaluator that has its dataset's images under other names.

    Raises:
        FileNotFoundError: an annotation file is missing.
        ValueError: a type, a field or a metric is misspelt, or the dataset has images that the evaluator doesn't know.
    """
    name = loader.replace("dataloader", "evaluator")
    found = [s for s in sources_of(cfg[loader].get("dataset"), f"{loader}.dataset") if s.reader == COCO_DATASET]
    scores: list[str] | None = []
    notes: list[str] = []
    for evaluator in evaluators(cfg, loader):
        computed = _check_metrics(name, evaluator)
        scores = None if scores is None or computed is None else scores + computed
        file = evaluator.get("ann_file")
        if not file or "://" in file:
            continue
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"{name}.ann_file: no file {file!r}. Set it with --cfg-options {name}.ann_file=FILE."
            )
        if _is_of_coco(evaluator) and len(found) == 1:
            notes += _check_same_images(Path(file), f"{name}.ann_file", found[0], is_scored(cfg, loader))
    if loader == "val_dataloader" and scores and _names_scores_plainly(cfg):
        _check_best(cfg, scores)
    return notes


def _check_metrics(name: str, evaluator: dict) -> list[str] | None:
    """Checks what an evaluator is to compute; returns the names of its scores where they are known."""
    cls = check_node(name, evaluator, METRICS)
    metric = metric_of(cls)
    if metric is None:
        return None
    chosen = as_list(evaluator.get(metric.field) or metric.default)
    for choice in chosen:
        if choice not in metric.scores:
            hint = did_you_mean(str(choice), metric.scores)
            raise ValueError(
                f"{name}.{metric.field}: there is no metric {choice!r}.{hint} There are: {', '.join(metric.scores)}."
            )
    if metric is COCO and evaluator.get("format_only") and evaluator.get("outfile_prefix") is None:
        raise ValueError(f"{name}.format_only: set {name}.outfile_prefix too, which says where results are written.")
    groups = [metric.scores[choice] for choice in chosen]
    if None in groups or any(evaluator.get(field) for field in metric.more):
        return None
    prefix = evaluator.get("prefix") or cls.default_prefix
    return [f"{prefix}/{score}" if prefix else score for group in groups for score in group or ()]


def _names_scores_plainly(cfg: Config) -> bool:
    """Whether validation gives the evaluators' scores under their own names; other loops and evaluators prefix them."""
    loop, evaluator = cfg.get("val_cfg") or {}, cfg.get("val_evaluator")
    kind = evaluator.get("type", "Evaluator") if isinstance(evaluator, dict) and "metrics" in evaluator else "Evaluator"
    is_usual = class_of(default_loop("val_cfg", loop), LOOPS) is ValLoop
    format_only = any(evaluator.get("format_only") for evaluator in evaluators(cfg, "val_dataloader"))
    return is_usual and kind in ("Evaluator", Evaluator) and not format_only and not _adds_scores(cfg)


def _adds_scores(cfg: Config) -> bool:
    """Whether a hook of the user sees the scores before MMEngine's hooks do, and may add some."""
    classes = (class_of(node, HOOKS) for _, node in _hooks(cfg))
    return any(
        is_foreign(cls) and getattr(cls, "after_val_epoch", None) is not Hook.after_val_epoch for cls in classes if cls
    )


def _hooks(cfg: Config) -> Iterator[tuple[str, dict]]:
    for place in ("default_hooks", "custom_hooks"):
        yield from dicts_in(cfg.get(place), place)


def _check_best(cfg: Config, scores: list[str]) -> None:
    """MMEngine looks the score up after the first validation, and fails or goes on if there is none of this name."""
    for name, hook in _hooks(cfg):
        field = {"CheckpointHook": "save_best", "EarlyStoppingHook": "monitor"}.get(type_name(hook), "")
        for score in as_list(hook.get(field)):
            if score not in scores and not (score == "auto" and field == "save_best"):
                hint, auto = did_you_mean(score, scores), "; 'auto' takes the first" if field == "save_best" else ""
                raise ValueError(
                    f"{name}.{field}: validation gives no {score!r}.{hint} It gives: {', '.join(scores)}{auto}."
                )


def _check_same_images(file: Path, name: str, source: Source, annotated: bool) -> list[str]:
    """An evaluator that doesn't know the images of its dataset gives a wrong metric, or fails after an epoch."""
    own = Path(source.dataset.ann_file)
    if not own.is_file() or own.samefile(file) or source.cfg.get("indices"):  # in remote storage, or the usual case
        return []
    known, tested = (
        {
            image["id"]: (Path(image["file_name"]).name, image["width"], image["height"])
            for image in check_coco_file(path, where, masks=False, annotated=annotated)["images"]
        }
        for path, where in ((file, name), (own, f"{source.name}.ann_file"))
    )
    if lacking := sorted(tested.keys() - known.keys(), key=str):
        raise ValueError(
            f"{name}={str(file)!r} lacks {len(lacking)} of the {len(tested)} images of "
            f"{source.name}.ann_file={str(own)!r}, such as id {lacking[0]!r}: the metric would be wrong. Set both to "
            "the same file."
        )
    others = sorted((key for key in tested if tested[key][0] != known[key][0]), key=str)
    if not others:
        return []
    first = others[0]
    found = (
        f"{name}={str(file)!r} has different images than {source.name}.ann_file={str(own)!r}: id {first!r} is "
        f"{known[first][0]!r} there and {tested[first][0]!r} here"
    )
    if any(tested[key][1:] != known[key][1:] for key in others):
        raise ValueError(f"{found}, of another size: the metric would be wrong. Set both to the same file.")
    return [f"{found}; the metric will be wrong. Ignore this if both contain the same images."]
