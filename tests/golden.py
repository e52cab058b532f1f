"""The formula that fills weights and inputs for the golden cases, and how to build their models."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from nat_dense.ops import na2d

DATA = Path(__file__).parent / "data" / "golden"
FAMILIES = {"nat": "NAT", "dinats": "DiNAT_s", "nat_cls": "NATClassifier", "dinats_cls": "DiNATsClassifier"}
HF_FAMILIES = {"hf_model": "NatModel", "hf_backbone": "NatBackbone", "hf_cls": "NatForImageClassification"}


def load(case: str) -> tuple[dict, dict]:
    """The meta data and the arrays of a case."""
    with np.load(DATA / f"{case}.npz") as arrays:
        return json.loads(str(arrays["meta"])), {name: arrays[name] for name in arrays.files if name != "meta"}


def noise(name: str, shape) -> np.ndarray:
    """float64 array of mean 0 and variance 1 that depends on the name and shape alone."""
    p, count = 1_000_003, math.prod(shape)
    s = zlib.crc32(name.encode()) % 10_007
    j = np.arange(count, dtype=np.int64) % p
    h = (618_034 * (j * j % p) + (2 * s + 1) * 271_829 % p * j + 314_159 * s) % p
    return (math.sqrt(3) * (2 * (h + 0.5) / p - 1)).reshape(shape)


def tensor(name: str, shape, scale: float = 1.0, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy((noise(name, shape) * scale).astype(np.float32)).to(dtype)


def parameter(name: str, shape) -> torch.Tensor:
    """The value of a parameter of the original dense or classification model."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "rpb":
        scale, shift = 0.5, 0.0
    elif leaf.startswith("gamma"):
        scale, shift = 0.1, 0.5
    elif leaf == "bias":
        scale, shift = 0.1, 0.0
    elif len(shape) == 1:
        scale, shift = 0.1, 1.0
    else:
        scale, shift = 1 / math.sqrt(math.prod(shape[1:])), 0.0
    return torch.from_numpy((shift + scale * noise(name, tuple(shape))).astype(np.float32))


def fill(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(parameter(name, value.shape))
    return model


def build(meta: dict) -> torch.nn.Module:
    """The filled model of a case, in eval mode."""
    return fill(factory(meta["family"], meta["kwargs"])).eval()


def factory(family: str, kwargs: dict) -> torch.nn.Module:
    """One of our models from the original's fields; KeyError for a family that we don't have.

    "hf_model", "hf_backbone" and "hf_cls" are those for transformers, from `NatConfig`'s fields.
    """
    if family in HF_FAMILIES:
        from nat_dense import hf  # here, since transformers is optional

        return getattr(hf, HF_FAMILIES[family])(hf.NatConfig(**kwargs))
    from nat_dense import models  # here, since the operator's tests run without mmengine

    fields = dict(kwargs)
    if fields.pop("patch_norm", True) is not True:
        raise KeyError("patch_norm=False")
    return getattr(models, FAMILIES[family])(**fields)


def operator_errors(name: str, backend: str) -> dict[str, float]:
    """Errors of a back end in an operator case: output and gradients in float64, `na2d`'s layout made the case's."""
    meta, expected = load(name)
    shape = tuple(meta[n] for n in ("B", "heads", "H", "W", "dim"))
    kernel, dilation = (tuple(v) if isinstance(v, list) else v for v in (meta["kernel_size"], meta["dilation"]))
    kh, kw = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    prefix = f"op:{meta['id']}:"
    inputs = [tensor(prefix + "q", shape, shape[-1] ** -0.5), *(tensor(prefix + n, shape) for n in "kv")]
    inputs.append(tensor(prefix + "rpb", (shape[1], 2 * kh - 1, 2 * kw - 1), 0.5))
    leaves = [t.double().requires_grad_() for t in inputs]
    tokens = (t.permute(0, 2, 3, 1, 4) for t in leaves[:3])  # [B, heads, H, W, dim], the query scaled already
    out = na2d(*tokens, kernel, dilation, leaves[3], scale=1.0, backend=backend).permute(0, 3, 1, 2, 4)
    gradients = torch.autograd.grad(out, leaves, tensor(prefix + "g", shape).double())
    return {
        key: error(t, expected[key])
        for key, t in zip(("out", "dq", "dk", "dv", "drpb"), (out, *gradients), strict=True)
    }


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference over the expected values' standard deviation."""
    found = found.detach().double().numpy()
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / expected.std())


def strided(values: torch.Tensor, count: int = 512) -> torch.Tensor:
    """The samples that a case stores of a large array: all of it, or `count` evenly spaced."""
    flat = values.detach().flatten()
    return flat if flat.numel() <= count else flat[torch.arange(count) * flat.numel() // count]
