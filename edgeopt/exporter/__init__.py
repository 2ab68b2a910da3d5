"""Model -> artifact, one module per format."""

from __future__ import annotations

from importlib import import_module

from edgeopt.exporter.base import Exporter
from edgeopt.types import Format, NpuKind

EXPORTERS: dict[Format, str] = {
    "litert": "edgeopt.exporter.litert:LiteRTExporter",
    "onnx": "edgeopt.exporter.onnx:OnnxExporter",
    "executorch": "edgeopt.exporter.executorch:ExecuTorchExporter",
    "coreml": "edgeopt.exporter.coreml:CoreMLExporter",
}
#: Those that make a file for an accelerator in another way than the format's own exporter does.
NPU_EXPORTERS: dict[tuple[Format, NpuKind], str] = {
    ("litert", "ethos-u55"): "edgeopt.exporter.litert_ethos_u:EthosUExporter",
    ("litert", "ethos-u65"): "edgeopt.exporter.litert_ethos_u:EthosUExporter",
    ("litert", "ethos-u85"): "edgeopt.exporter.litert_ethos_u:EthosUExporter",
    ("litert", "edge-tpu"): "edgeopt.exporter.litert_edge_tpu:EdgeTpuExporter",
    ("onnx", "hexagon"): "edgeopt.exporter.onnx_hexagon:HexagonExporter",
    ("executorch", "ethos-u55"): "edgeopt.exporter.executorch_arm:ArmExporter",
    ("executorch", "ethos-u65"): "edgeopt.exporter.executorch_arm:ArmExporter",
    ("executorch", "ethos-u85"): "edgeopt.exporter.executorch_arm:ArmExporter",
    ("executorch", "vgf"): "edgeopt.exporter.executorch_arm:ArmExporter",
    ("executorch", "hexagon"): "edgeopt.exporter.executorch_hexagon:HexagonExporter",
    ("executorch", "neural-engine"): "edgeopt.exporter.executorch_coreml:CoreMLDelegateExporter",
    ("executorch", "vulkan"): "edgeopt.exporter.executorch_vulkan:VulkanExporter",
}


def load_exporter(format_: Format, kind: NpuKind | None = None) -> Exporter:
    """The exporter of a format, for an accelerator where one is given; imports its module now."""
    path = EXPORTERS[format_] if kind is None else NPU_EXPORTERS.get((format_, kind), EXPORTERS[format_])
    module, _, name = path.partition(":")
    exporter: Exporter = getattr(import_module(module), name)()
    return exporter
