"""Exported file -> what an accelerator makes of it: its compiler's output, and which operators it takes."""

from __future__ import annotations

from importlib import import_module

from edgeopt.accelerators.base import Accelerator
from edgeopt.errors import ConfigError
from edgeopt.types import Format, NpuKind

ACCELERATORS: dict[tuple[Format, NpuKind], str] = {
    ("litert", "ethos-u55"): "edgeopt.accelerators.ethos_u:VelaAccelerator",
    ("litert", "ethos-u65"): "edgeopt.accelerators.ethos_u:VelaAccelerator",
    ("litert", "ethos-u85"): "edgeopt.accelerators.ethos_u:VelaAccelerator",
    ("executorch", "ethos-u55"): "edgeopt.accelerators.executorch_arm:ArmAccelerator",
    ("executorch", "ethos-u65"): "edgeopt.accelerators.executorch_arm:ArmAccelerator",
    ("executorch", "ethos-u85"): "edgeopt.accelerators.executorch_arm:ArmAccelerator",
    ("executorch", "vgf"): "edgeopt.accelerators.executorch_arm:VgfAccelerator",
    ("litert", "edge-tpu"): "edgeopt.accelerators.edge_tpu:EdgeTpuAccelerator",
    ("onnx", "hexagon"): "edgeopt.accelerators.hexagon:HexagonAccelerator",
    ("litert", "hexagon"): "edgeopt.accelerators.hexagon_sdk:LiteRTHexagonAccelerator",
    ("executorch", "hexagon"): "edgeopt.accelerators.hexagon_sdk:ExecuTorchHexagonAccelerator",
    ("coreml", "neural-engine"): "edgeopt.accelerators.neural_engine:CoreMLAccelerator",
    ("executorch", "neural-engine"): "edgeopt.accelerators.executorch_delegated:CoreMLDelegateAccelerator",
    ("executorch", "vulkan"): "edgeopt.accelerators.executorch_delegated:DelegatedAccelerator",
    ("onnx", "openvino"): "edgeopt.accelerators.openvino:OpenVinoAccelerator",
}


def load_accelerator(format_: Format, kind: NpuKind) -> Accelerator:
    """What compiles files of that format for that accelerator. Raises ConfigError where nothing does."""
    if (format_, kind) not in ACCELERATORS:
        known = ", ".join(name for name, other in ACCELERATORS if other == kind)
        raise ConfigError(f"{kind} takes no {format_} files", fix=f"take one of {known}")
    module, _, name = ACCELERATORS[format_, kind].partition(":")
    accelerator: Accelerator = getattr(import_module(module), name)()
    return accelerator
