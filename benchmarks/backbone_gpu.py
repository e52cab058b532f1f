"""Whole backbones on a GPU: NAT and DiNAT beside timm's Swin-Tiny and ConvNeXt-Tiny, from one run.

python benchmarks/backbone_gpu.py                                  compiled, bfloat16, 800x1216, batch 8
python benchmarks/backbone_gpu.py --dtype float16 --eager
python benchmarks/backbone_gpu.py --graphs                         without the time that launching takes

Forward passes are in eval mode without gradients, steps are forward and backward in training mode, both under autocast.
All train with the same stochastic depth. NAT needs mmengine, Swin and ConvNeXt need timm: a contestant that can't be
built is named with the reason. Where nat_dense is not installed, PYTHONPATH=. in front.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from measure import save
from measure_gpu import Run, gpu, peak_memory, require_gpu, show, timed, told
from torch import Tensor, nn

DROP_PATH = 0.2


def _nat(_size: tuple[int, int]) -> nn.Module:
    from nat_dense.models import NAT

    return NAT(arch="tiny", drop_path_rate=DROP_PATH)


def _dinat(_size: tuple[int, int]) -> nn.Module:
    from nat_dense.models import DiNAT

    return DiNAT(arch="tiny", dilations="detection", drop_path_rate=DROP_PATH)


def _swin(size: tuple[int, int]) -> nn.Module:
    import timm

    return timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, img_size=size, drop_path_rate=DROP_PATH
    )


def _convnext(_size: tuple[int, int]) -> nn.Module:
    import timm

    model = timm.create_model("convnext_tiny", features_only=True, drop_path_rate=DROP_PATH)
    return model.to(memory_format=torch.channels_last)


CONTESTANTS: dict[str, tuple[str, Callable[[tuple[int, int]], nn.Module]]] = {
    "nat": ("NAT-Tiny", _nat),
    "swin": ("timm Swin-Tiny", _swin),
    "dinat": ("DiNAT-Tiny, detection dilations", _dinat),
    "convnext": ("timm ConvNeXt-Tiny, channels last", _convnext),
}
"""Four-level backbones for pictures of a size (height, width); the first measured is what others are divided by."""


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


def measure(name: str, model: nn.Module, images: Tensor, dtype: torch.dtype, args) -> dict:
    """One row: images a second and peak memory, forward and with the backward pass."""
    model = model.cuda()
    if "channels last" in name:
        images = images.contiguous(memory_format=torch.channels_last)
    called = model if args.eager else torch.compile(model, mode="reduce-overhead" if args.graphs else None)
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
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--eager", action="store_true", help="without torch.compile")
    how.add_argument("--graphs", action="store_true", help="compiled into CUDA graphs, so that launches cost nothing")
    parser.add_argument("--backbones", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
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
    for name, build in (CONTESTANTS[short] for short in args.backbones):
        if time.monotonic() > deadline:
            print(f"{name}: left out, the time is up")
            continue
        try:
            rows.append(measure(name, build((height, width)), images, getattr(torch, args.dtype), args))
        except Exception as error:  # whatever a contestant's compiler raises, the others are measured
            print(f"{name}: not measured, {told(error)}", flush=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()
    first = rows[0] if rows else {}
    for row in rows:
        for label in ("forward", "step"):
            row[f"{label} / {first['backbone']}"] = row[f"{label} images/s"] / first[f"{label} images/s"]
    if rows:
        how = "eager" if args.eager else "CUDA graphs" if args.graphs else "compiled"
        show(f"batch {args.batch}, {args.size}, {args.dtype} autocast, {how}", rows)
    save(args.json, {"gpu": gpu(), "size": args.size, "batch": args.batch, "dtype": args.dtype, "rows": rows})


if __name__ == "__main__":
    main()
