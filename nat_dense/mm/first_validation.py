"""One batch is validated before training, so that what would fail after the first epoch fails before it.

MMEngine builds validation before training, but first runs it when an epoch has been trained: a wrong field of
`model.test_cfg`, images of several sizes in one batch or a `meta_keys` that lacks something costs that epoch.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook

from nat_dense.mm.errors import describe


class FirstValidationError(ValueError):
    """The first batch can't be validated; the message says why."""


class TryValidation(Hook):
    """Validates one batch before training, and forgets the result.

    The random state is left as it was, so that training goes as it would without this hook.
    """

    priority = "LOWEST"  # when all else is ready to train

    def before_train(self, runner: Any) -> None:
        """Tries the first batch.

        Raises:
            FirstValidationError: it can't be loaded, predicted on or compared with.
        """
        if runner.val_loop is None:
            return
        try:
            with _unchanged_randomness():
                _validate_first_batch(runner)
        except Exception as error:
            raise FirstValidationError(
                f"the first batch of validation, tried before training, fails: {describe(error)} (--cfg-options "
                "data_checks.validation=none trains without trying)"
            ) from error


@contextmanager
def _unchanged_randomness() -> Iterator[None]:
    """Restores the random states of Python, NumPy and PyTorch."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def _validate_first_batch(runner: Any) -> None:
    loop, model = runner.val_loop, runner.model
    indices = next(iter(getattr(loop.dataloader, "batch_sampler", None) or ()), ())
    if not indices:  # a dataset that gives no image by its number
        return
    # Without its workers, which would load more than one batch.
    batch = loop.dataloader.collate_fn([loop.dataloader.dataset[i] for i in indices])
    trains, hooks = model.training, runner._hooks
    model.eval()
    runner._hooks = []  # they would time, log and draw it
    try:
        loop.run_iter(0, batch)
    finally:
        runner._hooks = hooks
        model.train(trains)
        for metric in loop.evaluator.metrics:
            metric.results.clear()
