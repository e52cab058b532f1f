"""Downloads, from a server on this machine: progress, cache, resuming, verification, failures."""

import hashlib
import http.server
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nat_dense import checkpoints, progress
from nat_dense.checkpoints import download, names
from nat_dense.mm.model_checks import fetch_initial_weights
from nat_dense.models import NAT, variants
from tests.checkpoints.files import TINY, tiny

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, honours ranges, and misbehaves as `server.faults` (one an answer) say."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        fault = server.faults.pop(0) if server.faults else None
        content = server.files.get(self.path.split("?")[0])
        if content is None or fault == 503:
            self.send_error(503 if fault else 404)
            return
        start = 0
        wanted = self.headers.get("Range")
        if wanted and self.headers.get("If-Range") == server.tag and fault != "no ranges":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        if server.tag:
            self.send_header("ETag", server.tag)
        if fault != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + (len(content) - start) // 2 if fault == "breaks off" else len(content)
        self.wfile.write(content[start:end])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.faults, server.tag = {"/a/model.pth": CONTENT}, [], [], '"v1"'
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def cached(server):
    """What is in the cache, locks aside."""
    return sorted(p.name.split("-", 1)[1] for p in download.cache_dir().iterdir() if p.suffix != ".lock")


def test_file_lands_in_the_cache_once(server, tmp_path):
    path = checkpoints.fetch(f"{server.url}/a/model.pth", sha256=SHA)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "home" / "hub" / "nat_dense")
    assert checkpoints.fetch(f"{server.url}/a/model.pth") == path
    assert len(server.requests) == 1
    assert cached(server) == ["model.pth"]


def test_progress(server, monkeypatch, capsys):
    """A line every ten seconds where stderr is no terminal; here every reading of the clock is ten seconds later."""
    server.files["/a/model.pth"] = bytes(3 * download.CHUNK + 1)
    ticks = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    checkpoints.fetch(f"{server.url}/a/model.pth")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"MiB of {server.url}/a/model.pth: 1/4, 0:30 left"
    assert lines[-1].startswith(f"MiB of {server.url}/a/model.pth: 4/4 in ")


def test_equal_file_names_do_not_collide(server):
    server.files |= {"/x/pytorch_model.bin": b"one", "/y/pytorch_model.bin": b"two"}
    one, two = (checkpoints.fetch(f"{server.url}/{folder}/pytorch_model.bin") for folder in "xy")
    assert (one.read_bytes(), two.read_bytes()) == (b"one", b"two")


@pytest.mark.parametrize("breaks", [1, 3])
def test_broken_connection_is_resumed(server, breaks):
    server.faults = ["breaks off"] * breaks
    assert checkpoints.fetch(f"{server.url}/a/model.pth", sha256=SHA).read_bytes() == CONTENT
    starts = [int(wanted.removeprefix("bytes=").rstrip("-")) for _, wanted, _ in server.requests[1:]]
    assert starts == [len(CONTENT) - len(CONTENT) // 2**n for n in range(1, breaks + 1)]


def test_a_later_call_resumes(server):
    server.faults = ["breaks off"] + [503] * (download.ATTEMPTS - 1)
    with pytest.raises(ConnectionError, match=r"503 .*524,288 bytes are kept; run the command again to resume"):
        checkpoints.fetch(f"{server.url}/a/model.pth")
    assert cached(server) == ["model.pth.etag", "model.pth.partial"]
    assert checkpoints.fetch(f"{server.url}/a/model.pth", sha256=SHA).read_bytes() == CONTENT
    assert server.requests[-1][1:] == ("bytes=524288-", '"v1"')
    assert cached(server) == ["model.pth"]


def test_another_version_is_not_glued_on(server):
    server.faults = ["breaks off"] + [503] * (download.ATTEMPTS - 1)
    with pytest.raises(ConnectionError):
        checkpoints.fetch(f"{server.url}/a/model.pth")
    server.files["/a/model.pth"] = new = CONTENT[::-1]
    server.tag = '"v2"'
    assert checkpoints.fetch(f"{server.url}/a/model.pth").read_bytes() == new


def test_server_without_marks_or_ranges_starts_over(server):
    server.tag = ""
    server.faults = ["breaks off"]
    assert checkpoints.fetch(f"{server.url}/a/model.pth", sha256=SHA).read_bytes() == CONTENT
    assert server.requests[1][1] is None


def test_server_without_a_length(server):
    server.faults = ["no length"]
    assert checkpoints.fetch(f"{server.url}/a/model.pth", sha256=SHA).read_bytes() == CONTENT


def test_wrong_hash_is_deleted(server):
    with pytest.raises(ValueError, match=f"has SHA-256 {SHA}, expected 00000000"):
        checkpoints.fetch(f"{server.url}/a/model.pth", sha256="0" * 64)
    assert cached(server) == []


def test_hash_in_the_file_name(server):
    server.files |= {f"/m-{SHA[:8]}.pth": CONTENT, "/m-00112233.pth": CONTENT}
    assert checkpoints.fetch(f"{server.url}/m-{SHA[:8]}.pth").read_bytes() == CONTENT
    with pytest.raises(ValueError, match="expected 00112233"):
        checkpoints.fetch(f"{server.url}/m-00112233.pth")


def test_missing_file(server):
    with pytest.raises(FileNotFoundError, match=r"/b.pth: the server returned 404 Not Found"):
        checkpoints.fetch(f"{server.url}/b.pth")
    assert len(server.requests) == 1
    assert cached(server) == []


def test_unreachable_server(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=r"/a/model.pth: .*refused$"):
        checkpoints.fetch(f"{server.url}/a/model.pth")


def test_web_page_instead_of_weights(server):
    server.files["/a/model.pth"] = b"<html>please log in</html>"
    with pytest.raises(ValueError, match="is not a checkpoint but a web page"):
        checkpoints.load(NAT(**TINY), f"{server.url}/a/model.pth")


def test_init_cfg_takes_a_url(server, tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "tiny.pth")
    server.files["/tiny.pth"] = (tmp_path / "tiny.pth").read_bytes()
    model = NAT(**TINY, init_cfg=dict(type="Pretrained", checkpoint=f"{server.url}/tiny.pth"))
    model.init_weights()
    assert torch.equal(model.norm1.bias, tiny().norm1.bias)


def test_what_init_cfg_fetches_is_fitted_before_a_run(server, tmp_path):
    torch.save(NAT(arch="mini").state_dict(), tmp_path / "mini.pth")
    server.files["/mini.pth"] = (tmp_path / "mini.pth").read_bytes()
    model = NAT(arch="nano", init_cfg=dict(type="Pretrained", checkpoint=f"{server.url}/mini.pth"))
    with pytest.raises(ValueError, match=r"mini\.pth: the weights don't fit the model \(embed_dim 64"):
        fetch_initial_weights(model)


def test_published_names(server, monkeypatch):
    monkeypatch.setattr(download, "URLS", {"nat-tiny": f"{server.url}/a/model.pth"})
    assert checkpoints.fetch("nat-tiny", sha256=SHA).read_bytes() == CONTENT
    monkeypatch.setattr(download, "URLS", {"nat-tiny": f"{server.url}/a/model.pth?new"})
    with pytest.raises(ValueError, match="expected ffff"):
        checkpoints.fetch("nat-tiny", sha256="f" * 64)


def test_names_that_begin_like_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("~nano.pth").write_bytes(b"x")
    assert checkpoints.fetch("~nano.pth") == Path("~nano.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint '~nobody-here/x"):
        checkpoints.fetch("~nobody-here/x.pth")


def test_files_of_the_home_folder(tmp_path, monkeypatch):
    """Wherever a checkpoint is named."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    torch.save(NAT(arch="nano").state_dict(), tmp_path / "nano.pth")
    assert checkpoints.fetch("~/nano.pth") == tmp_path / "nano.pth"
    model = NAT(arch="nano", init_cfg=dict(type="Pretrained", checkpoint="~/nano.pth"))
    model.init_weights()
    saved = torch.load(tmp_path / "nano.pth")
    assert torch.equal(model.levels[0].blocks[0].attn.rpb, saved["levels.0.blocks.0.attn.rpb"])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint '~/mini\.pth'"):
        checkpoints.fetch("~/mini.pth")
    torch.save(dict(state_dict=saved, epoch=3), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"would overwrite the input and lose 1 entries .*, such as 'epoch'"):
        checkpoints.convert("~/whole.pth", tmp_path / "whole.pth", "dense", overwrite=True)


def test_table_of_published_names():
    rows = [(f, a) for f, rows in variants.VARIANTS.items() for a, row in rows.items() if row.published]
    assert all(f"{family.lower()}-{arch}" in names.URLS for family, arch in rows)
    assert names.URLS["nat-tiny"] == "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_tiny.pth"
    assert names.URLS["dinat_s-large-22k"].endswith("imagenet22k/dinat_s_large_in22k_224.pth")
    assert names.URLS["cascadedmaskrcnn_dinat_s_base"].endswith("coco/cascadedmaskrcnn_dinat_s_base.pth")
    assert len(names.URLS) == len(rows) + 5 + 34


def test_two_at_once_download_once(server):
    """The lock is one of the file system: it holds between processes as it does between these threads."""
    paths = []
    threads = [
        threading.Thread(target=lambda: paths.append(checkpoints.fetch(f"{server.url}/a/model.pth"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_importing_opens_no_connection():
    """Neither the package nor a model touches the network; only a named source does."""
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import nat_dense, nat_dense.checkpoints\n"
        "nat_dense.NAT('nano')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
