"""The classification models whose weights were released: the backbones with a pooled linear head."""

from __future__ import annotations

from torch import Tensor, nn

from nat_dense.models.backbone import NeighborhoodBackbone
from nat_dense.models.dinat_s import DiNAT_s
from nat_dense.models.linear import Linear
from nat_dense.models.nat import NAT, DiNAT


class _Classifier(NeighborhoodBackbone):
    """Backbone, norm, mean over tokens, linear head, under the released key names (`norm`, `head`).

    Args:
        num_classes: Outputs of the head.
        **fields: The backbone's fields.
    """

    def __init__(self, arch: str | None = None, *, num_classes: int = 1000, **fields):
        super().__init__(arch, out_indices=(), **fields)
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: expected a number >= 1")
        self.norm = nn.LayerNorm(self.num_features[-1])
        self.head = Linear(self.num_features[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override] # a head instead of maps
        """[B, in_chans, H, W] -> logits [B, num_classes]."""
        *_, tokens = self.forward_stages(x)
        return self.head(self.norm(tokens).mean(dim=(1, 2)))


class NATClassifier(_Classifier, NAT):
    """NAT for image classification. See `NeighborhoodBackbone` for the fields."""


class DiNATClassifier(_Classifier, DiNAT):
    """DiNAT for image classification. See `NeighborhoodBackbone` for the fields."""


class DiNATsClassifier(_Classifier, DiNAT_s):
    """DiNAT_s for image classification. See `NeighborhoodBackbone` for the fields."""
