"""Writes tests/data/hf/transformers-4.57.6: a folder that transformers' own NAT saved, and what it returned.

.venv-hf4/bin/python -m tests.hf.make_fixture
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests import golden
from tests.hf import natten_standin

FOLDER = Path(__file__).parents[1] / "data" / "hf" / "transformers-4.57.6"


def main() -> None:
    natten_standin.install()
    from transformers.models.deprecated.nat import NatConfig, NatForImageClassification

    fields = dict(embed_dim=8, depths=[1, 2], num_heads=[1, 2], kernel_size=5, mlp_ratio=2.0, num_labels=3)
    config = NatConfig(layer_scale_init_value=0.1, out_features=["stage1", "stage2"], **fields)
    model = golden.fill(NatForImageClassification(config)).eval()
    model.save_pretrained(FOLDER)
    image = golden.tensor("image", (2, 3, 30, 41))
    with torch.no_grad():
        found = model(image, output_hidden_states=True, output_attentions=True)
    tensors = dict(logits=found.logits)
    for name in ("hidden_states", "attentions"):
        tensors |= {f"{name}.{i}": t.contiguous() for i, t in enumerate(found[name])}
    save_file(tensors, FOLDER / "outputs.safetensors")


if __name__ == "__main__":
    main()
