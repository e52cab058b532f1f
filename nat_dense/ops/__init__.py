"""The neighborhood attention operator. Needs torch alone.

Start with `functional.py` (the operator), then `reference.py` (its definition) and `backends.py`
(which implementation runs, and why).
"""

from nat_dense.ops import flops  # noqa: F401  (registers the operation counts)
from nat_dense.ops.backends import Backend, backend_report
from nat_dense.ops.functional import na2d, na2d_qkv

__all__ = ["Backend", "backend_report", "na2d", "na2d_qkv"]
