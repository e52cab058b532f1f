"""The corpus: each file is loaded right, or refused by name.

None may run code, change the model that it was meant for, or leave a file behind.
"""

import copyreg
import random
import struct
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nat_dense import checkpoints
from nat_dense.models import NAT
from tests.checkpoints.corpus import (
    BYTES,
    CODE,
    CONTENT,
    DAMAGED,
    LEGACY,
    MARKER,
    STATE,
    ZIP,
    Unknown,
    metadata_length,
    safe_bytes,
    shifted_offsets,
)
from tests.checkpoints.files import TINY, tiny, write_shards


@pytest.fixture
def model():
    return NAT(**TINY)


def check(path: Path, model, message: str | None):
    """Loads and converts; an expected message must come from both."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = path.parent / "out"
    out.mkdir(exist_ok=True)
    if message is None:
        report = checkpoints.load(model, path)
        assert len(report.used) + len(report.absent) == len(before)
        for name in report.used:
            assert torch.allclose(model.state_dict()[name], STATE[name], rtol=8e-3, atol=1e-2), name
        checkpoints.convert(path, out / "dense.safetensors", "dense")
        assert [file.name for file in out.iterdir()] == ["dense.safetensors"]
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            checkpoints.load(model, path)
        assert path.parent.name in str(caught.value), "the message names the file"
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        if not isinstance(caught.value, FileNotFoundError) and "model" not in str(caught.value):
            with pytest.raises(ValueError, match=message):
                checkpoints.convert(path, out / "dense.safetensors", "dense")
            assert not list(out.iterdir())


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob(MARKER))


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
@pytest.mark.parametrize("name", BYTES)
def test_bytes(tmp_path, model, name):
    content, message = BYTES[name]
    (tmp_path / "file.pth").write_bytes(content)
    check(tmp_path / "file.pth", model, message)


@pytest.mark.parametrize("name", CONTENT)
def test_content(tmp_path, model, name):
    content, message = CONTENT[name]
    torch.save(content, tmp_path / "file.pth")
    check(tmp_path / "file.pth", model, message)


@pytest.mark.parametrize("at", [1, 7, 8, 9, 100, 0.5, -1])
def test_truncated_safetensors(tmp_path, model, at):
    content = safe_bytes(tmp_path / "whole")
    cut = int(len(content) * at) if isinstance(at, float) else at
    (tmp_path / "file.safetensors").write_bytes(content[:cut])
    check(tmp_path / "file.safetensors", model, DAMAGED)


@pytest.mark.parametrize("length", [0, 1, 1 << 40, (1 << 64) - 1])
def test_safetensors_with_a_wrong_header_length(tmp_path, model, length):
    (tmp_path / "file.safetensors").write_bytes(metadata_length(tmp_path / "whole", length))
    check(tmp_path / "file.safetensors", model, DAMAGED)


def test_safetensors_whose_tensors_overlap(tmp_path, model):
    (tmp_path / "file.safetensors").write_bytes(shifted_offsets(tmp_path / "whole"))
    check(tmp_path / "file.safetensors", model, DAMAGED)


def test_the_name_does_not_matter(tmp_path, model):
    save_file(dict(STATE), tmp_path / "safetensors-inside.pth")
    check(tmp_path / "safetensors-inside.pth", model, None)
    torch.save(STATE, tmp_path / "pytorch-inside.safetensors")
    checkpoints.load(model, tmp_path / "pytorch-inside.safetensors")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_random_damage_is_refused_or_harmless(tmp_path, model, kind):
    """Changed bytes in headers, pickles and tables may be refused or, where they are values, loaded; nothing else."""
    whole = {"zip": ZIP, "legacy": LEGACY}.get(kind) or safe_bytes(tmp_path / "whole")
    draw = random.Random(0)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 4, 32])):
            near = draw.randrange(8000)
            damaged[draw.choice([near, len(whole) - 1 - near])] = draw.randrange(256)
        (tmp_path / "file").write_bytes(damaged)
        try:
            checkpoints.load(model, tmp_path / "file")
            outcomes.add("loaded")
        except ValueError:
            outcomes.add("refused")
    assert "refused" in outcomes


@pytest.mark.parametrize("low_byte", [0x80, 0x50, 0x3C])
def test_header_length_that_begins_like_another_format(tmp_path, model, low_byte):
    content = safe_bytes(tmp_path / "whole")
    size = struct.unpack("<Q", content[:8])[0]
    padding = (low_byte - size) % 256
    text = content[8 : 8 + size] + b" " * padding
    content = struct.pack("<Q", len(text)) + text + content[8 + size :]
    assert content[0] == low_byte
    (tmp_path / "file.safetensors").write_bytes(content)
    check(tmp_path / "file.safetensors", model, None)


def _missing_shard(folder, index):
    (folder / "model-00002-of-00003.safetensors").unlink()


def _incomplete_shard(folder, index):
    save_file({"stray": torch.zeros(1)}, folder / "model-00002-of-00003.safetensors")


def _damaged_shard(folder, index):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _stray(folder, index):
    path = folder / "model-00002-of-00003.safetensors"
    save_file({**checkpoints.read(path).tensors, "stray": torch.zeros(1)}, folder / "new")
    (folder / "new").replace(path)


def _not_json(folder, index):
    index.write_text("weights")


def _no_map(folder, index):
    index.write_text('{"metadata": {}}')


def _outside(folder, index):
    index.write_text('{"weight_map": {"w": "../secret.safetensors"}}')


def _empty_map(folder, index):
    index.write_text('{"weight_map": {}}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, index: None, None),
        (_missing_shard, "names 3 shards, 1 missing: model-00002-of-00003.safetensors"),
        (_incomplete_shard, "which does not contain it"),
        (_damaged_shard, "model-00002-of-00003.safetensors is corrupt or not a safetensors file"),
        (_stray, "holds stray, which model.safetensors.index.json does not place there"),
        (_not_json, "is not an index of shards"),
        (_no_map, "is not an index of shards"),
        (_outside, r"names \['../secret.safetensors'\]: expected files beside it"),
        (_empty_map, r"names \[\]: expected files beside it"),
    ],
)
def test_shards(tmp_path, model, change, message):
    index = write_shards(tmp_path, dict(STATE))
    change(tmp_path, index)
    check(index, model, message)


def test_folder_without_weights(tmp_path, model):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is a folder without weights; expected one of model.safetensors"):
        checkpoints.load(model, tmp_path / "empty")


def test_missing_file(model):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'nat-tinny': .* Did you mean .*nat-tiny"):
        checkpoints.load(model, "nat-tinny")


def test_hash(tmp_path, model):
    torch.save(STATE, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"has SHA-256 [0-9a-f]{64}, expected 00112233"):
        checkpoints.load(model, tmp_path / "a.pth", sha256="00112233")
    with pytest.raises(ValueError, match="expected 8 to 64 hexadecimal digits"):
        checkpoints.load(model, tmp_path / "a.pth", sha256="sha")


def test_trust_runs_what_the_user_vouches_for(tmp_path, model):
    holder = types.SimpleNamespace(note="mine")
    copyreg.pickle(types.SimpleNamespace, lambda value: (types.SimpleNamespace, (), vars(value)))
    torch.save({"state_dict": STATE, "config": holder}, tmp_path / "mine.pth")
    with pytest.raises(ValueError, match=f"{CODE} types.SimpleNamespace.*--trust"):
        checkpoints.load(model, tmp_path / "mine.pth")
    assert checkpoints.load(model, tmp_path / "mine.pth", trust=True).extras == ("config",)
    torch.save(tiny(), tmp_path / "module.pth")
    assert len(checkpoints.load(model, tmp_path / "module.pth", trust=True).used) == len(STATE)


def test_the_process_wide_allow_list_is_neither_used_nor_changed(tmp_path, model):
    torch.save({"state_dict": STATE, "x": Unknown()}, tmp_path / "a.pth")
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([Unknown]):
        with pytest.raises(ValueError, match=CODE):
            checkpoints.load(model, tmp_path / "a.pth")
        assert Unknown in torch.serialization.get_safe_globals()
    assert set(torch.serialization.get_safe_globals()) == set(before)
