"""Checkpoints: loads any NAT, DiNAT or DiNAT_s file safely, with every tensor accounted for.

Start with `loading.py` (the entry point), then `reading.py` (files), `layout.py` (what a file holds), `matching.py`
(what goes where, and the rules by which a tensor may be absent) and `keymaps.py` (transformers' names).
"""

from nat_dense.checkpoints.convert import convert
from nat_dense.checkpoints.download import fetch
from nat_dense.checkpoints.inspection import inspect
from nat_dense.checkpoints.keymaps import from_hf, to_hf
from nat_dense.checkpoints.layout import Architecture, Layout, architecture_of, recognise
from nat_dense.checkpoints.loading import Report, load
from nat_dense.checkpoints.reading import Checkpoint, read
from nat_dense.checkpoints.rpb import resize_rpb

__all__ = [
    "Architecture",
    "Checkpoint",
    "Layout",
    "Report",
    "architecture_of",
    "convert",
    "fetch",
    "from_hf",
    "inspect",
    "load",
    "read",
    "recognise",
    "resize_rpb",
    "to_hf",
]
