"""The linear layers of NAT-Tiny on a CPU: torch's own (MKL), oneDNN's, and oneDNN's 1x1 convolution, from one run.

python benchmarks/linear_cpu.py --threads 2

Forward, and the two products of the backward pass, in GFLOP/s; the last column is what `Linear` takes.
"""

from __future__ import annotations

import argparse

import torch
from measure import interleaved, machine, save
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from nat_dense.models.linear import linear, parameter_gradients

SHAPES = tuple(
    (tokens, inputs, outputs)
    for tokens, width in (
        (2048, 64),
        (4096, 128),
        (1024, 256),
        (256, 512),
        (60800, 64),
        (15200, 128),
        (3800, 256),
        (950, 512),
    )
    for inputs, outputs in ((width, 3 * width), (width, width), (3 * width, width))
)
"""Tokens, channels in, channels out: qkv or fc1, proj, fc2 of the four stages at 512x512 and 800x1216. The first stage
at 512x512 comes in the runs of 2048 tokens that inference takes."""


def weight_by_convolution(image: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient as oneDNN has it for a convolution of one pixel: torch takes it on any number of threads if the
    kernel claims a dilation, which one pixel hasn't."""
    filters = image.new_empty(grad.shape[1], image.shape[1], 1, 1)
    settings = dict(stride=[1, 1], padding=[0, 0], dilation=[2, 2], transposed=False, output_padding=[0, 0], groups=1)
    return torch.ops.aten.convolution_backward(
        grad, image, filters, None, **settings, output_mask=[False, True, False]
    )[1]


def rates(tokens: int, inputs: int, outputs: int, rounds: int) -> dict[str, float]:
    x, weight, bias, grad = (
        torch.randn(*shape) for shape in ((tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs))
    )
    image, filters = x.view(1, tokens, 1, inputs).permute(0, 3, 1, 2), weight[:, :, None, None]
    times = interleaved(
        {
            "F.linear": lambda: F.linear(x, weight, bias),
            "oneDNN": lambda: linear(x, weight, bias),
            "1x1 convolution": lambda: F.conv2d(image, filters, bias),
            "dx, mm": lambda: grad @ weight,
            "dx, oneDNN": lambda: linear(grad, weight.t(), None),
            "dw, mm": lambda: grad.t() @ x,
            "dw, oneDNN": lambda: linear(grad.t(), x.t(), None),
            "dw, convolution": lambda: weight_by_convolution(
                image, grad.view(1, tokens, 1, outputs).permute(0, 3, 1, 2)
            ),
            "dw, ours": lambda: parameter_gradients(x, weight, grad, False),
        },
        rounds,
    )
    return {name: 2 * tokens * inputs * outputs / timing.median / 1e9 for name, timing in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    console = Console(width=140)
    console.print(machine())
    with torch.inference_mode():
        rows = {f"{m} x {i} -> {o}": rates(m, i, o, args.rounds) for m, i, o in SHAPES}
    table = Table("tokens x in -> out", *next(iter(rows.values())), title="GFLOP/s")
    for name, row in rows.items():
        table.add_row(name, *(f"{rate:.0f}" for rate in row.values()))
    console.print(table)
    save(args.json, rows)


if __name__ == "__main__":
    main()
