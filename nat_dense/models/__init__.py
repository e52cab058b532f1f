"""The backbones. Needs torch and, but for the layers, mmengine; imports neither mmcv, mmdet nor mmseg.

Start with `nat.py` (the models), then `backbone.py` (what they share) and `variants.py` (the published architectures).
"""

from importlib.util import find_spec

from nat_dense.models.attention import NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention2D"]

if find_spec("mmengine") is not None:
    from nat_dense.models.classifier import DiNATClassifier, DiNATsClassifier, NATClassifier
    from nat_dense.models.dinat_s import DiNAT_s
    from nat_dense.models.nat import NAT, DiNAT

    __all__ += ["NAT", "DiNAT", "DiNATClassifier", "DiNAT_s", "DiNATsClassifier", "NATClassifier"]
