"""Finds what is wrong with a config's model by building it once, before anything is written."""

import copy
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nat_dense.checkpoints.download import local
from nat_dense.checkpoints.names import URLS
from nat_dense.mm.build_errors import naming_parts, parts_of
from nat_dense.mm.channels import image_channels
from nat_dense.mm.config import model_of
from nat_dense.mm.errors import did_you_mean
from nat_dense.mm.fields import as_list, check_object, class_of, dicts_in, type_name
from nat_dense.mm.free_fields import check_free_fields
from nat_dense.mm.pretrained import Pretrained, through_this_door
from nat_dense.mm.processes import process_count
from nat_dense.models.backbone import NeighborhoodBackbone

TASK_OF_SCOPE = {"mmdet": "detection", "mmseg": "segmentation"}
"""The dilation presets made for each library start with these names."""

OF_TORCHVISION = ("torchvision://", "modelzoo://")
"""How the addresses start that MMEngine looks up in torchvision."""


def check_model(cfg: Config, *, training: bool = True) -> tuple[nn.Module, list[str]]:
    """Builds the config's model on the CPU and checks that its parts fit together, and that it can train.

    The random state is left as it was, so that a later build draws the same initial weights as without this check.

    Args:
        cfg: the config; its `default_scope` must be active.
        training: whether it is to be trained; a model to be tested needs no initial weights.

    Returns:
        The model, and warnings for the user.

    Raises:
        FileNotFoundError: a local file of initial weights is missing.
        ValueError: a local file of a backbone's initial weights isn't a checkpoint or doesn't fit, initial weights need
            torchvision and it is missing, a misspelt or wrong field, parts that don't fit, or batch norm with one value
            per channel.
    """
    node = model_of(cfg)
    _check_statistics(node.get("data_preprocessor") or {})
    backbone = node.get("backbone") or {}
    if cls := _class_of(backbone):
        check_object("model.backbone", backbone, cls)
    if training:
        _check_initial_weights(node)
    warnings = check_free_fields(node, parts_of(node))
    with torch.random.fork_rng(devices=[]):
        with naming_parts(node):
            model = MODELS.build(copy.deepcopy(node))  # MMSegmentation writes into what it builds from
        _check_channels(model)
    if training:
        _load_initial_weights(model, on_disk=True)
    if training and cfg.get("train_dataloader"):
        _check_batch_norm(model, cfg.train_dataloader.get("batch_size", 1))
    return model, warnings + _check_dilations(cfg) + (_notes_of_frozen(cfg, model) if training else [])


def _check_statistics(preprocessor: dict) -> None:
    for field in ("mean", "std"):
        values = preprocessor.get(field)
        if isinstance(values, (list, tuple)) and not all(isinstance(value, (int, float)) for value in values):
            raise ValueError(f"model.data_preprocessor.{field} is {list(values)}: expected a number per channel.")
    if isinstance(std := preprocessor.get("std"), (list, tuple)) and 0 in std:
        raise ValueError("model.data_preprocessor.std has a 0, by which images would be divided.")


def _check_initial_weights(model: dict) -> None:
    if isinstance(model.get("pretrained"), str):
        _check_source(model["pretrained"], "model.pretrained", "model.pretrained")
    for name, node in dicts_in(model, "model"):
        if name.endswith("init_cfg") and isinstance(node.get("checkpoint"), str):
            _check_source(node["checkpoint"], f"{name}.checkpoint", name)


def _check_source(source: str, name: str, field: str) -> None:
    """Refuses initial weights that can't be read here; without `field` a model starts from scratch."""
    if source.startswith(OF_TORCHVISION) and importlib.util.find_spec("torchvision") is None:
        raise ValueError(
            f"{name}={source!r}: MMEngine reads this through torchvision, which is not installed. Install the release "
            f"that fits torch {torch.__version__}, or give a file or a URL; {field}=None trains from scratch."
        )
    if "://" not in source and source not in URLS and not local(source):
        raise FileNotFoundError(
            f"{name}: no file {source!r}.{did_you_mean(source, URLS)} {field}=None trains from scratch."
        )


def fetch_initial_weights(model: nn.Module) -> None:
    """Fetches and loads the weights that our backbones of a model start from; training would do so too late.

    Args:
        model: the model, which is not kept.

    Raises:
        ConnectionError: they can't be fetched.
        ValueError: what was fetched is not what was published, or doesn't fit.
    """
    try:
        _load_initial_weights(model, on_disk=False)  # `check_model` has loaded the others
    except ConnectionError as error:
        raise ConnectionError(f"{error}. model.backbone.init_cfg=None trains from scratch.") from error


def _load_initial_weights(model: nn.Module, on_disk: bool) -> None:
    """Loads them into our backbones of a model that is not kept, for the errors that this may raise."""
    for module, initializer in _initializers(model):
        if (local(initializer.checkpoint) is not None) == on_disk:
            initializer.load_into(module)


def _initializers(model: nn.Module) -> Iterator[tuple[nn.Module, Pretrained]]:
    """Our backbones that start from a checkpoint, and what loads it."""
    for module in model.modules():
        if not isinstance(module, NeighborhoodBackbone):
            continue
        for entry in through_this_door(module.init_cfg):
            options = {name: value for name, value in entry.items() if name != "type"}
            if entry["type"] is Pretrained and options.get("checkpoint"):
                yield module, Pretrained(**options)


def _check_channels(model: nn.Module) -> None:
    """Sends a small image through a backbone of ours, and compares its maps with what reads them."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, NeighborhoodBackbone):
        return
    image = torch.zeros(1, image_channels(model), 32, 32)
    backbone.eval()
    with torch.no_grad():
        maps = backbone(image)
    widths = [m.shape[1] for m in maps]
    consumers = {"neck": getattr(model, "neck", None)}
    if consumers["neck"] is None:
        consumers = {name: getattr(model, name, None) for name in ("decode_head", "auxiliary_head")}
    for name, module in consumers.items():
        _check_in_channels(name, module, widths)


def _check_in_channels(name: str, module: nn.Module | None, widths: list[int]) -> None:
    expected = getattr(module, "in_channels", None)
    if expected is None:
        return
    index = getattr(module, "in_index", None)
    try:
        read = widths if index is None else [widths[i] for i in as_list(index)]
    except IndexError:
        raise ValueError(
            f"model.{name}.in_index is {index}, but the backbone gives {len(widths)} maps (out_indices)."
        ) from None
    is_joined = getattr(module, "input_transform", None) == "resize_concat"
    found: Any = sum(read) if is_joined else read[0] if isinstance(index, int) else read
    if (list(expected) if isinstance(expected, tuple) else expected) != found:
        raise ValueError(f"model.{name}.in_channels is {expected}, but the backbone's maps have {found} channels.")


def _check_batch_norm(model: nn.Module, batch_size: int) -> None:
    name = _norm_of_one_place(model)
    if batch_size == 1 and name:
        raise ValueError(
            f"train_dataloader.batch_size is 1, but {name} applies batch norm to a 1x1 map: with one image there "
            "is nothing to normalise over. Use a batch_size of 2 or more (or SyncBN on several GPUs, or "
            "norm_cfg=dict(type='GN', ...))."
        )


def check_last_batch(cfg: Config, model: nn.Module) -> None:
    """Checks that the last batch of an epoch is not a single image where batch norm needs more.

    Args:
        cfg: the config; its `default_scope` must be active.
        model: the model that it builds.

    Raises:
        ValueError: it is a single image.
    """
    loader = cfg.get("train_dataloader")
    if not loader or loader.get("drop_last") or loader.get("batch_sampler"):
        return
    if type_name(loader.get("sampler") or {}) != "DefaultSampler":
        return
    name = _norm_of_one_place(model)
    if name is None:
        return
    images, processes = len(DATASETS.build(copy.deepcopy(loader.dataset))), process_count(cfg)
    batch_size = loader.get("batch_size", 1)
    if batch_size > 1 and -(-images // processes) % batch_size == 1:
        raise ValueError(
            f"train_dataloader: with batch_size={batch_size} the last of {images} images (in {processes} "
            f"process(es)) is a batch of its own, but {name} applies batch norm to a 1x1 map, and with one image there "
            "is nothing to normalise over. Set train_dataloader.drop_last=True, or another batch_size."
        )


def _norm_of_one_place(model: nn.Module) -> str | None:
    """Batch norm behind a pooling to 1x1 (PSP and UPer heads) has one value per channel when the batch is one image."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        pools = any(isinstance(part, nn.AdaptiveAvgPool2d) and part.output_size in (1, (1, 1)) for part in module)
        norms = [
            part for part in module.modules() if isinstance(part, _BatchNorm) and not isinstance(part, nn.SyncBatchNorm)
        ]
        if pools and norms:
            return name
    return None


def _notes_of_frozen(cfg: Config, model: nn.Module) -> list[str]:
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, NeighborhoodBackbone) or backbone.frozen_stages < 0:
        return []
    if backbone.init_cfg or getattr(model, "init_cfg", None) or cfg.get("load_from") or cfg.get("resume"):
        return []
    return [
        f"model.backbone.frozen_stages is {backbone.frozen_stages}, but no pretrained weights are configured: the "
        "frozen stages would keep random weights."
    ]


def _check_dilations(cfg: Config) -> list[str]:
    backbone = cfg.model.get("backbone") or {}
    task = TASK_OF_SCOPE.get(cfg.get("default_scope", ""))
    cls = _class_of(backbone)
    if task is None or cls is None:
        return []
    given = backbone.get("dilations")
    dilations = cls.default_dilations if given is None else given
    if not isinstance(dilations, str) or dilations.startswith((task, "mask2former")):
        return []
    return [
        f"model.backbone.dilations is {dilations!r}, the preset of another task; the published models for this one use "
        f"{task!r}."
    ]


def _class_of(backbone: dict) -> type[NeighborhoodBackbone] | None:
    """The class behind `type`, if it is one of ours."""
    cls = class_of(backbone, MODELS) if isinstance(backbone, dict) else None  # other models may take a name
    return cls if inspect.isclass(cls) and issubclass(cls, NeighborhoodBackbone) else None
