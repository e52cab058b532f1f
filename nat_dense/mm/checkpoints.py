"""Checkpoints for a config's model: reads them without running their code, and checks that they fit."""

import itertools
import os
from collections.abc import Mapping, Sequence

from mmengine.config import Config
from torch import nn

from nat_dense.checkpoints import Checkpoint, runner_files
from nat_dense.checkpoints.layout import unwrap
from nat_dense.checkpoints.origin import origin_of
from nat_dense.listing import listing
from nat_dense.mm.sources import sources_of
from nat_dense.models.backbone import NeighborhoodBackbone


def refuse_pickled_code(*, trust: bool = False) -> None:
    """Makes this process refuse checkpoints that hold more than data, whoever loads them.

    MMEngine falls back to full unpickling, which runs whatever code a file brings along. Its files and URLs go through
    `nat_dense.checkpoints` from now on; an environment variable of PyTorch prevents it in every other `torch.load`.

    Args:
        trust: whether the files that MMEngine loads are exempt (`--trust`).

    Raises:
        ValueError: the environment demands the opposite.
    """
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        raise ValueError(
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, which lets checkpoints run code; unset it (nat_dense loads data "
            "only)."
        )
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    runner_files.install(trust=trust)


def check_fits(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Checks that a checkpoint holds every weight of a model, in its shape.

    Args:
        model: the model that the weights are for.
        checkpoint: what `nat_dense.checkpoints.read` returned.

    Returns:
        Warnings where the checkpoint holds more than the model needs, or was trained with different dilations.

    Raises:
        ValueError: weights are missing or have another shape; the first ones are named.
    """
    source = str(checkpoint.path)
    found, _ = unwrap(checkpoint.tensors)
    expected = model.state_dict()
    advice = "Use the config that it was trained with."
    unused = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    if missing and all(f"backbone.{name}" in expected for name in found):
        raise ValueError(f"{source!r} holds only a backbone; expected the weights of the whole model.")
    if missing:
        instead = f", and has {unused[0]!r} instead" if unused else ""
        raise ValueError(
            f"{source!r} belongs to another model: it lacks {len(missing)} of {len(expected)} weights, such as "
            f"{missing[0]!r}{instead}. {advice}"
        )
    for name, weight in expected.items():
        if found[name].shape != weight.shape:
            raise ValueError(
                f"{source!r} belongs to another model: {name!r} has shape {tuple(found[name].shape)}, this config's "
                f"model needs {tuple(weight.shape)}. {advice}"
            )
    notices = (
        [f"{source!r}: {len(unused)} weights are not used by this model, such as {unused[0]!r}."] if unused else []
    )
    return notices + _notes_of_dilations(model, checkpoint)


def _notes_of_dilations(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Reports dilations of our backbone that differ from those the weights were trained with; they fit all the same."""
    backbones = [module for module in model.modules() if isinstance(module, NeighborhoodBackbone)]
    origin = origin_of(checkpoint)
    if len(backbones) != 1 or origin is None:
        return []
    trained, ours = origin.resolved(backbones[0].depths), backbones[0].dilations
    if trained in (None, ours):
        return []
    return [
        f"{str(checkpoint.path)!r} was trained as {origin.family} with dilations {_readable(trained)}, but this model "
        f"has {_readable(ours)}: results will differ."
    ]


def check_classes(cfg: Config, loader: str, checkpoint: Checkpoint, *, keeps_order: bool = True) -> list[str]:
    """Checks that a checkpoint was trained with a dataset's classes, if it names those that it was trained with.

    Args:
        cfg: the config; a model that matches texts has no order of classes.
        loader: which dataloader has the dataset, of several the first.
        checkpoint: what `nat_dense.checkpoints.read` returned.
        keeps_order: whether the model's outputs must keep their meaning; not if training starts from the weights.

    Returns:
        A note for the user if the classes differ.

    Raises:
        ValueError: they are the same in another order, so predictions would be assigned to the wrong classes.
    """
    meta = checkpoint.extras.get("meta")
    named = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    trained = {str(key).lower(): value for key, value in (named or {}).items()}.get("classes") or ()  # once in capitals
    source = next(sources_of((cfg.get(loader) or {}).get("dataset"), f"{loader}.dataset"), None)
    matches_texts = (cfg.get("model") or {}).get("language_model")
    if source is None or not trained or isinstance(trained, str) or matches_texts:
        return []
    trained, ours = [str(name) for name in trained], list(source.classes)
    if not ours or trained == ours:
        return []
    is_permuted = sorted(trained) == sorted(ours)
    pairs = enumerate(itertools.zip_longest(trained, ours))
    number, (there, here) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    difference = (
        f"{str(checkpoint.path)!r} was trained with {'another order of' if is_permuted else 'different'} classes than "
        f"{source.name} has: class {number} is {there!r} there and {here!r} here"
    )
    if is_permuted and keeps_order:
        raise ValueError(f"{difference}: predictions would be assigned to the wrong classes. Give both the same order.")
    return [f"{difference}."]


def _readable(dilations: Sequence[Sequence[int]]) -> str:
    return str([list(row) for row in dilations])


def check_start(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Reports what the weights to start from (`load_from`) leave out: MMEngine loads those that fit and goes on.

    Args:
        model: the model that the weights are for.
        checkpoint: what `nat_dense.checkpoints.read` returned.

    Returns:
        Notes for the user on weights that keep their initial values and on those that are not used.

    Raises:
        ValueError: no weight fits.
    """
    source = str(checkpoint.path)
    found, _ = unwrap(checkpoint.tensors)
    expected = model.state_dict()
    fresh = [name for name, value in expected.items() if name not in found or found[name].shape != value.shape]
    unused = [name for name in found if name not in expected]
    if len(fresh) == len(expected):
        raise ValueError(
            f"load_from={source!r}: none of its {len(found)} weights, such as {next(iter(found))!r}, fits this "
            "model. Weights of only a backbone belong in model.backbone.init_cfg=dict(type='Pretrained', "
            "checkpoint=...)."
        )
    notices = [f"{len(fresh)} of {len(expected)} weights keep their initial values: {listing(fresh)}"] if fresh else []
    notices += [f"{len(unused)} of its weights are not used: {listing(unused)}"] if unused else []
    return [f"load_from={source!r}: {notice}." for notice in notices] + _notes_of_dilations(model, checkpoint)
