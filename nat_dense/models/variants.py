"""The published architectures and dilations as data: the one table that models, configs, tests and docs read.

Source: NAT (arXiv:2204.07143) tables 1 and 4, DiNAT (arXiv:2209.15001) tables 1 - 3 and appendix, and the files of
SHI-Labs/Neighborhood-Attention-Transformer at d334f5b.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

NAT_ROOT = "https://shi-labs.com/projects/nat/checkpoints/CLS/"
DINAT_ROOT = "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/"
DINAT_22K_ROOT = "https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/"


@dataclass(frozen=True)
class Variant:
    """One architecture.

    Attributes:
        embed_dim, depths, num_heads, mlp_ratio, kernel_size, layer_scale: The backbones' fields.
        drop_path_rate: Of the ImageNet-1k training.
        image_size: Side of the classification input in pixels.
        params: Parameters of the 1000-class model, counted exactly.
        gmacs: Published cost of the classification model at `image_size`, in 10^9 multiply-adds.
        top1: Published ImageNet-1k accuracy in percent.
        checkpoint: The released ImageNet-1k weights.
        checkpoint_22k: The released ImageNet-22k weights.
        published: False for architectures of our own, which have no published figures.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: float
    kernel_size: int = 7
    layer_scale: float | None = None
    drop_path_rate: float = 0.2
    image_size: int = 224
    params: int | None = None
    gmacs: float | None = None
    top1: float | None = None
    checkpoint: str | None = None
    checkpoint_22k: str | None = None

    @property
    def published(self) -> bool:
        return self.top1 is not None

    def fields(self) -> dict:
        """What the backbone's constructor takes from here."""
        names = ("embed_dim", "depths", "num_heads", "mlp_ratio", "kernel_size", "layer_scale")
        return {name: getattr(self, name) for name in names}


_NANO = Variant(embed_dim=32, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), mlp_ratio=3.0, drop_path_rate=0.1)
_MINI = Variant(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0)
_TINY = replace(_MINI, depths=(3, 4, 18, 5))
_SMALL = Variant(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.0, drop_path_rate=0.3)
_BASE = replace(_SMALL, embed_dim=128, num_heads=(4, 8, 16, 32), layer_scale=1e-5, drop_path_rate=0.5)
_LARGE = replace(_SMALL, embed_dim=192, num_heads=(6, 12, 24, 48), drop_path_rate=0.35)
_S_TINY = Variant(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4.0)
_S_SMALL = replace(_S_TINY, depths=(2, 2, 18, 2), drop_path_rate=0.3)
_S_BASE = replace(_S_SMALL, embed_dim=128, num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
_S_LARGE = replace(_S_SMALL, embed_dim=192, num_heads=(6, 12, 24, 48), drop_path_rate=0.35)


def _published(base: Variant, params: int, gmacs: float, top1: float, checkpoint: str, **changes) -> Variant:
    return replace(base, params=params, gmacs=gmacs, top1=top1, checkpoint=checkpoint, **changes)


NAT_VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "nano": _NANO,
        "mini": _published(_MINI, 19_984_174, 2.7, 81.8, NAT_ROOT + "nat_mini.pth"),
        "tiny": _published(_TINY, 27_901_582, 4.3, 83.2, NAT_ROOT + "nat_tiny.pth"),
        "small": _published(_SMALL, 50_743_297, 7.8, 83.7, NAT_ROOT + "nat_small.pth", layer_scale=1e-5),
        "base": _published(_BASE, 89_769_652, 13.7, 84.3, NAT_ROOT + "nat_base.pth"),
    }
)

DINAT_VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "nano": _NANO,
        "mini": _published(_MINI, 19_984_174, 2.7, 81.8, DINAT_ROOT + "dinat_mini_in1k_224.pth"),
        "tiny": _published(_TINY, 27_901_582, 4.3, 82.7, DINAT_ROOT + "dinat_tiny_in1k_224.pth"),
        "small": _published(_SMALL, 50_719_681, 7.8, 83.8, DINAT_ROOT + "dinat_small_in1k_224.pth"),
        "base": _published(_BASE, 89_769_652, 13.7, 84.4, DINAT_ROOT + "dinat_base_in1k_224.pth"),
        "large": _published(
            _LARGE,
            200_943_514,
            30.6,
            86.6,
            DINAT_ROOT + "dinat_large_in22k_in1k_224.pth",
            checkpoint_22k=DINAT_22K_ROOT + "dinat_large_in22k_224.pth",
        ),
        "large-384": _published(
            _LARGE,
            200_943_514,
            89.7,
            87.4,
            DINAT_ROOT + "dinat_large_in22k_in1k_384.pth",
            checkpoint_22k=DINAT_22K_ROOT + "dinat_large_in22k_224.pth",
            image_size=384,
        ),
        "large-384-k11": _published(
            _LARGE,
            201_144_250,
            92.4,
            87.5,
            DINAT_ROOT + "dinat_large_in22k_in1k_384_11x11.pth",
            checkpoint_22k=DINAT_22K_ROOT + "dinat_large_in22k_224_11x11interp.pth",
            image_size=384,
            kernel_size=11,
        ),
    }
)

DINAT_S_VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "nano": replace(_NANO, mlp_ratio=4.0),
        "tiny": _published(_S_TINY, 28_288_354, 4.5, 81.8, DINAT_ROOT + "dinat_s_tiny_in1k_224.pth"),
        "small": _published(_S_SMALL, 49_606_258, 8.7, 83.5, DINAT_ROOT + "dinat_s_small_in1k_224.pth"),
        "base": _published(_S_BASE, 87_768_224, 15.4, 83.8, DINAT_ROOT + "dinat_s_base_in1k_224.pth"),
        "large": _published(
            _S_LARGE,
            196_532_476,
            34.5,
            86.5,
            DINAT_ROOT + "dinat_s_large_in1k_224.pth",
            checkpoint_22k=DINAT_22K_ROOT + "dinat_s_large_in22k_224.pth",
        ),
        "large-384": _published(
            _S_LARGE,
            196_532_476,
            101.5,
            87.4,
            DINAT_ROOT + "dinat_s_large_in1k_384.pth",
            checkpoint_22k=DINAT_22K_ROOT + "dinat_s_large_in22k_224.pth",
            image_size=384,
        ),
    }
)

VARIANTS: Mapping[str, Mapping[str, Variant]] = MappingProxyType(
    {"NAT": NAT_VARIANTS, "DiNAT": DINAT_VARIANTS, "DiNAT_s": DINAT_S_VARIANTS}
)

_STAGE3_640 = (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5)
_STAGE3_MASK2FORMER = (1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3)

DILATIONS: Mapping[str, Mapping[str, tuple[tuple[int, ...], ...]]] = MappingProxyType(
    {
        "DiNAT": {
            "classification": ((1, 8), (1, 4), (1, 2), (1,)),
            "classification-384": ((1, 13), (1, 6), (1, 3), (1,)),
            "detection": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
            "segmentation": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
            "segmentation-640": ((1, 20), (1, 5, 1, 10), _STAGE3_640, (1, 2)),
            "mask2former": ((1, 14), (1, 4, 1, 7), _STAGE3_MASK2FORMER, (1,)),
        },
        "DiNAT_s": {
            "classification": ((1, 8), (1, 4), (1, 2), (1,)),
            "classification-384": ((1, 13), (1, 6), (1, 3), (1,)),
            "detection": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
            "segmentation": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
            "segmentation-640": ((1, 20), (1, 10), _STAGE3_640, (1, 2)),
        },
    }
)
"""Per family and use, one pattern a stage; a stage repeats its pattern over its blocks, cut at its depth."""


def variant(family: str, arch: str) -> Variant:
    """A row of the table.

    Raises:
        ValueError: The family has no such row.
    """
    rows = VARIANTS[family]
    if not isinstance(arch, str) or arch not in rows:
        raise ValueError(f"arch={arch!r} is not a {family}; expected one of {', '.join(rows)}")
    return rows[arch]


def dilations_for(family: str, use: str, depths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The published dilations of a family for a use, one number a block.

    Raises:
        ValueError: The family has no such preset, or `depths` has another number of stages.
    """
    presets = DILATIONS.get(family, {})
    if use not in presets:
        known = ", ".join(presets) or "none: NAT is not dilated, use DiNAT"
        raise ValueError(f"dilations={use!r} is not a preset of {family}; expected a list per stage or one of {known}")
    patterns = presets[use]
    if len(patterns) != len(depths):
        raise ValueError(f"dilations={use!r} has {len(patterns)} stages, depths={tuple(depths)} has {len(depths)}")
    return tuple(
        tuple(pattern[i % len(pattern)] for i in range(depth)) for pattern, depth in zip(patterns, depths, strict=True)
    )
