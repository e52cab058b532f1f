"""Downloads checkpoints given by URL or published name; nothing else uses the network.

Files go to a cache, partial downloads are resumed, and a file gets its final name only when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import urllib.error
import urllib.request
from difflib import get_close_matches
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import torch
from filelock import FileLock  # a dependency of torch

from nat_dense.checkpoints.names import URLS
from nat_dense.checkpoints.reading import check_sha256
from nat_dense.progress import ProgressLine

CHUNK = 1 << 20
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""
ATTEMPTS = 4
"""Connections that one call makes before giving up; the next call continues where the last one ended."""


def cache_dir() -> Path:
    """`nat_dense` in PyTorch's hub folder (`TORCH_HOME`, else ~/.cache/torch/hub)."""
    return Path(torch.hub.get_dir(), "nat_dense")


def fetch(source: str | Path, *, sha256: str | None = None) -> Path:
    """The local file behind a path, a URL or a published name; downloads it where it isn't in the cache yet.

    Args:
        source: An existing file or folder, an http(s) URL, or a key of `names.URLS`.
        sha256: The expected SHA-256 or its first 8 digits or more. A name that ends in "-" and such digits, as in
            `model-1a2b3c4d.pth`, gives its own.

    Raises:
        FileNotFoundError: There is no such file, name or address.
        ValueError: What arrived is not what was expected; it is deleted.
        ConnectionError: The server can't be reached or keeps dropping the connection; a later call resumes.
    """
    text = str(source)
    check_source(text)
    return local(text) or _download(URLS.get(text, text), sha256)


def local(source: str | Path) -> Path | None:
    """The local file or folder that a source refers to ("~" is expanded), or None."""
    path = Path(source)
    if not path.exists() and str(source).startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError:  # no such user
            return None
    return path if path.exists() else None


def check_source(source: str | Path) -> None:
    """Raises FileNotFoundError if `fetch` would find no such file, name or kind of URL; downloads nothing."""
    text = str(source)
    if local(text) or text in URLS or re.match(r"https?://", text):
        return
    close = get_close_matches(text, URLS, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise FileNotFoundError(f"no checkpoint {text!r}: neither a file, a published name nor an http(s) URL.{hint}")


def _download(url: str, sha256: str | None) -> Path:
    name = unquote(PurePosixPath(urlsplit(url).path).name) or "checkpoint"
    # Many addresses end in "pytorch_model.bin": the address is part of the name.
    target = cache_dir() / f"{hashlib.sha256(url.encode()).hexdigest()[:10]}-{name}"
    if sha256 is None and (carried := re.search(r"-([0-9a-f]{8,64})\.\w+$", name)):
        sha256 = carried[1]
    target.parent.mkdir(parents=True, exist_ok=True)
    # One process of a machine downloads at a time: the others wait, and find the file.
    with FileLock(target.with_suffix(target.suffix + ".lock")):
        if not target.exists():
            partial = target.with_suffix(target.suffix + ".partial")
            _complete(url, partial)
            if sha256 is not None:
                try:
                    check_sha256(partial, sha256)
                except ValueError:
                    partial.unlink()
                    raise
            partial.replace(target)
    return target


def _complete(url: str, partial: Path) -> None:
    """Downloads the rest of a file, in up to `ATTEMPTS` connections."""
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(min(2 ** (attempt - 1), 8) * 0.25)
        try:
            _receive(url, partial)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what is there is longer than the server's file
                partial.unlink(missing_ok=True)
            elif error.code < 500:
                raise FileNotFoundError(f"{url}: the server returned {error.code} {error.reason}") from error
            reason = f"{error.code} {error.reason}"
        except (OSError, HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    kept = f". {partial.stat().st_size:,} bytes are kept; run the command again to resume" if partial.exists() else ""
    raise ConnectionError(f"{url}: {reason}{kept}")


def _receive(url: str, partial: Path) -> None:
    start = partial.stat().st_size if partial.exists() else 0
    tag = partial.with_suffix(".etag")
    headers = {"User-Agent": "nat_dense"}
    # Without the server's mark of the version that was begun, the rest could be another version's.
    if start and tag.exists():
        headers |= {"Range": f"bytes={start}-", "If-Range": tag.read_text(encoding="utf-8")}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        resumed = response.status == 206
        if not resumed:
            start = 0
        mark = response.headers.get("ETag") or response.headers.get("Last-Modified")
        # If-Range demands a strong mark.
        if mark and not mark.startswith("W/"):
            tag.write_text(mark, encoding="utf-8")
        else:
            tag.unlink(missing_ok=True)
        rest = response.headers.get("Content-Length")
        total = start + int(rest) if rest else None
        with partial.open("ab" if resumed else "wb") as file:
            _copy(response, file, start, total, url)
    size = partial.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"the connection was lost after {size:,} of {total:,} bytes")
    tag.unlink(missing_ok=True)


def _copy(response: HTTPResponse, file: BinaryIO, start: int, total: int | None, url: str) -> None:
    """Copies the rest of a file, and shows the progress if its length is known."""
    line = None if total is None else ProgressLine(f"MiB of {url}", -(-total // CHUNK), start // CHUNK)
    while chunk := response.read(CHUNK):
        file.write(chunk)
        if line:
            line.advance()
    if line:
        line.close()
    file.flush()
    os.fsync(file.fileno())
