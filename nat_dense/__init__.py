"""Neighborhood Attention backbones (NAT, DiNAT, DiNAT_s) for dense prediction.

Where mmengine is installed, importing this package registers the backbones in its root `MODELS`, and an initializer
"Pretrained" that accounts for every tensor of their files, and what the operator costs; and an optimizer constructor.
`nat_dense.ops` holds the operator alone and needs nothing but torch.
"""

from importlib.util import find_spec

from nat_dense.version import __version__

__all__ = ["__version__"]

if find_spec("mmengine") is not None:
    from nat_dense.mm import analysis, optimizer, pretrained  # noqa: F401  (registered by being imported)
    from nat_dense.models import NAT, DiNAT, DiNAT_s

    __all__ += ["NAT", "DiNAT", "DiNAT_s"]
