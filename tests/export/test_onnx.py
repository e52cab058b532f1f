"""ONNX files against the models that they were made of, in onnxruntime."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nat_dense.export import export_onnx
from nat_dense.models import NAT, DiNAT, DiNAT_s
from nat_dense.ops import na2d, reference
from tests.ops.cases import CASES

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")

SMALL = dict(embed_dim=16, depths=[1, 2], num_heads=[1, 2], out_indices=(0, 1))
QUICK = ("kernel pair", "ragged groups", "padded, dilated", "views of a fused qkv")


def run(path, *inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [found.name for found in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))


def operators(path):
    model = onnx.load(path)
    assert not model.functions
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    return [node.op_type for node in model.graph.node if node.domain == ""], model


class Operator(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case

    def forward(self, *tensors):
        given = iter(tensors)
        arguments = {name: next(given) for name in ("query", "key", "value")}
        if self.case.rpb:
            arguments["rpb"] = next(given)
        if self.case.padded:
            arguments |= {"pad_key": next(given), "pad_value": next(given)}
        return na2d(kernel_size=self.case.kernel_size, dilation=self.case.dilation, **arguments)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[] if c.name in QUICK else pytest.mark.slow) for c in CASES]
)
def test_the_operator_is_the_reference(case, tmp_path):
    """With open sizes where the padding is given: the file then has not seen the size that it is run at."""
    from nat_dense.export.translations import TRANSLATIONS

    tensors = case.tensors(torch.float32)
    tensors.pop("grad_out")
    arguments = tuple(t.detach().contiguous() for t in tensors.values() if t is not None)
    traced, sizes = arguments, None
    if case.padded:
        shape = (2, 60, 70, *arguments[0].shape[3:])
        traced = (*torch.randn(3, *shape).unbind(0), *arguments[3:])
        sizes = ((*[dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)] * 3, *[None] * (len(arguments) - 3)),)
    program = torch.export.export(Operator(case), traced, dynamic_shapes=sizes)
    torch.onnx.export(program, (), tmp_path / "op.onnx", opset_version=18, custom_translation_table=TRANSLATIONS)
    (found,) = run(tmp_path / "op.onnx", *arguments)
    settings = (case.kernel_size, case.dilation, case.dim**-0.5)
    wanted, _ = reference.forward(*(None if t is None else t.detach() for t in tensors.values()), *settings)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


class Pooled(nn.Module):
    def forward(self, image):
        return tuple(F.adaptive_avg_pool2d(image, bins) for bins in (1, 2, 3, (6, 5)))


def test_adaptive_pooling_of_any_size(tmp_path):
    path = tmp_path / "pool.onnx"
    export_onnx(Pooled().eval(), path, (7, 11), dynamic=True)
    for size in ((1, 3, 7, 11), (2, 3, 4, 2), (1, 3, 30, 29)):
        image = torch.randn(size)
        for found, wanted in zip(run(path, image), Pooled()(image), strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "size"),
    [
        pytest.param(lambda: NAT(**SMALL, layer_scale=0.5), (64, 72), marks=pytest.mark.slow),
        (lambda: DiNAT(**SMALL, dilations=[[2], [1, 5]]), (75, 130)),  # maps smaller than 7 * 5
        (lambda: DiNAT_s(**SMALL, dilations=[[1], [3, 1]], qkv_bias=False), (67, 90)),
    ],
    ids=["NAT", "DiNAT", "DiNAT_s"],
)
def test_backbones_of_a_fixed_size(model, size, tmp_path):
    torch.manual_seed(0)
    model = model().eval()
    exported = export_onnx(model, tmp_path / "model.onnx", size, metadata={"author": "us"})
    assert exported.outputs == ("map_0", "map_1")
    assert list(exported.differences) == [(1, 3, *size)]
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        for found, wanted in zip(run(exported.path, image), model(image), strict=True):
            assert np.abs(found - wanted.numpy()).max() < 1e-4
    names, file = operators(exported.path)
    assert names.count("Softmax") == 3
    assert {prop.key: prop.value for prop in file.metadata_props}["author"] == "us"
    assert b"site-packages" not in exported.path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("family", [NAT, DiNAT_s])
def test_backbones_of_any_size(family, tmp_path):
    torch.manual_seed(0)
    model = family(**SMALL, dilations=[[2], [1, 3]]).eval()
    exported = export_onnx(model, tmp_path / "model.onnx", (96, 64), dynamic=True)
    assert list(exported.differences) == [(1, 3, 96, 64), (2, 3, 65, 35)]
    for size in ((1, 3, 1, 1), (3, 3, 33, 31), (1, 3, 130, 257)):
        image = torch.randn(size)
        with torch.no_grad():
            for found, wanted in zip(run(exported.path, image), model(image), strict=True):
                assert found.shape == tuple(wanted.shape)
                assert np.abs(found - wanted.numpy()).max() < 1e-4
    _, file = operators(exported.path)
    sizes = [dim.dim_param or dim.dim_value for dim in file.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, "height", "width"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


class TwoFaced(nn.Module):
    """Does one thing when it is traced and another when it runs."""

    def forward(self, image):
        return image + 1 if torch.compiler.is_exporting() else image


def test_a_file_that_differs_is_not_left_behind(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"output for an image of shape \(1, 3, 8, 8\) differs by .*; expected at most"
    ):
        export_onnx(TwoFaced().eval(), tmp_path / "model.onnx", (8, 8))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_overwritten_unasked(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="exists; choose another name, or allow overwriting"):
        export_onnx(nn.Identity().eval(), path, (8, 8))
    assert path.read_text() == "precious"
    assert export_onnx(nn.ReLU().eval(), path, (8, 8), overwrite=True).outputs == ("output",)
    assert run(path, torch.full((1, 3, 8, 8), -1.0))[0].max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "model.pt"}, "expected a name that ends in .onnx"),
        ({"image_size": (0, 8)}, r"image_size=\(0, 8\): expected a height and a width"),
        ({"image_size": (8,)}, r"image_size=\(8,\): expected a height and a width"),
        ({"model": nn.Conv2d(3, 4, 1).train()}, "the model is in training mode"),
        ({"model": nn.Conv2d(3, 4, 1).half().eval()}, "weight is torch.float16 on cpu; expected float32 on the CPU"),
        ({"model": nn.Conv2d(4, 4, 1).eval()}, "torch.export can't export Conv2d"),
        ({"output_names": ["a", "b"]}, r"output_names=\['a', 'b'\]: the model has 1 outputs"),
    ],
)
def test_arguments_that_do_not_fit(changes, message, tmp_path):
    arguments = {"model": nn.ReLU().eval(), "image_size": (8, 8)} | changes
    path = tmp_path / arguments.pop("path", "model.onnx")
    with pytest.raises(ValueError, match=message):
        export_onnx(path=path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        export_onnx(nn.ReLU().eval(), tmp_path / "no" / "model.onnx", (8, 8))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("nat_dense.export.onnx.find_spec", lambda name: None if "onnxr" in name else found(name))
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxruntime: install it with `pip install onnxruntime`"):
        export_onnx(nn.ReLU().eval(), tmp_path / "model.onnx", (8, 8))
