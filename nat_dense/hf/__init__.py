"""NAT and DiNAT for Hugging Face transformers, 4.57 and 5. Needs torch and transformers.

The classes have the same fields, outputs and parameter names as those that transformers had. Importing this package
registers them with AutoConfig, AutoModel, AutoBackbone and AutoModelForImageClassification, where they replace
transformers' own DiNAT (and, in 4.57, NAT).

Start with `models.py`, then `layers.py`; `versions.py` holds what differs between releases of transformers.
"""

from nat_dense.hf.configuration import DinatConfig, NatConfig
from nat_dense.hf.models import (
    DinatBackbone,
    DinatForImageClassification,
    DinatModel,
    NatBackbone,
    NatForImageClassification,
    NatModel,
)
from nat_dense.hf.outputs import NatImageClassifierOutput, NatModelOutput
from nat_dense.hf.registration import register

__all__ = [
    "DinatBackbone",
    "DinatConfig",
    "DinatForImageClassification",
    "DinatModel",
    "NatBackbone",
    "NatConfig",
    "NatForImageClassification",
    "NatImageClassifierOutput",
    "NatModel",
    "NatModelOutput",
    "register",
]

register()
