"""Model -> artifact, one module per format."""

from __future__ import annotations

from importlib import import_module

from edgeopt.exporter.base import Exporter
from edgeopt.types import Format

EXPORTERS: dict[Format, str] = {
    "litert": "edgeopt.exporter.litert:LiteRTExporter",
    "onnx": "edgeopt.exporter.onnx:OnnxExporter",
    "executorch": "edgeopt.exporter.executorch:ExecuTorchExporter",
}


def load_exporter(format_: Format) -> Exporter:
    """The exporter of a format; imports its module now."""
    module, _, name = EXPORTERS[format_].partition(":")
    exporter: Exporter = getattr(import_module(module), name)()
    return exporter
