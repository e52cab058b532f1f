"""transformers' dense models with these backbones: every one that takes any backbone with maps of several scales."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'nat_dense[hf]'")

from nat_dense import hf  # noqa: E402

STAGES = ["stage1", "stage2", "stage3", "stage4"]
QUERIES = dict(num_queries=8, num_labels=5)
LAYERS = dict(encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
DETR = dict(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32) | QUERIES | LAYERS
MASKS = dict(encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, encoder_feedforward_dim=32)
BOXES = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]])) for _ in range(2)]
REGIONS = dict(
    mask_labels=[(torch.arange(64 * 96).view(1, 64, 96) % 7 < torch.tensor([2, 5]).view(2, 1, 1)).float()] * 2,
    class_labels=[torch.tensor([0, 1])] * 2,
)
MASKFORMER_DECODER = dict(model_type="detr", **DETR)
RT_DETR = dict(
    encoder_in_channels=[32, 64, 128],
    encoder_hidden_dim=32,
    encoder_ffn_dim=32,
    decoder_in_channels=[32, 32, 32],
    decoder_ffn_dim=32,
    d_model=32,
    num_denoising=0,
)
TIMM_OFF = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None)
"""What some configurations of 4.57 want to hear before they take a backbone that is not timm's."""

HOSTS = {
    "UperNetForSemanticSegmentation": (
        STAGES,
        dict(hidden_size=32, num_labels=5, auxiliary_in_channels=64, pool_scales=[1, 2]),
        dict(labels=torch.arange(2 * 64 * 96).view(2, 64, 96) % 5),
    ),
    "Mask2FormerForUniversalSegmentation": (
        STAGES,
        dict(feature_size=32, mask_feature_size=32, hidden_dim=32, train_num_points=64) | MASKS | QUERIES,
        REGIONS,
    ),
    "MaskFormerForInstanceSegmentation": (
        STAGES,
        dict(fpn_feature_size=32, mask_feature_size=32, num_labels=5, decoder_config=MASKFORMER_DECODER),
        REGIONS,
    ),
    "OneFormerModel": (
        STAGES,
        dict(hidden_dim=32, conv_dim=32, mask_dim=32) | MASKS | QUERIES,
        dict(task_inputs=torch.ones(2, 77, dtype=torch.long)),
    ),
    "DetrForObjectDetection": (STAGES[3:], DETR, dict(labels=BOXES)),
    "ConditionalDetrForObjectDetection": (STAGES[3:], DETR, dict(labels=BOXES)),
    "TableTransformerForObjectDetection": (STAGES[3:], DETR, dict(labels=BOXES)),
    "DeformableDetrForObjectDetection": (STAGES[1:], DETR | dict(num_feature_levels=4), dict(labels=BOXES)),
    "DabDetrForObjectDetection": (
        STAGES[3:],
        dict(hidden_size=32, encoder_ffn_dim=32, decoder_ffn_dim=32) | QUERIES | LAYERS,
        dict(labels=BOXES),
    ),
    **{
        f"{name}ForObjectDetection": (STAGES[1:], RT_DETR | QUERIES | LAYERS, dict(labels=BOXES))
        for name in ("RTDetr", "RTDetrV2", "DFine")
    },
    "VitMatteForImageMatting": (
        STAGES[2:3],
        dict(hidden_size=64, convstream_hidden_sizes=[8, 16, 32], fusion_hidden_sizes=[16, 16, 16, 16]),
        {},
    ),
}


def backbone_config(family: str, out_features: list[str], channels: int):
    """A small backbone whose smallest maps are below its window."""
    fields = dict(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], kernel_size=3, num_channels=channels)
    if family == "Dinat":
        fields["dilations"] = [[2], [3], [1], [2]]
    return getattr(hf, f"{family}Config")(out_features=out_features, **fields)


@pytest.mark.parametrize("family", ["Nat", "Dinat"])
@pytest.mark.parametrize("name", HOSTS)
def test_trains_a_step(name, family):
    """Forward and backward; the backbone's biases get gradients from the host's loss."""
    torch.manual_seed(0)
    out_features, fields, targets = deepcopy(HOSTS[name])  # 4.57 takes entries out of dictionaries that it is given
    channels = 4 if name == "VitMatteForImageMatting" else 3
    cls = getattr(transformers, name)
    of_detr = "encoder_ffn_dim" in fields and "encoder_in_channels" not in fields
    if transformers.__version__.startswith("4.") and of_detr:
        fields = fields | TIMM_OFF
    model = cls(cls.config_class(backbone_config=backbone_config(family, out_features, channels), **fields)).train()
    backbones = [module for module in model.modules() if isinstance(module, hf.NatBackbone | hf.DinatBackbone)]
    assert [type(module) for module in backbones] == [getattr(hf, f"{family}Backbone")]
    output = model(pixel_values=torch.rand(2, channels, 64, 96), **targets)
    loss = output.get("loss")
    if loss is None:
        loss = sum(value.square().mean() for value in output.values() if torch.is_tensor(value))
    loss.backward()
    used = int(out_features[-1][-1])
    for level in backbones[0].encoder.levels[:used]:
        gradient = level.layers[0].attention.self.rpb.grad
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0


def test_dpt_does_not_take_maps():
    """Nor do its kin: they rearrange the token sequences of a plain ViT, whatever the backbone returns."""
    cls = transformers.DPTForSemanticSegmentation
    config = cls.config_class(backbone_config=backbone_config("Nat", STAGES, 3))
    # 5 fails in its neck, 4.57 before it, in looking for the token sequences.
    with pytest.raises((RuntimeError, TypeError), match=r"is invalid for input of size|'NoneType' is not iterable"):
        cls(config)(pixel_values=torch.rand(2, 3, 64, 96))
