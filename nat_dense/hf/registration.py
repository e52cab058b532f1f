"""Makes transformers' Auto classes find the models."""

from __future__ import annotations

import transformers
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

from nat_dense.hf import models
from nat_dense.hf.configuration import DinatConfig, NatConfig
from nat_dense.hf.versions import hide_new_natten, register_image_processor


def register() -> None:
    """Registers NAT and DiNAT with the Auto classes, replacing what transformers has under these names.

    transformers 4.57's classes need a NATTEN that no longer installs; 5 has no NAT, and its DiNAT's forward pass fails
    or is wrong. Configurations of transformers' own classes also select these models.
    """
    hide_new_natten()
    register_image_processor(NatConfig)
    for config, name in ((NatConfig, "Nat"), (DinatConfig, "Dinat")):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        theirs = getattr(transformers, config.__name__, None)
        for key in (config, theirs):
            if key is None:
                continue
            AutoModel.register(key, getattr(models, f"{name}Model"), exist_ok=True)
            AutoBackbone.register(key, getattr(models, f"{name}Backbone"), exist_ok=True)
            classifier = getattr(models, f"{name}ForImageClassification")
            AutoModelForImageClassification.register(key, classifier, exist_ok=True)
