"""Training and what it uses: gradient checkpointing, compilation, Trainer."""

from __future__ import annotations

import pytest
import torch

from tests import golden

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'nat_dense[hf]'")

from nat_dense import hf  # noqa: E402
from tests.hf.test_contract import SMALL, build  # noqa: E402


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["Nat", "Dinat"])
def test_gradient_checkpointing_changes_memory_alone(family, reentrant):
    image, labels = golden.tensor("image", (2, 3, 40, 56)), torch.tensor([1, 3])
    gradients = []
    for checkpointed in (False, True):
        model = build(f"{family}ForImageClassification", drop_path_rate=0.0).train()
        if checkpointed:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
            assert model.is_gradient_checkpointing
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.nbytes) or t, lambda t: t):
            loss = model(image, labels=labels).loss
        loss.backward()
        gradients.append(({name: value.grad for name, value in model.named_parameters()}, sum(saved)))
    (plain, all_bytes), (recomputed, few_bytes) = gradients
    assert all(torch.equal(value, recomputed[name]) for name, value in plain.items())
    assert few_bytes < all_bytes / 2


@pytest.mark.parametrize("name", ["NatForImageClassification", "DinatBackbone"])
def test_every_parameter_learns(name):
    fields = dict(layer_scale_init_value=0.1, out_features=["stem", "stage1", "stage2", "stage3"])
    model = build(name, drop_path_rate=0.0, **fields).train()  # a branch that all samples drop has no gradient
    output = model(golden.tensor("image", (2, 3, 40, 56)), return_dict=False)[0]
    values = output if isinstance(output, tuple) else (output,)
    sum((v * golden.tensor(f"cot{i}", v.shape)).sum() for i, v in enumerate(values)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.slow
def test_compiles_into_one_graph():
    """And into a second one that any size of image uses."""
    model = build("NatForImageClassification", depths=[1, 1], num_heads=[1, 2])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((40, 56), (33, 47)):
        image = golden.tensor("image", (1, 3, *size))
        with torch.no_grad():
            torch.testing.assert_close(compiled(image).logits, model(image).logits)


def test_export():
    model = build("NatBackbone", out_features=["stage1", "stage3"])
    image = golden.tensor("image", (1, 3, 40, 56))
    exported = torch.export.export(model, (image,), dict(return_dict=False), strict=False).module()
    for found, expected in zip(exported(image, return_dict=False)[0], model(image).feature_maps, strict=True):
        torch.testing.assert_close(found, expected)


def test_trainer_learns_and_resumes(tmp_path):
    """The loop of transformers on four pictures of two colours: the loss falls, and its folder loads again."""
    pytest.importorskip("accelerate", reason="accelerate is missing: pip install 'nat_dense[hf]'")
    shades = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    pictures = [dict(pixel_values=s[:, None, None].expand(3, 32, 32), labels=i % 2) for i, s in enumerate(shades)]
    torch.manual_seed(0)
    model = hf.NatForImageClassification(hf.NatConfig(**SMALL | dict(num_labels=2, drop_path_rate=0.0)))
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=30,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=30,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=pictures)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 0.5
    assert losses[-1] < 0.05
    again = hf.NatForImageClassification.from_pretrained(tmp_path / "checkpoint-30")
    logits = again(torch.stack([p["pixel_values"] for p in pictures])).logits
    assert logits.argmax(-1).tolist() == [0, 1, 0, 1]
