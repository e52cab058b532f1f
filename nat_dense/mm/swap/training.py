"""What a config says about training and weights that belonged to the old backbone."""

from __future__ import annotations

from typing import Any

from nat_dense.mm.fields import as_list, type_name
from nat_dense.mm.swap.refusals import segments
from nat_dense.models.variants import Variant

MEAN = [123.675, 116.28, 103.53]
STD = [58.395, 57.12, 57.375]
"""Of RGB pictures in 0 .. 255, with which the published weights were trained."""

ADAMW = {
    "detection": dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    "segmentation": dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
}
"""The published settings for each task."""

ADAMW_BATCH = 16
"""The images per step that they are for."""

UNDECAYED = (
    ".attn.rpb",
    ".norm1.weight",
    ".norm1.bias",
    ".norm2.weight",
    ".norm2.bias",
    ".downsample.norm.",
    "backbone.patch_embed.norm.",
    "backbone.norm",
)
"""Biases and norms of our backbones, which the published recipes don't decay, by parts of their parameters' names.

All are longer than "backbone": of the rules that match a parameter, MMEngine takes the longest.
"""

LAYERWISE = ("LayerDecayOptimizerConstructor", "LearningRateDecayOptimizerConstructor")
"""Constructors that give each layer its learning rate, by the layers' names in a few backbones."""


def adapt_weights(cfg: Any, row: Variant, new: dict, old: dict) -> list[str]:
    """Gives the new backbone its published weights where the old one had some, and drops those of the old one.

    Args:
        cfg: The whole config; changed in place.
        row: The new architecture.
        new: The new backbone; `init_cfg` and `frozen_stages` are set.
        old: The old backbone.

    Returns:
        Notes for the user.
    """
    notes = []
    model = cfg.model
    pretrained = bool(old.get("init_cfg") or old.get("pretrained") or model.get("pretrained"))
    if model.get("pretrained") is not None:
        model["pretrained"] = None
    if type_name(model.get("init_cfg") or {}) == "Pretrained":
        model["init_cfg"] = None
        notes.append("model.init_cfg loaded a whole trained model with the old backbone; it is dropped.")
    if cfg.get("load_from"):
        notes.append(f"load_from={cfg.load_from!r} held a whole trained model with the old backbone; it is dropped.")
        cfg.load_from = None
    checkpoint = row.checkpoint_22k or row.checkpoint
    if pretrained and checkpoint:
        new["init_cfg"] = dict(type="Pretrained", checkpoint=checkpoint)
        frozen = old.get("frozen_stages", -1)
        if frozen >= 0:
            new["frozen_stages"] = min(frozen, len(row.depths))
    elif pretrained:
        notes.append("there are no published weights for this architecture: it starts from random ones, unfrozen.")
    else:
        notes.append("the old backbone started from random weights, and so does the new one.")
    return notes


def adapt_normalisation(preprocessor: dict) -> None:
    """Normalises pictures as the published weights expect."""
    if list(preprocessor.get("mean") or []) != MEAN or list(preprocessor.get("std") or []) != STD:
        preprocessor["mean"], preprocessor["std"] = MEAN, STD
    if not preprocessor.get("bgr_to_rgb"):
        preprocessor["bgr_to_rgb"] = True
        if "rgb_to_bgr" in preprocessor:
            preprocessor["rgb_to_bgr"] = False


def adapt_decay(optim_wrapper: dict, pretrained: bool) -> list[str]:
    """Replaces the parameter-wise rules for the inside of the old backbone by those of ours.

    Args:
        optim_wrapper: The config's; changed in place.
        pretrained: Whether the new backbone starts from published weights.

    Returns:
        Notes for the user.
    """
    notes = []
    paramwise = dict(optim_wrapper.get("paramwise_cfg") or {})
    if optim_wrapper.get("constructor") in LAYERWISE:
        notes.append(
            f"{optim_wrapper['constructor']} knows only the old backbone's layers; all layers now have one lr."
        )
        optim_wrapper["constructor"] = "DefaultOptimWrapperConstructor"
        paramwise = {}
    rules = dict(paramwise.get("custom_keys") or {})
    rules = {key: rule for key, rule in rules.items() if not key.startswith("backbone.")}
    slowed = rules.get("backbone", {}).get("lr_mult", 1.0)
    if slowed < 1.0 and not pretrained:
        notes.append(
            f"optim_wrapper.paramwise_cfg trains the backbone at {slowed:g} of the learning rate, which is meant for "
            "pretrained weights; this one starts from random ones."
        )
    undecayed = dict(rules.get("backbone", {}), decay_mult=0.0)
    rules.update({key: dict(undecayed) for key in UNDECAYED})
    optim_wrapper["paramwise_cfg"] = dict(paramwise, custom_keys=rules)
    return notes


def use_adamw(cfg: Any) -> list[str]:
    """`--optimizer adamw`: the published settings; lower bounds of the schedule shrink with the learning rate.

    `--auto-scale-lr` then scales from the published batch size.

    Args:
        cfg: The whole config, with any backbone; changed in place.

    Returns:
        Notes for the user.

    Raises:
        ValueError: The config has no optimizer.
    """
    if not (cfg.get("optim_wrapper") or {}).get("optimizer"):
        raise ValueError("--optimizer adamw needs a config with optim_wrapper.optimizer, which this one doesn't have.")
    new = dict(ADAMW["segmentation" if segments(cfg.model) else "detection"])
    ratio = new["lr"] / cfg.optim_wrapper.optimizer.get("lr", new["lr"])
    cfg.optim_wrapper.optimizer = new
    for scheduler in as_list(cfg.get("param_scheduler")):
        if scheduler.get("eta_min"):
            scheduler["eta_min"] *= ratio
    cfg.auto_scale_lr = dict(cfg.get("auto_scale_lr") or dict(enable=False), base_batch_size=ADAMW_BATCH)
    return [f"AdamW's lr {new['lr']:g} is published for {ADAMW_BATCH} images per step (--auto-scale-lr scales it)."]


def optimizer_hint(cfg: Any, backbone: str) -> list[str]:
    """A note if the config would train the new backbone with SGD."""
    optimizer = (cfg.get("optim_wrapper") or {}).get("optimizer") or {}
    if type_name(optimizer) != "SGD":
        return []
    return [f"the config trains with SGD; {backbone} was published with AdamW (--optimizer adamw)."]
