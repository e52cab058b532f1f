"""The layers under transformers' names. The computation is that of `nat_dense.models` and the operator.

Parameter names are those of the published transformers checkpoints, and therefore public API. Tokens are
[B, H, W, C] throughout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2CLS, ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from nat_dense.hf.configuration import NatConfig, dilations_of
from nat_dense.models.attention import attend
from nat_dense.models.layers import ConvDownsampler, ConvTokenizer, DropPath, are_plain, in_runs, is_plain
from nat_dense.models.linear import Linear
from nat_dense.ops import reference
from nat_dense.ops.problem import completed_size

_ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
"""transformers' own, which look at one number at a time."""


class PatchEmbeddings(nn.Module):
    """The tokenizer's convolutions: [B, num_channels, H, W] -> [B, ceil(H/4), ceil(W/4), embed_dim]."""

    def __init__(self, projection: nn.Module, num_channels: int):
        super().__init__()
        self.num_channels = num_channels
        self.projection = projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Raises ValueError if the image has a different number of channels."""
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                "Make sure that the channel dimension of the pixel values match with the one set in the configuration: "
                f"found pixel values of shape {tuple(pixel_values.shape)}, num_channels={self.num_channels}"
            )
        return self.projection(pixel_values).permute(0, 2, 3, 1)


class Embeddings(nn.Module):
    """Tokenizer, norm and dropout."""

    def __init__(self, config: NatConfig):
        super().__init__()
        if config.patch_size != 4:
            raise ValueError(
                f"patch_size={config.patch_size}: the model only supports patch size of 4 at the moment; leave it out"
            )
        tokenizer = ConvTokenizer(config.num_channels, config.embed_dim)
        self.patch_embeddings = PatchEmbeddings(tokenizer.proj, config.num_channels)
        self.norm = tokenizer.norm
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.dropout(self.norm(self.patch_embeddings(pixel_values)))


class SelfAttention(nn.Module):
    """Projections to query, key and value, and the operator."""

    def __init__(self, config: NatConfig, dim: int, num_heads: int, dilation: int):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"The hidden size ({dim}) is not a multiple of the number of attention heads ({num_heads})"
            )
        self.num_heads = num_heads
        self.kernel_size = config.kernel_size
        self.dilation = dilation
        self.scale = (dim // num_heads) ** -0.5
        side = 2 * config.kernel_size - 1
        self.rpb = nn.Parameter(torch.zeros(num_heads, side, side))
        self.query = Linear(dim, dim, bias=config.qkv_bias)
        self.key = Linear(dim, dim, bias=config.qkv_bias)
        self.value = Linear(dim, dim, bias=config.qkv_bias)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, tokens: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """[B, H, W, C] -> the same, and the attention weights if requested.

        The weights are [B, heads, H', W', kernel_size ** 2]; H' and W' are the map's sides, or the dilated window's
        if that is larger. They come from the reference operator, which is slow.
        """
        if output_attentions:
            return self._with_weights(tokens)
        out = attend(
            self._project(tokens),
            self.kernel_size,
            self.dilation,
            self.rpb,
            self.scale,
            projections=(self.query, self.key, self.value),
            dropout=self.dropout.p if self.training else 0.0,
        )
        return out.flatten(-2), None

    def _project(self, tokens: Tensor) -> list[Tensor]:
        heads = (self.num_heads, -1)
        return [linear(tokens).unflatten(-1, heads) for linear in (self.query, self.key, self.value)]

    def _with_weights(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        _, height, width, _ = tokens.shape
        window = (self.kernel_size,) * 2, (self.dilation,) * 2
        full = completed_size((height, width), *window)
        query, key, value = self._project(F.pad(tokens, (0, 0, 0, full[1] - width, 0, full[0] - height)))
        weights = self.dropout(reference.attention_weights(query, key, self.rpb, *window, self.scale))
        out = reference.apply_weights(weights, value, *window)[:, :height, :width]
        return out.flatten(-2), weights.permute(0, 3, 1, 2, 4, 5).flatten(-2)


class Dense(nn.Module):
    """A linear layer and dropout, as transformers nests them."""

    def __init__(self, in_dim: int, out_dim: int, drop: float):
        super().__init__()
        self.dense = Linear(in_dim, out_dim)
        self.dropout = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.dense(x))


class Attention(nn.Module):
    """`SelfAttention` and its output projection."""

    def __init__(self, config: NatConfig, dim: int, num_heads: int, dilation: int):
        super().__init__()
        self.self = SelfAttention(config, dim, num_heads, dilation)
        self.output = Dense(dim, dim, config.attention_probs_dropout_prob)

    def forward(self, tokens: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        context, weights = self.self(tokens, output_attentions)
        return self.output(context), weights


class Intermediate(nn.Module):
    """First half of the MLP."""

    def __init__(self, config: NatConfig, dim: int):
        super().__init__()
        self.dense = Linear(dim, int(config.mlp_ratio * dim))
        act = config.hidden_act
        self.intermediate_act_fn = ACT2FN[act] if isinstance(act, str) else act

    def forward(self, x: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(x))


class Layer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm, with optional layer scale and stochastic depth."""

    def __init__(self, config: NatConfig, dim: int, num_heads: int, dilation: int, drop_path: float):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = Attention(config, dim, num_heads, dilation)
        self.drop_path = DropPath(drop_path)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.intermediate = Intermediate(config, dim)
        self.output = Dense(int(config.mlp_ratio * dim), dim, config.hidden_dropout_prob)
        self.layer_scale_init_value = config.layer_scale_init_value
        layer_scale = torch.full((2, dim), float(config.layer_scale_init_value))
        self.layer_scale_parameters = nn.Parameter(layer_scale) if config.layer_scale_init_value > 0 else None

    def forward(self, tokens: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """[B, H, W, C] -> the same, and the attention weights if requested."""
        attended, weights = self.attention(self.layernorm_before(tokens), output_attentions)
        return in_runs(self._add_branches, tokens, attended, whole=self._takes_whole_maps), weights

    def _takes_whole_maps(self) -> bool:
        """Whether a part of the MLP may look at more than one token: hooks and replaced modules may do anything."""
        if self.drop_path.training or not are_plain({Intermediate: (self.intermediate,), Dense: (self.output,)}):
            return True
        act = self.intermediate.intermediate_act_fn
        if not isinstance(act, nn.Module) or type(act) not in _ACTIVATIONS or not is_plain(act, type(act)):
            return True
        return not are_plain(
            {
                nn.LayerNorm: (self.layernorm_after,),
                DropPath: (self.drop_path,),
                Linear: (self.intermediate.dense, self.output.dense),
                nn.Dropout: (self.output.dropout,),
            }
        )

    def _add_branches(self, tokens: Tensor, attended: Tensor) -> Tensor:
        scales = (None, None) if self.layer_scale_parameters is None else self.layer_scale_parameters.unbind()
        tokens = self.drop_path(tokens, attended, scales[0])
        hidden = self.output(self.intermediate(self.layernorm_after(tokens)))
        return self.drop_path(tokens, hidden, scales[1])


class Stage(nn.Module):
    """Layers of one resolution and, on all stages but the last, a downsampler."""

    def __init__(self, layers: list[Layer], downsample: nn.Module | None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.downsample = downsample

    def forward(self, tokens: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """[B, H, W, C] -> the next stage's input, the map after the layers, and the last layer's weights."""
        weights = None
        for i, layer in enumerate(self.layers):
            tokens, weights = layer(tokens, output_attentions and i == len(self.layers) - 1)
        return tokens if self.downsample is None else self.downsample(tokens), tokens, weights


class Encoder(nn.Module):
    """The stages."""

    def __init__(self, config: NatConfig):
        super().__init__()
        count = sum(config.depths)
        rates = (config.drop_path_rate * i / max(1, count - 1) for i in range(count))
        self.levels = nn.ModuleList()
        for i, dilations in enumerate(dilations_of(config)):
            dim = config.embed_dim * 2**i
            layers = [Layer(config, dim, config.num_heads[i], dilation, next(rates)) for dilation in dilations]
            self.levels.append(Stage(layers, ConvDownsampler(dim) if i < len(config.depths) - 1 else None))

    def forward(
        self, tokens: Tensor, output_attentions: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Each stage's outputs, as `Stage` returns them."""
        for level in self.levels:
            outputs = level(tokens, output_attentions)
            tokens = outputs[0]
            yield outputs
