"""The accelerators that a file can be made for, each with what its compiler and emulator must know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EthosUKind = Literal["ethos-u55", "ethos-u65", "ethos-u85"]
NpuKind = Literal[
    "ethos-u55", "ethos-u65", "ethos-u85", "edge-tpu", "hexagon", "neural-engine", "openvino", "vulkan", "vgf"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class EthosU:
    """An Arm Ethos-U microNPU.

    Attributes:
        macs: 8-bit multiply-accumulates per cycle: U55 64, 128 or 256 (32 is not offered), U65 256 or 512, U85 128 to
            2048.
        mhz: clock of the NPU on this board.
        system_config, memory_mode: names in Vela's configuration file.
        sram_bytes: what the model's tensors may take of the on-chip memory.
        storage_bytes: what weights and command stream may take of flash or DRAM.
    """

    kind: EthosUKind
    macs: int
    mhz: int
    system_config: str
    memory_mode: str
    sram_bytes: int
    storage_bytes: int


@dataclass(frozen=True, slots=True)
class EdgeTpu:
    """Google's Edge TPU. `cache_bytes` is its on-chip memory, which caches parameters; `link` connects it."""

    cache_bytes: int
    link: Literal["usb3", "usb2", "pcie"]
    kind: Literal["edge-tpu"] = "edge-tpu"


@dataclass(frozen=True, slots=True)
class Hexagon:
    """The tensor processor (HTP) of a Qualcomm system on chip.

    Attributes:
        architecture: "v68" to "v81", as QNN's `htp_arch`.
        soc_model: QNN's number of the system on chip; None where unknown.
        vtcm_mb: tightly coupled memory; None where unknown.
    """

    architecture: str
    soc_model: int | None
    vtcm_mb: int | None
    kind: Literal["hexagon"] = "hexagon"


@dataclass(frozen=True, slots=True)
class NeuralEngine:
    """Apple's Neural Engine. `ios` is the first system version that the device shipped with."""

    chip: str
    cores: int
    ios: int
    kind: Literal["neural-engine"] = "neural-engine"


@dataclass(frozen=True, slots=True)
class OpenVino:
    """What OpenVINO drives in an Intel machine, in its own words: "CPU", "GPU", "NPU"."""

    devices: tuple[str, ...]
    kind: Literal["openvino"] = "openvino"


@dataclass(frozen=True, slots=True)
class Vulkan:
    """Any GPU with Vulkan 1.1 compute shaders."""

    kind: Literal["vulkan"] = "vulkan"


@dataclass(frozen=True, slots=True)
class Vgf:
    """A GPU with Arm's neural graphics extensions for Vulkan (tensors and data graphs)."""

    kind: Literal["vgf"] = "vgf"


Npu = EthosU | EdgeTpu | Hexagon | NeuralEngine | OpenVino | Vulkan | Vgf
