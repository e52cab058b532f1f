"""NAT and DiNAT.

Source: NAT (arXiv:2204.07143), DiNAT (arXiv:2209.15001). State-dict keys are those of the released checkpoints.
"""

from mmengine.registry import MODELS

from nat_dense.models.backbone import NeighborhoodBackbone
from nat_dense.models.layers import ConvDownsampler, ConvTokenizer


@MODELS.register_module()
class NAT(NeighborhoodBackbone):
    """Neighborhood Attention Transformer: convolutional tokenizer and downsamplers, no dilation by default.

    See `NeighborhoodBackbone` for the fields.

    Example:
        >>> maps = NAT(arch="tiny")(torch.rand(1, 3, 224, 224))
        >>> [tuple(m.shape) for m in maps]
        [(1, 64, 56, 56), (1, 128, 28, 28), (1, 256, 14, 14), (1, 512, 7, 7)]
    """

    family = "NAT"
    stages_name = "levels"
    tokenizer = ConvTokenizer
    downsampler = ConvDownsampler


@MODELS.register_module()
class DiNAT(NAT):
    """Dilated NAT: NAT with local and dilated blocks in turn.

    The weights don't tell the dilations, and each task has its own: name the task's preset
    (`dilations="detection"`, `"segmentation"`, ...; see `variants.DILATIONS`) or list them. An `arch` without
    dilations has those of classification.
    """

    family = "DiNAT"
    default_dilations = "classification"
