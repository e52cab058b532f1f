"""The backbones. Needs torch and mmengine; imports neither mmcv, mmdet nor mmseg.

Start with `nat.py` (the models), then `backbone.py` (what they share) and `variants.py` (the published architectures).
"""

from nat_dense.models.attention import NeighborhoodAttention2D
from nat_dense.models.classifier import DiNATClassifier, DiNATsClassifier, NATClassifier
from nat_dense.models.dinat_s import DiNAT_s
from nat_dense.models.nat import NAT, DiNAT

__all__ = ["NAT", "DiNAT", "DiNATClassifier", "DiNAT_s", "DiNATsClassifier", "NATClassifier", "NeighborhoodAttention2D"]
