"""Whole backbones on a GPU: NAT and DiNAT beside timm's Swin-Tiny and ConvNeXt-Tiny, from one run.

python benchmarks/backbone_gpu.py                                  compiled, bfloat16, 800x1216, batch 8
python benchmarks/backbone_gpu.py --dtype float16 --eager

Forward passes are in eval mode without gradients, steps are forward and backward in training mode, both under autocast.
NAT needs mmengine, Swin and ConvNeXt need timm: a contestant that can't be built is named with the reason.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from measure import save
from measure_gpu import Run, gpu, peak_memory, require_gpu, show, timed
from torch import Tensor, nn


def _nat() -> nn.Module:
    from nat_dense.models import NAT

    return NAT(arch="tiny")


def _dinat() -> nn.Module:
    from nat_dense.models import DiNAT

    return DiNAT(arch="tiny", dilations="detection")


def _swin(size: tuple[int, int]) -> nn.Module:
    import timm

    return timm.create_model("swin_tiny_patch4_window7_224", features_only=True, img_size=size)


def _convnext() -> nn.Module:
    import timm

    return timm.create_model("convnext_tiny", features_only=True).to(memory_format=torch.channels_last)


def contestants(size: tuple[int, int]) -> dict[str, Callable[[], nn.Module]]:
    """Builders of four-level backbones; the first is what others are divided by."""
    return {
        "NAT-Tiny": _nat,
        "timm Swin-Tiny": lambda: _swin(size),
        "DiNAT-Tiny, detection dilations": _dinat,
        "timm ConvNeXt-Tiny, channels last": _convnext,
    }


def forward(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Run:
    def run() -> None:
        with torch.no_grad(), torch.autocast("cuda", dtype=dtype):
            model(images)

    return run


def step(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Run:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=dtype):
            maps = model(images)
        sum(m.float().mean() for m in maps).backward()

    return run


def measure(name: str, build: Callable[[], nn.Module], images: Tensor, dtype: torch.dtype, args) -> dict:
    """One row: images a second and peak memory, forward and with the backward pass."""
    model = build().cuda()
    if "channels last" in name:
        images = images.contiguous(memory_format=torch.channels_last)
    called = model if args.eager else torch.compile(model)
    row: dict = {"backbone": name, "M parameters": sum(p.numel() for p in model.parameters()) / 1e6}
    for label, make, training in (("forward", forward, False), ("step", step, True)):
        model.train(training)
        run = make(called, images, dtype)
        timing = timed({name: [run]}, args.rounds, burst=2)[name]
        row |= {
            f"{label} images/s": len(images) / timing.median,
            f"{label} spread": timing.spread,
            f"{label} peak MiB": peak_memory(run) / 2**20,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="800x1216", help="height x width in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=300, help="nothing new is started after this time")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    require_gpu()
    deadline = time.monotonic() + args.seconds
    torch.manual_seed(0)
    height, width = (int(n) for n in args.size.split("x"))
    images = torch.randn(args.batch, 3, height, width, device="cuda")
    print(gpu())
    rows = []
    for name, build in contestants((height, width)).items():
        if time.monotonic() > deadline:
            print(f"{name}: left out, the time is up")
            continue
        try:
            rows.append(measure(name, build, images, getattr(torch, args.dtype), args))
        except (ImportError, RuntimeError, ValueError) as error:
            print(f"{name}: not measured, {str(error).strip().splitlines()[0]}")
        torch.compiler.reset()
        torch.cuda.empty_cache()
    first = rows[0] if rows else {}
    for row in rows:
        for label in ("forward", "step"):
            row[f"{label} / {first['backbone']}"] = row[f"{label} images/s"] / first[f"{label} images/s"]
    if rows:
        how = "eager" if args.eager else "compiled"
        show(f"batch {args.batch}, {args.size}, {args.dtype} autocast, {how}", rows)
    save(args.json, {"gpu": gpu(), "size": args.size, "batch": args.batch, "dtype": args.dtype, "rows": rows})


if __name__ == "__main__":
    main()
