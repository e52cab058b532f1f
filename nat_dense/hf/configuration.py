"""The configurations, with transformers' fields and defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from nat_dense.hf.versions import BackboneConfigMixin, set_outputs

CLASSIFICATION_DILATIONS = ((1, 8, 1), (1, 4, 1, 4), (1, 2, 1, 2, 1, 2), (1, 1, 1, 1, 1))
"""`DinatConfig`'s default, which belongs to its default depths."""


class NatConfig(BackboneConfigMixin, PretrainedConfig):
    """Fields of a NAT.

    The defaults are those of [shi-labs/nat-mini-in1k-224](https://huggingface.co/shi-labs/nat-mini-in1k-224).

    Args:
        patch_size: Pixels per token side; only 4 is supported.
        num_channels: Channels of the image.
        embed_dim: Channels of the first stage; each stage doubles them.
        depths: Layers per stage.
        num_heads: Attention heads per stage.
        kernel_size: Side of the attention window in tokens; odd, > 1.
        mlp_ratio: Hidden channels of an MLP over its channels.
        qkv_bias: Whether query, key and value have biases.
        hidden_dropout_prob: Dropout on tokens and MLPs.
        attention_probs_dropout_prob: Dropout on attention weights and their projection. Above 0, training runs the
            slow reference operator.
        drop_path_rate: Stochastic depth of the last layer; grows linearly from 0 at the first.
        hidden_act: Activation of the MLPs: a name that transformers knows, or a function.
        initializer_range: Standard deviation of initial weights.
        layer_norm_eps: Of the layers' norms and the final one; all other norms use 1e-5.
        layer_scale_init_value: Initial layer scale; no layer scale if <= 0.
        out_features: A backbone's outputs, out of "stem", "stage1", ...; the last stage when None.
        out_indices: The same by number, 0 for the stem.
        **kwargs: The fields of every transformers configuration (`num_labels`, `id2label`, ...).

    Raises:
        ValueError: `out_features` or `out_indices` has unknown stages or is not in order, or the two disagree.

    Source: transformers 4.57.6, models/deprecated/nat.
    """

    model_type = "nat"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}  # noqa: RUF012

    def __init__(
        self,
        patch_size: int = 4,
        num_channels: int = 3,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.1,
        hidden_act: Any = "gelu",
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        layer_scale_init_value: float = 0.0,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.embed_dim = embed_dim
        self.depths = list(depths)
        self.num_layers = len(depths)
        self.num_heads = list(num_heads)
        self.kernel_size = kernel_size
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate = drop_path_rate
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.layer_scale_init_value = layer_scale_init_value
        # Channels after the last stage, under the name that models with any vision encoder look for.
        self.hidden_size = int(embed_dim * 2 ** (len(depths) - 1))
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(len(depths)))]
        set_outputs(self, out_features, out_indices)


class DinatConfig(NatConfig):
    """Fields of a DiNAT.

    The defaults are those of [shi-labs/dinat-mini-in1k-224](https://huggingface.co/shi-labs/dinat-mini-in1k-224).

    Args:
        dilations: By stage and layer; the default belongs to the default depths.
        **kwargs: As in `NatConfig`.

    Source: transformers 4.57.6, models/dinat.
    """

    model_type = "dinat"

    def __init__(
        self,
        patch_size: int = 4,
        num_channels: int = 3,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        *args: Any,
        **kwargs: Any,
    ):
        super().__init__(patch_size, num_channels, embed_dim, depths, num_heads, kernel_size, *args, **kwargs)
        self.dilations = [list(row) for row in (CLASSIFICATION_DILATIONS if dilations is None else dilations)]


def dilations_of(config: PretrainedConfig) -> list[list[int]]:
    """Dilations by stage and layer, of any Nat or Dinat configuration (including transformers' own `DinatConfig`).

    Raises:
        ValueError: `dilations` has fewer numbers than there are layers.
    """
    rows = getattr(config, "dilations", None) or [[1] * depth for depth in config.depths]
    if len(rows) < len(config.depths) or any(len(row) < depth for row, depth in zip(rows, config.depths, strict=False)):
        found = [len(row) for row in rows]
        raise ValueError(
            f"dilations has {found} numbers per stage; expected at least as many as depths={config.depths}"
        )
    return [list(row[:depth]) for row, depth in zip(rows, config.depths, strict=False)]
