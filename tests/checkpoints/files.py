"""Checkpoints as others write them: transformers' names and shards, mm 2.x training states, timm's."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import addict
import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file

from nat_dense.models import NAT
from tests import golden

TINY = dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3, mlp_ratio=2.0)


def tiny(cls=NAT, **fields):
    """The smallest model with every kind of tensor; filled."""
    return golden.fill(cls(**{**TINY, **fields}))


def hf_state(config: dict, kind: str) -> dict[str, torch.Tensor]:
    """What a filled Nat or Dinat of transformers saves: written down from its modules, not by our key map.

    Args:
        config: Its fields, as in the golden file's meta data.
        kind: "backbone" with all output norms and the stem's, "model", or "nat" or "dinat" for a classifier.
    """
    dim, k = config["embed_dim"], config["kernel_size"]
    state: dict[str, torch.Tensor] = {}

    def put(theirs: str, ours: str, *shape: int) -> None:
        state[theirs] = golden.parameter(ours, shape)

    def norm(theirs: str, ours: str, size: int) -> None:
        put(f"{theirs}.weight", f"{ours}.weight", size)
        put(f"{theirs}.bias", f"{ours}.bias", size)

    def dense(theirs: str, ours: str, *shape: int) -> None:
        put(f"{theirs}.weight", f"{ours}.weight", *shape)
        put(f"{theirs}.bias", f"{ours}.bias", shape[0])

    convolutions = "embeddings.patch_embeddings.projection"
    dense(f"{convolutions}.0", "patch_embed.proj.0", dim // 2, 3, 3, 3)
    dense(f"{convolutions}.1", "patch_embed.proj.1", dim, dim // 2, 3, 3)
    norm("embeddings.norm", "patch_embed.norm", dim)
    for i, (depth, heads) in enumerate(zip(config["depths"], config["num_heads"], strict=True)):
        c = dim * 2**i
        hidden = int(c * config["mlp_ratio"])
        for j in range(depth):
            theirs, ours = f"encoder.levels.{i}.layers.{j}", f"levels.{i}.blocks.{j}"
            if config["layer_scale_init_value"] > 0:
                rows = [golden.parameter(f"{ours}.gamma{n}", (c,)) for n in (1, 2)]
                state[f"{theirs}.layer_scale_parameters"] = torch.stack(rows)
            norm(f"{theirs}.layernorm_before", f"{ours}.norm1", c)
            put(f"{theirs}.attention.self.rpb", f"{ours}.attn.rpb", heads, 2 * k - 1, 2 * k - 1)
            for kind_, shape in (("weight", (3 * c, c)), ("bias", (3 * c,))):
                fused = golden.parameter(f"{ours}.attn.qkv.{kind_}", shape)
                for n, part in enumerate(("query", "key", "value")):
                    state[f"{theirs}.attention.self.{part}.{kind_}"] = fused[n * c : (n + 1) * c].clone()
            dense(f"{theirs}.attention.output.dense", f"{ours}.attn.proj", c, c)
            norm(f"{theirs}.layernorm_after", f"{ours}.norm2", c)
            dense(f"{theirs}.intermediate.dense", f"{ours}.mlp.fc1", hidden, c)
            dense(f"{theirs}.output.dense", f"{ours}.mlp.fc2", c, hidden)
        if i < len(config["depths"]) - 1:
            down = f"levels.{i}.downsample"
            put(f"encoder.{down}.reduction.weight", f"{down}.reduction.weight", 2 * c, c, 3, 3)
            norm(f"encoder.{down}.norm", f"{down}.norm", 2 * c)
    if kind == "backbone":
        norm("hidden_states_norms.stem", "norm_stem", dim)
        for i in range(len(config["depths"])):
            norm(f"hidden_states_norms.stage{i + 1}", f"norm{i}", dim * 2**i)
        return state
    norm("layernorm", "norm", c)
    if kind == "model":
        return state
    state = {f"{kind}.{name}": value for name, value in state.items()}
    dense("classifier", "head", config["num_labels"], c)
    return state


def write_shards(folder: Path, state: dict[str, torch.Tensor], suffix: str = "safetensors") -> Path:
    """Three shards and their index, as transformers writes them; returns the index."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, weight_map = list(state), {}
    for i in range(3):
        file = f"{stem}-{i + 1:05}-of-00003.{suffix}"
        part = {name: state[name] for name in names[i::3]}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


@contextlib.contextmanager
def modules(**contents: dict[str, type]) -> Iterator[None]:
    """Lets classes be pickled as if they came from modules that aren't installed (a__b__c is a.b.c)."""
    before = dict(sys.modules)
    for name, members in contents.items():
        name = name.replace("__", ".")
        for i in range(1, name.count(".") + 2):
            sys.modules.setdefault(".".join(name.split(".")[:i]), types.ModuleType(name))
        sys.modules[name] = types.ModuleType(name)
        for member, value in members.items():
            value.__module__, value.__qualname__, value.__name__ = name, member, member
            setattr(sys.modules[name], member, value)
    try:
        yield
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)


class _ConfigDict(addict.Dict):
    pass


class _Config:
    """mmcv 1.x's: state is (dict, file name, text)."""

    def __init__(self, cfg_dict):
        self.cfg_dict = cfg_dict

    def __getstate__(self):
        return self.cfg_dict, "config.py", "model = dict()"

    def __setstate__(self, state):
        raise AssertionError("mmcv's own code must not run")


def _scalar(*args):
    raise AssertionError("numpy's own code must not run")


class _OldScalar:
    """A float as NumPy 1 pickled it."""

    def __reduce__(self):
        return _scalar, (np.dtype("f8"), np.float64(0.5).tobytes())


def write_mm2(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A training state of mmdet 2.x or mmseg 0.x, with everything that such files were seen to carry."""
    history = HistoryBuffer([1.0, 0.5], [1, 1])
    with modules(
        mmcv__utils__config=dict(Config=_Config, ConfigDict=_ConfigDict), numpy__core__multiarray=dict(scalar=_scalar)
    ):
        cfg = _ConfigDict(model=_ConfigDict(type="MaskRCNN", backbone=_ConfigDict(type="NAT")))
        meta = dict(
            mmdet_version="2.19.0+",
            config="model = dict(type='MaskRCNN')",
            cfg=_Config(cfg),
            seed=np.int64(7),
            CLASSES=("person", "bicycle"),
            PALETTE=[(220, 20, 60), (119, 11, 32)],
            hook_msgs=dict(best_score=np.float64(0.51), last=_OldScalar(), lr=np.arange(3.0)),
            history=history,
            args=Namespace(lr=1e-4),
            epoch=36,
        )
        state = dict(state={0: dict(step=7, exp_avg=torch.ones(2))}, param_groups=[dict(lr=1e-4, params=[0])])
        torch.save(dict(meta=meta, state_dict=weights, optimizer=state), path)
    return path
