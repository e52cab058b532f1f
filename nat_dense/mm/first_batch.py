"""Reports what fails in the first batch as a user's mistake, and validates one batch before training.

MMEngine builds validation before training, but first runs it after an epoch: a wrong field of
`model.test_cfg`, images of several sizes in one batch or a `meta_keys` that lacks something costs that epoch.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop, autocast
from mmengine.structures import BaseDataElement
from torch.utils.data import DataLoader, IterableDataset

from nat_dense.mm.errors import describe, place_of
from nat_dense.mm.evaluator_checks import COCO, metric_of
from nat_dense.mm.fields import is_foreign

BEFORE = {"before_val", "before_val_epoch", "before_val_iter"}
"""Stages in which the user's hooks may prepare something that a prediction needs."""


class FirstBatchError(ValueError):
    """The first batch fails; the message says why, and where in the code."""


class FirstBatch(Hook):
    """Notes that a batch has been trained or tested."""

    priority = "LOWEST"  # when all others have done what they do after it
    passed = False

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        """Called by the Runner."""
        self.passed = True

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Called by the Runner."""
        if not self.passed and type(runner.test_loop) is TestLoop:
            _check_masks(runner.test_loop.evaluator.metrics, outputs or [])
        self.passed = True


@contextmanager
def first_batch_errors(runner: Any, done: str) -> Iterator[None]:
    """Reports what goes wrong inside the block before a batch is done: nearly always, the config or the data is wrong.

    Args:
        runner: whose `train` or `test` is called inside the block.
        done: what it does with batches, such as "trained".

    Raises:
        FirstBatchError: the block raised any exception before that. Later ones pass.
    """
    batch = FirstBatch()
    runner.register_hook(batch)
    try:
        yield
    except FirstBatchError:
        raise
    except Exception as error:
        if batch.passed or not _calls_hooks(runner):
            raise
        raise FirstBatchError(f"before the first batch was {done}: {_reason(error)}") from error


def _calls_hooks(runner: Any) -> bool:
    """Whether a finished batch would have been noticed; the user's own loops may call no hooks."""
    loops = (runner._train_loop, runner._test_loop)  # the properties would build them
    return all(loop is None or isinstance(loop, dict) or not is_foreign(type(loop)) for loop in loops)


def _reason(error: Exception) -> str:
    place = place_of(error)
    return describe(error) + (f" [{place}]" if place else "")


class TryValidation(Hook):
    """Validates one batch before training, and forgets the result.

    Training and validation then go as they would without this hook: random states are restored, the batch is loaded in
    a separate process if the validation's are, and only metrics that keep nothing but their results are run.
    Validation other than MMEngine's own is not tried, nor one that the user's hooks prepare.
    """

    priority = "LOWEST"  # when all else is ready to train

    def before_train(self, runner: Any) -> None:
        """Tries the first batch.

        Raises:
            FirstBatchError: loading it, predicting on it or comparing the result fails.
        """
        if not _is_usual(runner):
            return
        try:
            with _unchanged_randomness():
                _validate(runner.model, runner.val_loop)
        except Exception as error:
            raise FirstBatchError(
                f"the first validation batch, tried before training, fails: {_reason(error)} (--cfg-options "
                "data_checks.validation=none skips this trial)"
            ) from error


def _check_masks(metrics: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Otherwise, missing masks show only when the scores of all images are computed."""
    wanted = [metric for metric in metrics if metric_of(type(metric)) is COCO and "segm" in metric.metrics]
    predictions = [output for output in outputs if isinstance(output, BaseDataElement)]
    found = [output.pred_instances for output in predictions if "pred_instances" in output]
    if wanted and found and not any("masks" in instances for instances in found):
        raise ValueError("the evaluator's metric 'segm' compares masks, but this model predicts none; set it to 'bbox'")


def _only_collects(metric: Any) -> bool:
    """Whether it writes no files for the images that it is given."""
    return not getattr(metric, "output_dir", None)


def _is_usual(runner: Any) -> bool:
    """Whether there will be a validation, and it takes its batches by number and predicts without preparation."""
    loop, training = runner.val_loop, runner.train_loop
    if type(loop) is not ValLoop:
        return False
    last = training.max_epochs if isinstance(training, EpochBasedTrainLoop) else training.max_iters
    hooks = [hook for hook in runner.hooks if is_foreign(type(hook))]
    loader = loop.dataloader
    return (
        getattr(training, "val_begin", 0) <= last
        and not any(BEFORE.intersection(hook.get_triggered_stages()) for hook in hooks)
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.sampler) is DefaultSampler  # torch's own, where batches are made by another sampler
    )


@contextmanager
def _unchanged_randomness() -> Iterator[None]:
    """Restores the random states of Python, NumPy and PyTorch."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def _validate(model: Any, loop: ValLoop) -> None:
    loader = loop.dataloader
    batch = next(
        iter(
            DataLoader(
                loader.dataset,
                batch_sampler=[list(range(min(loader.batch_size, len(loader.dataset))))],
                # Files that a dataset opens must not be open when the workers of the validation start.
                num_workers=min(loader.num_workers, 1),
                collate_fn=loader.collate_fn,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
            )
        )
    )
    trains = model.training
    model.eval()
    with torch.no_grad(), autocast(enabled=loop.fp16):
        outputs = model.val_step(batch)
    model.train(trains)
    # A model may add its loss, which the loop takes out.
    outputs = [o for o in outputs if not (isinstance(o, BaseDataElement) and o.keys() == ["loss"])]
    metrics = [metric for metric in loop.evaluator.metrics if metric_of(type(metric)) and _only_collects(metric)]
    _check_masks(metrics, outputs)
    Evaluator(metrics).process(outputs, batch)
    for metric in metrics:
        metric.results.clear()
