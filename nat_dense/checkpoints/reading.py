"""Reads checkpoint files as data: nothing in a file is run, unless the user explicitly trusts it.

safetensors files hold only tensors. PyTorch files are pickles and are read with `weights_only=True`, which admits
tensors and plain Python values. Objects that mm's training loops, timm and NumPy store beside the weights are replaced
by stand-ins that only keep what they are given, so that reading imports none of those libraries. A file that refers to
anything else is refused, and the message says to what.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHT_ENTRIES = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "state_dict_ema",
    "ema_state_dict",
    "module",
)
"""Where training loops store the weights, in order of preference: mm, most others, averaged weights last."""
DIRECTORY_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The weights in a folder written by transformers, in the order in which transformers looks for them."""


class StandIn:
    """Replaces an object whose class is known to be harmless and whose content is not needed."""

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


STAND_INS: tuple[tuple[Callable, str], ...] = (
    # NumPy 1 and 2: losses and scores in `meta`.
    *(
        (StandIn, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    (StandIn, "numpy.ndarray"),
    (StandIn, "numpy.dtype"),
    # mmcv 1.x and mmengine: the config (its dicts are dicts) and the loss history with the names of its methods.
    (StandIn, "mmcv.utils.config.Config"),
    (OrderedDict, "mmcv.utils.config.ConfigDict"),
    (StandIn, "mmengine.config.config.Config"),
    (OrderedDict, "mmengine.config.config.ConfigDict"),
    (OrderedDict, "addict.addict.Dict"),
    (StandIn, "mmengine.logging.history_buffer.HistoryBuffer"),
    (StandIn, "builtins.getattr"),
    # timm and its descendants save their command line, Swin its yacs config.
    (StandIn, "argparse.Namespace"),
    (OrderedDict, "yacs.config.CfgNode"),
)
"""(what is used instead, the name in the file). Nothing here calls, imports or looks up anything."""

_MAGIC = (
    (b"<", "a web page; the download went wrong"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"\x89HDF", "HDF5 (Keras?)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "gzip; unpack it first"),
    (b"BZh", "bzip2; unpack it first"),
    (b"\xfd7zXZ", "xz; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file, under the file's own names.

    Attributes:
        path: The file.
        container: "torch" or "safetensors".
        tensors: Name to tensor; mapped from the file where the format allows it, so don't write to them.
        entry: The entry of the file that held the weights; "" if they are the whole file.
        extras: The other entries ("meta", "optimizer", ...).
    """

    path: Path
    container: str
    tensors: dict[str, Tensor]
    entry: str = ""
    extras: dict[str, Any] = field(default_factory=dict)


def read(path: str | Path, *, trust: bool = False, sha256: str | None = None, entry: str | None = None) -> Checkpoint:
    """Reads the weights of a local checkpoint: a PyTorch or safetensors file, an index of shards, or a folder with one.

    Args:
        path: The file or folder.
        trust: Whether to run the code that a PyTorch file may contain, if it can't be read otherwise. Only for files
            that you made.
        sha256: The file's expected hash, in hexadecimal. Not for sharded files.
        entry: Which entry holds the weights, if the file has several, such as "state_dict_ema".

    Raises:
        FileNotFoundError: There is no such file, or a shard is missing.
        ValueError: The file is corrupt, has a different format or hash, needs code to be run, or has no weights.
    """
    path = _find_file(Path(path))
    if sha256 is not None:
        check_sha256(path, sha256)
    if path.name.endswith(".index.json"):
        return _read_shards(path, trust)
    if is_safetensors(path):
        return Checkpoint(path, "safetensors", _read_safetensors(path))
    return _weights_of(path, read_torch(path, trust=trust), entry)


def read_torch(
    path: str | Path,
    *,
    trust: bool = False,
    admit: Iterable[tuple[Callable, str]] = (),
    map_location: Any = "cpu",
    mapped: bool = True,
) -> Any:
    """Reads the whole content of a PyTorch file, as data.

    Args:
        path: A file written by `torch.save`.
        trust: As in `read`.
        admit: (what to use, its name in the file), in addition to `STAND_INS` or overriding them.
        map_location: As in `torch.load`.
        mapped: Whether tensors may be mapped from the file, which must then not be written to while they live.

    Raises:
        ValueError: The file is corrupt, or needs code to be run.
    """
    path = Path(path)
    # torch.load goes by the name where it gets one, and maps only files that it gets by name.
    mapped = mapped and _is_zip(path) and path.suffix != ".safetensors"
    # Read as data if possible, trusted or not: the stand-ins need none of the libraries that the file refers to.
    for as_data in (True, False) if trust else (True,):
        narrowed = _only_admitting(*STAND_INS, *admit)
        with _ONE_AT_A_TIME, narrowed, _obeying(weights_only=as_data), path.open("rb") as file:
            try:
                source = path if mapped else file
                return torch.load(source, map_location=map_location, weights_only=as_data, mmap=mapped)
            except Exception as error:
                reason = error
    raise ValueError(_refusal(path, reason)) from reason


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors or a PyTorch file, judging by its first bytes.

    Raises:
        ValueError: It is neither; the message says what it looks like.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty; the download or copy was interrupted")
    pickled = head.startswith((b"PK\x03\x04", b"\x80"))
    # A header may be 128 bytes long, and begin like a pickle.
    if head[8:9] == b"{" and (not pickled or int.from_bytes(head[:8], "little") <= path.stat().st_size):
        return True
    if pickled:
        return False
    for magic, meaning in _MAGIC:
        if head.lstrip().startswith(magic):
            raise ValueError(f"{path} is not a checkpoint but {meaning}")
    if path.name == "last_checkpoint":
        raise ValueError(f"{path} is a pointer file, not a checkpoint; pass the file it names: {_named_in(path)}")
    raise ValueError(f"{path} is neither a PyTorch nor a safetensors file (it starts with {head[:8]!r})")


def check_sha256(path: Path, expected: str) -> None:
    """Raises ValueError unless the file's SHA-256 starts with `expected` (at least 8 hexadecimal digits)."""
    if not re.fullmatch(r"[0-9a-fA-F]{8,64}", expected):
        raise ValueError(f"sha256={expected!r}: expected 8 to 64 hexadecimal digits")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    found = digest.hexdigest()
    if not found.startswith(expected.lower()):
        raise ValueError(f"{path} has SHA-256 {found}, expected {expected}: it is corrupt or not the intended file")


_ONE_AT_A_TIME = threading.RLock()
"""Both of the following change state that is global to the process."""


@contextmanager
def _only_admitting(*admitted: tuple[Callable, str]) -> Iterator[None]:
    """Narrows PyTorch's process-wide allow-list to these names; if one is repeated, the last entry wins."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(value, name) for name, value in {n: v for v, n in admitted}.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


@contextmanager
def _obeying(*, weights_only: bool) -> Iterator[None]:
    """Makes `torch.load(weights_only=False)` effective even if PyTorch's environment variable forces the opposite."""
    forced = None if weights_only else os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
    try:
        yield
    finally:
        if forced is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = forced


def _find_file(path: Path) -> Path:
    if path.is_dir():
        for name in DIRECTORY_FILES:
            if (path / name).is_file():
                return path / name
        last = path / "last_checkpoint"  # of a work-dir
        if last.is_file():
            raise FileNotFoundError(f"{path} is a folder; pass the checkpoint in it: {_named_in(last)}")
        raise FileNotFoundError(f"{path} is a folder without weights; expected one of {', '.join(DIRECTORY_FILES)}")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    return path


def _named_in(note: Path) -> str:
    return note.read_text(encoding="utf-8", errors="replace").strip()


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _refusal(path: Path, error: Exception) -> str:
    """The message for the user about an error of torch.load."""
    text = " ".join(str(error).split())
    named = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", text)
    if named or "unrecognized function" in text:
        wanted = named[1] if named else "the call of an object in it"
        return (
            f"{path} refused: reading it would run code, it asks for {wanted}. If you made this file or trust whoever "
            "did, use --trust on the command line, or trust=True in Python and in init_cfg"
        )
    if isinstance(error, ModuleNotFoundError):
        return f"{path} refused: it holds objects of {error.name!r}, which is not installed"
    if "TorchScript" in text:
        return f"{path} is TorchScript, which is a program, not weights; save the state_dict of its model"
    if isinstance(error, (EOFError, IndexError)):
        text = "unexpected end of file"
    elif isinstance(error, UnpicklingError):
        text = "invalid pickle"
    reason = re.sub(r"^\[enforce fail.*?\] ?\.? ?", "", text).split(". ")[0] or type(error).__name__
    return f"{path} is corrupt or not a PyTorch checkpoint: {reason}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or not a safetensors file: {error}") from error


def _read_shards(index: Path, trust: bool) -> Checkpoint:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        plain = all(name == Path(name).name for name in names)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{index} is not an index of shards: expected JSON with a 'weight_map' of file names"
        ) from error
    if not names or not plain:
        raise ValueError(f"{index} names {names[:3]}: expected files beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {len(names)} shards, {len(missing)} missing: {', '.join(missing[:3])}")
    shards = {name: read(index.parent / name, trust=trust) for name in names}
    absent = [key for key, name in weight_map.items() if key not in shards[name].tensors]
    if absent:
        raise ValueError(f"{index} places {absent[0]} in {weight_map[absent[0]]}, which does not contain it")
    tensors: dict[str, Tensor] = {}
    for name, shard in shards.items():
        strays = [key for key in shard.tensors if weight_map.get(key) != name]
        if strays:
            raise ValueError(f"{index.parent / name} holds {strays[0]}, which {index.name} does not place there")
        tensors |= shard.tensors
    return Checkpoint(index, shards[names[0]].container, tensors)


def _weights_of(path: Path, content: Any, entry: str | None) -> Checkpoint:
    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not named weights")
    entries = [name for name in WEIGHT_ENTRIES if isinstance(content.get(name), Mapping)]
    if entry is None and entries:
        entry = entries[0]
    if entry is None:
        weights, extras = content, {}
    elif isinstance(content.get(entry), Mapping):
        weights, extras = content[entry], {name: value for name, value in content.items() if name != entry}
    else:
        raise ValueError(f"{path} has no weights under {entry!r}; it has {', '.join(map(repr, content)) or 'nothing'}")
    others = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if len(others) == len(weights):
        held = ", ".join(map(str, list(content)[:6])) or "nothing"
        state = " Is it a training state without the model?" if {"optimizer", "epoch", "iter"} & set(content) else ""
        raise ValueError(f"{path} has no named tensors; it holds {held}.{state}")
    if others or any(not isinstance(name, str) for name in weights):
        names = ", ".join(f"{name} ({type(weights[name]).__name__})" for name in others[:3])
        raise ValueError(f"{path} mixes weights with {len(others)} other values: {names}. Expected only named tensors")
    for name, value in weights.items():
        if value.layout != torch.strided or value.is_quantized:
            raise ValueError(f"{path}: {name} is sparse or quantized; expected a plain tensor")
    return Checkpoint(path, "torch", dict(weights), entry or "", extras)
