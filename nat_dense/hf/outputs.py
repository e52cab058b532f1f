"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class NatModelOutput(ModelOutput):
    """Output of `NatModel` and `DinatModel`.

    Attributes:
        last_hidden_state: [B, H/32, W/32, C] after the final norm (for four stages; sides rounded up).
        pooler_output: [B, C], its mean over the tokens; None without a pooling layer.
        hidden_states: On request. [B, H_i, W_i, C_i] of the embeddings and of each stage after its downsampler.
        attentions: On request. One per stage, from its last layer: [B, heads, H_i, W_i, kernel_size ** 2]; a side is
            that of the dilated window if the map's is smaller.
        reshaped_hidden_states: `hidden_states` as [B, C_i, H_i, W_i].
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class NatImageClassifierOutput(ModelOutput):
    """Output of `NatForImageClassification` and `DinatForImageClassification`.

    Attributes:
        loss: Scalar, if labels are given.
        logits: [B, num_labels].
        hidden_states, attentions, reshaped_hidden_states: As in `NatModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None
