"""Neighborhood Attention backbones (NAT, DiNAT, DiNAT_s) for dense prediction.

Importing this package registers the backbones in mmengine's root `MODELS`, where mmengine is installed.
`nat_dense.ops` holds the operator alone and needs nothing but torch.
"""

from importlib.util import find_spec

from nat_dense.version import __version__

__all__ = ["__version__"]

if find_spec("mmengine") is not None:
    from nat_dense.mm import analysis  # noqa: F401  (tells mmengine's analysis what the operator costs)
    from nat_dense.models import NAT, DiNAT, DiNAT_s

    __all__ += ["NAT", "DiNAT", "DiNAT_s"]
