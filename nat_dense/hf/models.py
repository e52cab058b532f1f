"""The models, with transformers' signatures, outputs and parameter names.

Source: the contract is that of transformers 4.57.6, models/deprecated/nat and models/dinat; the architecture that of
NAT (arXiv:2204.07143) and DiNAT (arXiv:2209.15001).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import ModelOutput

from nat_dense.hf.configuration import DinatConfig, NatConfig
from nat_dense.hf.layers import Embeddings, Encoder, Layer, PatchEmbeddings, SelfAttention
from nat_dense.hf.outputs import NatImageClassifierOutput, NatModelOutput
from nat_dense.hf.versions import BackboneMixin, init_backbone


class _PreTrained(PreTrainedModel):
    """Initial weights, and the attributes that transformers expects of a model."""

    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True

    def _init_weights(self, module: nn.Module) -> None:
        """transformers calls this on modules whose weights were not in the checkpoint."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, SelfAttention):
            nn.init.zeros_(module.rpb)
        elif isinstance(module, Layer) and module.layer_scale_parameters is not None:
            nn.init.constant_(module.layer_scale_parameters, self.config.layer_scale_init_value)

    def _wants(self, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
        """The values of the call, or else of the configuration."""
        config = self.config
        return (
            bool(config.output_attentions if output_attentions is None else output_attentions),
            bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states),
        )

    def _in_form(self, output: ModelOutput, as_tuple: tuple, return_dict: bool | None) -> Any:
        """The output, or its tuple if the call, or else the configuration, requests one."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else as_tuple


class _Encoding(_PreTrained):
    """What the bare model and the backbone share: embeddings and stages."""

    def __init__(self, config: NatConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def get_input_embeddings(self) -> PatchEmbeddings:
        return self.embeddings.patch_embeddings

    def _encode(
        self, pixel_values: Tensor | None, output_attentions: bool, *, downsampled: bool
    ) -> tuple[list[Tensor], tuple[Tensor, ...] | None]:
        """The embeddings and each stage's map, after or before its downsampler; each stage's weights if requested."""
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values: a tensor [batch, num_channels, height, width]")
        hidden_states, attentions = [self.embeddings(pixel_values)], []
        for after, before, weights in self.encoder(hidden_states[0], output_attentions):
            hidden_states.append(after if downsampled else before)
            attentions.append(weights)
        return hidden_states, tuple(attentions) if output_attentions else None


class _Model(_Encoding):
    """The encoder with a final norm and, optionally, the mean over its tokens.

    Args:
        config: The fields.
        add_pooling_layer: Whether `pooler_output` is computed.

    Raises:
        ValueError: Fields of `config` are out of range or disagree.
    """

    def __init__(self, config: NatConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.num_levels = len(config.depths)
        self.num_features = config.hidden_size
        self.layernorm = nn.LayerNorm(self.num_features, eps=config.layer_norm_eps)
        self.pooler = nn.AdaptiveAvgPool1d(1) if add_pooling_layer else None
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple | NatModelOutput:
        """Features of images.

        Args:
            pixel_values: [B, num_channels, H, W], any H, W >= 1.
            output_attentions: Whether to return attention weights, computed by the slow reference operator.
            output_hidden_states: Whether to return the maps of all stages.
            return_dict: False for a tuple instead.

        Raises:
            ValueError: No image, or one with another number of channels.
        """
        output_attentions, output_hidden_states = self._wants(output_attentions, output_hidden_states)
        hidden_states, attentions = self._encode(pixel_values, output_attentions, downsampled=True)
        tokens = self.layernorm(hidden_states[-1])
        output = NatModelOutput(
            last_hidden_state=tokens,
            pooler_output=None if self.pooler is None else tokens.mean(dim=(1, 2)),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=attentions,
            reshaped_hidden_states=_channels_first(hidden_states) if output_hidden_states else None,
        )
        as_tuple = (tokens, output.pooler_output, *_present(output.hidden_states, output.attentions))
        return self._in_form(output, as_tuple, return_dict)


class _ForImageClassification(_PreTrained):
    """The model with a linear classifier.

    Args:
        config: The fields; `num_labels=0` leaves the classifier out.
    """

    model_class: ClassVar[type[_Model]]

    def __init__(self, config: NatConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        model = self.model_class(config)
        setattr(self, self.base_model_prefix, model)
        labels = config.num_labels or 0
        self.classifier = nn.Linear(model.num_features, labels) if labels > 0 else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple | NatImageClassifierOutput:
        """Logits of images, and the loss if labels are given.

        Args:
            pixel_values: [B, num_channels, H, W].
            labels: int64 [B] for cross entropy; float [B] (`num_labels` 1) for a mean squared error; float
                [B, num_labels] for a binary cross entropy per label.
            output_attentions, output_hidden_states, return_dict: As in the bare model.

        Raises:
            ValueError: No image, or one with another number of channels.
        """
        features = self.base_model(pixel_values, output_attentions, output_hidden_states, return_dict=True)
        logits = self.classifier(features.pooler_output)
        output = NatImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
            reshaped_hidden_states=features.reshaped_hidden_states,
        )
        as_tuple = (*_present(output.loss), logits, *_present(output.hidden_states, output.attentions))
        return self._in_form(output, as_tuple, return_dict)


class _Backbone(BackboneMixin, _Encoding):
    """Maps of several stages, each with its own norm, for transformers' dense models.

    Args:
        config: The fields; `out_features` or `out_indices` choose the maps.
    """

    def __init__(self, config: NatConfig):
        super().__init__(config)
        init_backbone(self, config)
        self.num_features = [config.embed_dim, *(config.embed_dim * 2**i for i in range(len(config.depths)))]
        self.hidden_states_norms = nn.ModuleDict(
            {stage: nn.LayerNorm(dim) for stage, dim in zip(self.out_features, self.channels, strict=True)}
        )
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple | BackboneOutput:
        """Maps of images.

        Args:
            pixel_values: [B, num_channels, H, W].
            output_hidden_states, output_attentions, return_dict: As in the bare model, but in transformers' order for
                backbones. A tuple has no attentions.

        Returns:
            `feature_maps`, contiguous [B, C_i, H_i, W_i]; `hidden_states` are [B, H_i, W_i, C_i], before norm and
            downsampler; `attentions` as in the bare model.

        Raises:
            ValueError: No image, or one with another number of channels.
        """
        output_attentions, output_hidden_states = self._wants(output_attentions, output_hidden_states)
        hidden_states, attentions = self._encode(pixel_values, output_attentions, downsampled=False)
        maps = dict(zip(self.stage_names, hidden_states, strict=True))
        output = BackboneOutput(
            feature_maps=tuple(
                self.hidden_states_norms[stage](maps[stage]).permute(0, 3, 1, 2).contiguous()
                for stage in self.out_features
            ),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=attentions,
        )
        return self._in_form(output, (output.feature_maps, *_present(output.hidden_states)), return_dict)


class NatModel(_Model):
    """The bare NAT. See `_Model`."""

    config_class = NatConfig
    base_model_prefix = "nat"


class NatForImageClassification(_ForImageClassification):
    """NAT with a classifier. See `_ForImageClassification`."""

    config_class = NatConfig
    base_model_prefix = "nat"
    model_class = NatModel


class NatBackbone(_Backbone):
    """NAT for dense models. See `_Backbone`."""

    config_class = NatConfig
    base_model_prefix = "nat"


class DinatModel(_Model):
    """The bare DiNAT. See `_Model`."""

    config_class = DinatConfig
    base_model_prefix = "dinat"


class DinatForImageClassification(_ForImageClassification):
    """DiNAT with a classifier. See `_ForImageClassification`."""

    config_class = DinatConfig
    base_model_prefix = "dinat"
    model_class = DinatModel


class DinatBackbone(_Backbone):
    """DiNAT for dense models. See `_Backbone`."""

    config_class = DinatConfig
    base_model_prefix = "dinat"


def _channels_first(maps: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tokens.permute(0, 3, 1, 2) for tokens in maps)


def _present(*values: Any) -> tuple:
    return tuple(value for value in values if value is not None)
