"""Writes models as ONNX files of standard operators, checked against the model before they are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nat_dense.files import atomic, check_folder, check_free

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
"""What the extra `onnx` installs."""

TOLERANCE = 1e-4
"""Largest allowed difference between file and model, relative to the output's largest value, or 1 if larger."""

INPUT = "image"

_OPEN_AXES = {0: "batch", 2: "height", 3: "width"}
_TRACED_SIZE = (160, 224)  # no map of it has a side of 1, nor its height in common with its width


@dataclass(frozen=True)
class Exported:
    """What `export_onnx` wrote.

    Attributes:
        path: The file.
        outputs: Names of the outputs, in order.
        nodes: Operators in the graph.
        differences: Largest difference from the model by image shape (batch, channels, height, width), in the units
            of `TOLERANCE`.
    """

    path: Path
    outputs: tuple[str, ...]
    nodes: int
    differences: dict[tuple[int, ...], float]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    image_size: Sequence[int],
    *,
    channels: int = 3,
    dynamic: bool = False,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a model as an ONNX file (opset 18), runs it in onnxruntime and compares.

    Nothing is left behind if the file and the model disagree or anything else fails.

    Args:
        model: float32, on the CPU, in eval mode; takes an image [B, channels, H, W], returns a tensor or several.
        path: The file to write; ends in .onnx.
        image_size: H and W in pixels, of every image or, with `dynamic`, of the comparison.
        channels: Of the image.
        dynamic: Whether batch, H and W are left open; otherwise the batch is 1.
        output_names: One per output; "output" or "map_0", "map_1", ... when None.
        metadata: Text to store in the file.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ModuleNotFoundError: A package of the extra `onnx` is missing.
        FileExistsError: The file exists and `overwrite` is False.
        FileNotFoundError: There is no such folder.
        ValueError: An argument is invalid, or `torch.export` can't handle the model.
        RuntimeError: The file does not compute what the model does.
    """
    path = Path(path)
    _check_packages()
    _check_path(path, overwrite)
    height, width = _check_size(image_size)
    _check_model(model)
    from nat_dense.export.translations import OPSET, TRANSLATIONS  # here, since it imports onnxscript

    program = _trace(model, (channels, height, width), dynamic)
    names = _output_names(program, output_names)
    converted: Any = torch.onnx.export(
        program,
        (),
        input_names=[INPUT],
        output_names=names,
        dynamic_shapes=(_OPEN_AXES,) if dynamic else None,  # their names in the file
        opset_version=OPSET,
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    )
    for node in converted.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths of this machine
    converted.model.metadata_props.update(metadata or {})
    shapes: list[tuple[int, ...]] = [(1, channels, height, width)]
    if dynamic:
        shapes.append((2, channels, height * 2 // 3 + 1, width // 2 + 3))
    with atomic(path) as part:
        converted.save(part)
        differences = {shape: _difference(model, part, shape) for shape in shapes}
    return Exported(path, tuple(names), len(converted.model.graph), differences)


def _check_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the export to ONNX needs {', '.join(missing)}: install {'them' if missing[1:] else 'it'} with "
            f"`pip install {' '.join(missing)}`"
        )


def _check_path(path: Path, overwrite: bool) -> None:
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: expected a name that ends in .onnx")
    check_folder(path)
    check_free(path, overwrite)


def _check_size(image_size: Sequence[int]) -> tuple[int, int]:
    size = tuple(image_size)
    if len(size) != 2 or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"image_size={size}: expected a height and a width in pixels, both at least 1")
    return size[0], size[1]


def _check_model(model: nn.Module) -> None:
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before the export")
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; expected float32 on the CPU: model.float().cpu()"
            )


def _trace(model: nn.Module, shape: tuple[int, int, int], dynamic: bool) -> torch.export.ExportedProgram:
    batch, (channels, height, width), sizes = 1, shape, None
    if dynamic:
        batch, (height, width) = 2, _TRACED_SIZE
        sizes = (dict.fromkeys(_OPEN_AXES, torch.export.Dim.DYNAMIC),)
    try:
        with torch.no_grad():
            return torch.export.export(model, (torch.zeros(batch, channels, height, width),), dynamic_shapes=sizes)
    except Exception as error:  # torch.export raises whatever the model and its own passes raise
        advice = "; a fixed size (without dynamic) may work" if dynamic else ""
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"torch.export can't export {type(model).__name__}: {reason}{advice}") from error


def _output_names(program: torch.export.ExportedProgram, given: Sequence[str] | None) -> list[str]:
    count = len(program.graph_signature.user_outputs)
    if given is None:
        return ["output"] if count == 1 else [f"map_{i}" for i in range(count)]
    if len(given) != count:
        raise ValueError(f"output_names={list(given)}: the model has {count} outputs")
    return list(given)


def _difference(model: nn.Module, file: Path, shape: tuple[int, ...]) -> float:
    """Runs both on one random image of a shape."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = session.run(None, {INPUT: image.numpy()})
    with torch.no_grad():
        outputs = model(image)
    expected: Sequence[Tensor] = [outputs] if isinstance(outputs, Tensor) else outputs
    worst = 0.0
    for name, ours, theirs in zip((o.name for o in session.get_outputs()), expected, found, strict=True):
        if tuple(ours.shape) != theirs.shape:
            raise RuntimeError(
                f"{name} for an image of shape {shape} is {theirs.shape} in the ONNX graph, {tuple(ours.shape)} in the "
                "model"
            )
        if ours.numel():
            difference = (torch.from_numpy(theirs) - ours).abs().max() / ours.abs().max().clamp_min(1.0)
            worst = max(worst, difference.item())
            # Written so that a NaN, which compares as False, is an error.
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{name} for an image of shape {shape} differs by {difference:.1e} between the ONNX graph and the "
                    f"model; expected at most {TOLERANCE:.0e}"
                )
    return worst
