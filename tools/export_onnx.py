"""Writes a detector's maps or a segmentor as an ONNX file of standard operators, and checks it in onnxruntime.

    python tools/export_onnx.py CONFIG CHECKPOINT -o nat.onnx --shape 512 512
    python tools/export_onnx.py CONFIG CHECKPOINT -o nat.onnx --shape 800 1216 --dynamic

A segmentor is exported with its logits at image size, a detector up to the maps of its neck; `--part` ends earlier.
docs/onnx.md describes the file's input.
"""

import argparse
import logging
from collections.abc import Sequence

from nat_dense.checkpoints.options import add_trust_option
from nat_dense.export import export_onnx
from nat_dense.mm.errors import one_line_errors
from nat_dense.mm.onnx import PARTS, graph_of
from nat_dense.mm.options import KeyValues
from nat_dense.mm.swap.command import add_swap_options, load_swapped


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, or mmdet::FOLDER/NAME.py, mmseg::FOLDER/NAME.py")
    add_swap_options(parser)
    parser.add_argument("checkpoint", help="a file or a URL with the weights of the whole model")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the file to write; ends in .onnx")
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        required=True,
        metavar=("H", "W"),
        help="height and width of the image in pixels; with --dynamic, only the size for the check",
    )
    parser.add_argument("--dynamic", action="store_true", help="leave batch, height and width open")
    parser.add_argument("--part", choices=PARTS, help="where the graph ends (default: as late as possible)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--cfg-options", nargs="+", action=KeyValues, default={}, metavar="KEY=VALUE", help="changes to the config"
    )
    add_trust_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # The exporter warns about optional packages and every step that it leaves out.
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with one_line_errors("export_onnx.py"):
        graph = graph_of(load_swapped(args), args.checkpoint, args.part, trust=args.trust)
        for notice in graph.notices:
            print(f"note: {notice}", flush=True)
        exported = export_onnx(
            graph.module,
            args.out,
            args.shape,
            channels=graph.channels,
            dynamic=args.dynamic,
            output_names=graph.output_names,
            metadata=graph.metadata,
            overwrite=args.overwrite,
        )
    size = exported.path.stat().st_size / 1e6
    print(f"{exported.path}: {size:.1f} MB, {exported.nodes} nodes, outputs {', '.join(exported.outputs)}")
    for (batch, _, height, width), difference in exported.differences.items():
        print(f"  {batch} x {height} x {width} pixels: differs from the model by at most {difference:.1e}")


if __name__ == "__main__":
    main()
