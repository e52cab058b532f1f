"""Models for other runtimes."""

from nat_dense.export.onnx import Exported, export_onnx

__all__ = ["Exported", "export_onnx"]
