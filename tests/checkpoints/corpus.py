"""Files as they arrive: damaged, of other formats, hostile, of other models."""

import bz2
import functools
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from nat_dense.models import DiNAT_s, NATClassifier
from tests.checkpoints.files import tiny

STATE = tiny().state_dict()
MARKER = "code-was-run"


def torch_bytes(content, legacy=False):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


ZIP, LEGACY = torch_bytes(STATE), torch_bytes(STATE, legacy=True)


def safe_bytes(path: Path):
    save_file(dict(STATE), path)
    return path.read_bytes()


class Runs:
    """A pickle that runs a command when it is read."""

    def __init__(self, function=os.system, *args):
        self.function, self.args = function, args or (f"touch {MARKER}",)

    def __reduce__(self):
        return self.function, self.args


class Unknown:
    """A class that the reader has no reason to know."""


def raw_zip(data: bytes) -> bytes:
    """A PyTorch file around a hand-made pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def with_(name, value):
    return {**STATE, name: value}


def without(*names):
    return {name: value for name, value in STATE.items() if name not in names}


def prefixed(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return buffer.getvalue()


def plain_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "no weights here")
    return buffer.getvalue()


def script():
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Twice(), torch.zeros(1)), buffer)
    return buffer.getvalue()


def array_bytes():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def getattr_chain():
    """getattr(tuple, "__class__") and on: the usual way from an admitted name to a forbidden one."""
    return raw_zip(b"\x80\x02c__builtin__\ngetattr\nc__builtin__\ntuple\nX\x09\0\0\0__class__\x86R.")


def built_stand_in():
    """A stand-in that is called like a function: getattr("x", "y")(...)."""
    return raw_zip(b"\x80\x02c__builtin__\ngetattr\nX\x01\0\0\0xX\x01\0\0\0y\x86RX\x04\0\0\0exec\x85R.")


def swin():
    block = "layers.0.blocks.0.attn"
    return {f"{block}.relative_position_bias_table": torch.zeros(169, 3), f"{block}.qkv.weight": torch.zeros(9, 3)}


def resnet():
    return {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}


def nan(value):
    bad = STATE["levels.1.blocks.1.mlp.fc2.weight"].clone()
    bad[3, 5] = value
    return with_("levels.1.blocks.1.mlp.fc2.weight", bad)


def metadata_length(path, length):
    content = safe_bytes(path)
    return struct.pack("<Q", length) + content[8:]


def shifted_offsets(path):
    """A header whose tensors overlap."""
    content = safe_bytes(path)
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    name = next(n for n in header if n.startswith("levels"))
    header[name]["data_offsets"] = [0, 4]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


DAMAGED = r"is corrupt or not a (PyTorch|safetensors)|is empty|neither a PyTorch nor a safetensors"
CODE = "refused: reading it would run code, it asks for"

# name: (what the file holds, the message, or None where it is to be loaded)
BYTES = {
    "empty": (b"", "is empty; the download or copy was interrupted"),
    **{
        f"zip cut at {n}": (ZIP[:n], DAMAGED)
        for n in (1, 3, 4, 30, 64, 1000, len(ZIP) // 2, len(ZIP) - 22, len(ZIP) - 1)
    },
    **{f"legacy cut at {n}": (LEGACY[:n], DAMAGED) for n in (1, 2, 10, 20, 200, len(LEGACY) // 2, len(LEGACY) - 1)},
    "zip without its beginning": (ZIP[1:], "neither a PyTorch nor a safetensors file"),
    "zip with a hole": (ZIP[:400] + bytes(200) + ZIP[600:], DAMAGED),
    "zip of something else": (plain_zip(), DAMAGED),
    "web page": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "a web page; the download went wrong"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "gzip": (gzip.compress(ZIP), "gzip; unpack it first"),
    "bzip2": (bz2.compress(ZIP), "bzip2; unpack it first"),
    "xz": (lzma.compress(ZIP), "xz; unpack it first"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "numpy": (array_bytes(), "a NumPy array"),
    "tar": (tar(), "neither a PyTorch nor a safetensors file"),
    "text": (b"model = dict(type='NAT')\n", "neither a PyTorch nor a safetensors file"),
    "json": (b'{"state_dict": {}}', "neither a PyTorch nor a safetensors file"),
    "zeros": (bytes(4096), "neither a PyTorch nor a safetensors file"),
    "bare pickle": (pickle.dumps({"a": 1}, 2), DAMAGED),
    "torchscript": (script(), "is TorchScript, which is a program, not weights"),
    "runs a command": (torch_bytes({"state_dict": STATE, "meta": Runs()}), f"{CODE} (posix|nt).system"),
    "runs a command, legacy": (torch_bytes({"state_dict": STATE, "meta": Runs()}, legacy=True), f"{CODE} posix.system"),
    "runs a command, bare pickle": (pickle.dumps(Runs(), 2), f"{CODE} posix.system|{DAMAGED}"),
    "runs eval": (torch_bytes({"w": Runs(eval, "1")}), f"{CODE} eval"),
    "runs exec": (torch_bytes({"w": Runs(exec, "1")}), f"{CODE} exec"),
    "imports": (torch_bytes({"w": Runs(__import__, "os")}), f"{CODE} __import__"),
    "opens a file": (torch_bytes({"w": Runs(open, MARKER, "w")}), f"{CODE} .*open"),
    "loads again": (torch_bytes({"w": Runs(torch.load, "other.pth")}), f"{CODE} torch.serialization.load"),
    "partial": (torch_bytes({"w": functools.partial(os.system, "true")}), f"{CODE} functools.partial"),
    "getattr on a class": (getattr_chain(), f"{CODE} .*tuple|{DAMAGED}"),
    "call of a stand-in": (built_stand_in(), f"{CODE} the call of an object in it"),
    "own class": (torch_bytes({"state_dict": STATE, "config": Unknown()}), f"{CODE} .*Unknown"),
    "whole module": (torch_bytes(torch.nn.Linear(2, 2)), f"{CODE} torch.nn.modules.linear.Linear"),
    "path": (torch_bytes({"state_dict": STATE, "out": Path("x")}), f"{CODE} pathlib"),
}

CONTENT = {
    "as it should be": (STATE, None),
    "ordered": (OrderedDict(STATE), None),
    "parameters": ({name: torch.nn.Parameter(value) for name, value in STATE.items()}, None),
    "shared storage": (with_("norm0.bias", STATE["norm0.bias"].expand(2, 8)[0]), None),
    "transposed": (
        with_("levels.0.blocks.0.attn.proj.weight", STATE["levels.0.blocks.0.attn.proj.weight"].T.contiguous().T),
        None,
    ),
    "under state_dict": ({"state_dict": STATE, "epoch": 3}, None),
    "under model": ({"model": STATE, "optimizer": {"lr": 0.1}}, None),
    "with averages beside": ({"state_dict": STATE, "ema_state_dict": prefixed("module.")}, None),
    "averages alone": ({"state_dict_ema": STATE}, None),
    "ddp": ({"state_dict": prefixed("module.")}, None),
    "compiled": (prefixed("_orig_mod."), None),
    "ddp around compiled": (prefixed("module._orig_mod."), None),
    "inside a detector": ({"state_dict": prefixed("backbone.") | {"neck.weight": torch.ones(1)}}, None),
    "inside something else": (prefixed("encoder.image."), None),
    "float16": ({name: value.half() for name, value in STATE.items()}, None),
    "bfloat16": ({name: value.bfloat16() for name, value in STATE.items()}, None),
    "float64": ({name: value.double() for name, value in STATE.items()}, None),
    "integers": (
        with_("norm0.bias", torch.zeros(8, dtype=torch.int8)),
        "of a different kind of number: norm0.bias int8",
    ),
    "nan": (nan(float("nan")), "levels.1.blocks.1.mlp.fc2.weight: 1 of 512 values are NaN or infinite"),
    "infinity": (nan(float("inf")), "1 of 512 values are NaN or infinite"),
    "wrong shape": (
        with_("norm2.weight", torch.ones(31)),
        r"1 of a different shape: norm2.weight \(31,\), the model's \(32,\)",
    ),
    "transposed shape": (with_("levels.0.blocks.0.mlp.fc1.weight", torch.ones(8, 16)), "of a different shape"),
    "missing": (without("levels.2.blocks.0.attn.qkv.bias"), "1 missing: levels.2.blocks.0.attn.qkv.bias"),
    "missing stem": (
        without("patch_embed.norm.weight", "patch_embed.proj.0.weight"),
        "the weights don't fit the model: 2 missing: patch_embed.proj.0.weight",
    ),
    "missing block": (
        {name: value for name, value in STATE.items() if "levels.1.blocks.1" not in name},
        r"depths \(1, 1, 1, 1\) weights, \(1, 2, 1, 1\) model",
    ),
    "missing stage": ({name: value for name, value in STATE.items() if "levels.3" not in name}, "depths .* weights"),
    "missing output norm": (without("norm1.weight", "norm1.bias"), "2 missing: norm1.weight, norm1.bias"),
    "extra": (with_("levels.0.blocks.0.attn.rpb2", torch.zeros(1)), "1 not in the model: levels.0.blocks.0.attn.rpb2"),
    "misspelt": (
        without("norm0.weight") | {"norm0.wieght": STATE["norm0.weight"]},
        "1 missing: norm0.weight; 1 not in the model: norm0.wieght",
    ),
    "half a prefix": (
        {("module." if i % 2 else "") + name: value for i, (name, value) in enumerate(STATE.items())},
        "2 backbones in one file",
    ),
    "two models": (
        prefixed("student.") | prefixed("teacher."),
        "2 backbones in one file, under 'student.', 'teacher.'",
    ),
    "swin": (swin(), "no NAT, DiNAT or DiNAT_s among 2 tensors: it looks like a Swin Transformer"),
    "resnet": (resnet(), "it looks like a ResNet"),
    "vit": ({"cls_token": torch.zeros(1, 1, 8), "blocks.0.attn.qkv.weight": torch.zeros(24, 8)}, "it looks like a ViT"),
    "convnext": ({"stages.0.0.gamma": torch.zeros(8)}, "it looks like a ConvNeXt"),
    "isotropic": ({"blocks.0.attn.rpb": torch.zeros(2, 13, 13)}, "an isotropic NAT"),
    "without position biases": (
        {name: value for name, value in STATE.items() if not name.endswith("rpb")},
        "a NAT trained without relative position biases",
    ),
    "something else": ({"w": torch.zeros(2), "b": torch.zeros(2)}, "the first are w, b"),
    "dinat_s": (tiny(DiNAT_s).state_dict(), "DiNAT_s weights, NAT or DiNAT model"),
    "wider": (tiny(embed_dim=16).state_dict(), "embed_dim 16 weights, 8 model"),
    "other kernel": (tiny(kernel_size=5).state_dict(), "kernel_size 5 weights, 3 model"),
    "layer scale": (tiny(layer_scale=1e-5).state_dict(), "layer_scale True weights, False model"),
    "classifier": (tiny(NATClassifier, num_classes=4).state_dict(), None),
    "optimizer only": (
        {"optimizer": {"state": {}}, "epoch": 2},
        r"has no named tensors; it holds optimizer, epoch. Is it a training state",
    ),
    "no weights": ({}, "has no named tensors; it holds nothing"),
    "empty state dict": ({"state_dict": {}}, "has no named tensors; it holds state_dict"),
    "list": (list(STATE.values()), "holds a list, not named weights"),
    "one tensor": (torch.zeros(3), "holds a Tensor, not named weights"),
    "numbers among tensors": (with_("epoch", 3), r"mixes weights with 1 other values: epoch \(int\)"),
    "arrays": (
        {name: value.numpy() for name, value in STATE.items()},
        "has no named tensors; it holds patch_embed.proj.0.weight",
    ),
    "sparse": (with_("norm0.bias", torch.zeros(8).to_sparse()), "norm0.bias is sparse or quantized"),
}
