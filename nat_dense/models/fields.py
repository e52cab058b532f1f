"""The fields of a backbone: completed by those of a published architecture, and checked.

Every error names the value found and what was expected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from nat_dense.models import variants

Dilations = str | Sequence[Sequence[int]] | None


def architecture(family: str, arch: str | None, given: dict) -> dict:
    """The architecture's fields: those of the preset, overridden by the given ones."""
    defaults = dict(mlp_ratio=4.0 if family == "DiNAT_s" else 3.0, kernel_size=7, layer_scale=None)
    preset = defaults if arch is None else variants.variant(family, arch).fields()
    fields = preset | {name: value for name, value in given.items() if value is not None}
    missing = [name for name in ("embed_dim", "depths", "num_heads") if name not in fields]
    if missing:
        rows = ", ".join(variants.VARIANTS[family])
        raise ValueError(f"{family} needs arch (one of {rows}) or {', '.join(missing)}")
    if fields["embed_dim"] < 2 or fields["embed_dim"] % 2:
        raise ValueError(f"embed_dim={fields['embed_dim']}: expected an even number >= 2")
    return fields


def resolve_dilations(family: str, dilations: Dilations, depths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """A dilation for each block of each stage.

    Raises:
        ValueError: There is no such preset, or the numbers are not those of these depths.
    """
    if dilations is None:
        return tuple((1,) * depth for depth in depths)
    if isinstance(dilations, str):
        return variants.dilations_for(family, dilations, depths)
    if not _are_rows(dilations):
        raise ValueError(f"dilations={dilations!r}: expected a list of whole numbers a stage, or the name of a preset")
    resolved = tuple((1,) * depth if row is None else tuple(row) for row, depth in zip(dilations, depths, strict=False))
    if len(dilations) != len(depths) or any(len(row) != depth for row, depth in zip(resolved, depths, strict=True)):
        found = [None if row is None else len(row) for row in dilations]
        raise ValueError(f"dilations has {found} numbers a stage; expected as many as depths={depths}")
    return resolved


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _are_whole(values: Any) -> bool:
    return isinstance(values, Sequence) and all(map(_is_whole, values))


def _are_rows(values: Any) -> bool:
    return isinstance(values, Sequence) and all(row is None or _are_whole(row) for row in values)


_KINDS: dict[str, tuple[Callable[[object], bool], tuple[str, ...]]] = {
    "a whole number": (_is_whole, ("embed_dim", "kernel_size", "in_chans", "frozen_stages")),
    "a list of whole numbers": (_are_whole, ("depths", "num_heads", "out_indices")),
    "a number": (
        _is_number,
        ("mlp_ratio", "layer_scale", "qk_scale", "drop_rate", "attn_drop_rate", "drop_path_rate"),
    ),
    "True or False": (lambda value: isinstance(value, bool), ("qkv_bias", "with_cp")),
}
"""What fields have to be, how to tell, and which: those of a config get here as they were written."""

_OPTIONAL = ("embed_dim", "depths", "num_heads", "mlp_ratio", "kernel_size", "layer_scale", "qk_scale")
"""Fields that None stands for another value of."""


def check_kinds(given: dict) -> None:
    for kind, (fits, names) in _KINDS.items():
        for name in names:
            value = given[name]
            if not fits(value) and not (value is None and name in _OPTIONAL):
                raise ValueError(f"{name}={value!r}: expected {kind}")


def check_rates(rates: dict[str, float]) -> None:
    for name, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name}={rate}: expected a probability in [0, 1)")


def check_out_indices(out_indices: Sequence[int], num_stages: int) -> tuple[int, ...]:
    indices = tuple(out_indices)
    if sorted(set(indices)) != list(indices) or any(not 0 <= i < num_stages for i in indices):
        raise ValueError(f"out_indices={indices}: expected ascending stages out of 0 .. {num_stages - 1}")
    return indices


def check_frozen_stages(frozen_stages: int, num_stages: int) -> int:
    if not -1 <= frozen_stages <= num_stages:
        raise ValueError(f"frozen_stages={frozen_stages}: expected -1 (nothing), 0 (tokenizer) .. {num_stages} (all)")
    return frozen_stages
