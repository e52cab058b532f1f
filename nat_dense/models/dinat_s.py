"""DiNAT_s: DiNAT on Swin's frame.

Source: DiNAT (arXiv:2209.15001) section 3.3. State-dict keys are those of the released checkpoints.
"""

from mmengine.registry import MODELS

from nat_dense.models.backbone import NeighborhoodBackbone
from nat_dense.models.layers import PatchMerging, PatchTokenizer


@MODELS.register_module()
class DiNAT_s(NeighborhoodBackbone):
    """Dilated neighborhood attention with Swin's patch embedding and patch merging.

    See `NeighborhoodBackbone` for the fields, and `DiNAT` for the dilations.
    """

    family = "DiNAT_s"
    stages_name = "layers"
    tokenizer = PatchTokenizer
    downsampler = PatchMerging
    default_dilations = "classification"
