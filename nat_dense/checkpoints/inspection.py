"""What a checkpoint is, in words."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from nat_dense.checkpoints.layout import Architecture, Layout, architecture_of
from nat_dense.checkpoints.loading import open_checkpoint
from nat_dense.checkpoints.origin import Origin, origin_of
from nat_dense.models.variants import DILATIONS


def inspect(
    source: str | Path,
    *,
    prefix: str | None = None,
    trust: bool = False,
    sha256: str | None = None,
    entry: str | None = None,
) -> str:
    """Describes a checkpoint: format, model, preset, dilations, and what a dense backbone would not use.

    Arguments and errors are those of `load`.
    """
    checkpoint, layout = open_checkpoint(source, prefix=prefix, trust=trust, sha256=sha256, entry=entry)
    backbone = architecture_of(layout.backbone)
    tensors = checkpoint.tensors.values()
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    lines = [
        f"{source}: {layout.kind}",
        f"  format        {checkpoint.container}, {_megabytes(checkpoint.path)}"
        + (f", weights under {checkpoint.entry!r}" if checkpoint.entry else ""),
        f"  tensors       {len(checkpoint.tensors)} ({', '.join(f'{n} {t}' for t, n in types.items())}), "
        f"{sum(t.numel() for t in tensors):,} values",
        f"  architecture  {_fields(backbone)}",
        f"  preset        {_presets(backbone)}",
        f"  dilations     {_dilations(backbone, origin_of(checkpoint))}",
    ]
    if backbone.num_classes is not None:
        lines.append(f"  classes       {backbone.num_classes}")
    lines.append(f"  output norms  {', '.join(f'norm{i}' for i in backbone.norms) or 'none: the model keeps its own'}")
    lines.append(f"  not in a dense backbone: {_lost(layout) or 'nothing'}")
    if layout.unwrapped:
        lines.append(f"  every name starts with {layout.unwrapped!r}, which is ignored")
    if checkpoint.extras:
        lines.append(f"  other entries: {', '.join(map(str, checkpoint.extras))}")
    return "\n".join(lines)


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB"


def _fields(a: Architecture) -> str:
    scale = "with" if a.layer_scale else "without"
    names = "embed_dim", "depths", "num_heads", "mlp_ratio", "kernel_size"
    return f"{a.family}: {', '.join(f'{n}={getattr(a, n)}' for n in names)}, {scale} layer scale"


def _presets(a: Architecture) -> str:
    rows = a.presets()
    return " or ".join(f"{family} arch={arch!r}" for family, arch in rows) if rows else "no published one"


def _dilations(a: Architecture, origin: Origin | None) -> str:
    if origin:
        return f"{origin.dilations or 'none'}: the config stored with the weights has a {origin.family}"
    families = ("DiNAT",) if a.family == "NAT" else (a.family,)
    names = ", ".join(DILATIONS[families[0]])
    undilated = "none for NAT, " if a.family == "NAT" else ""
    return f"not stored: {undilated}for {families[0]} one of {names}, depending on the training"


def _lost(layout: Layout) -> str:
    tops = Counter(name.split(".")[0] for name in layout.others)
    tops.update(name.split(".")[0] for name in layout.backbone if name.split(".")[0] in ("norm", "head", "norm_stem"))
    return ", ".join(f"{top} ({count} tensors)" for top, count in tops.items())
