"""The published checkpoints by name: "nat-tiny", "dinat-large-22k", "nat_tiny_upernet", "maskrcnn_dinat_s_tiny", ...

Classification weights are named family-arch, with "-22k" for ImageNet-22k; whole detectors and segmentors are named
after their files. The addresses come from the authors' files and have not been tried. No SHA-256 of any published file
is known: a download is checked against the length that the server announces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from types import MappingProxyType

from nat_dense.models import published, variants


def _files() -> Iterator[tuple[str, str]]:
    for family, rows in variants.VARIANTS.items():
        for arch, row in rows.items():
            if row.checkpoint:
                yield f"{family.lower()}-{arch}", row.checkpoint
            if row.checkpoint_22k:
                yield f"{family.lower()}-{arch}-22k", row.checkpoint_22k
    for model in published.PUBLISHED:
        yield PurePosixPath(model.checkpoint).stem, model.checkpoint


URLS: Mapping[str, str] = MappingProxyType(dict(_files()))
"""Name to address."""
