"""What a device profile says. Its TOML form is documented in docs/devices.md; keys are these names in kebab-case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeopt.types import Format, Npu, NpuKind, OpenVino, Vgf, Vulkan

Feature = Literal["neon", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve2", "sme", "mve", "avx2", "avx512", "vnni"]

#: What a file may be made for whatever the device says: any of its GPUs or CPUs will do.
_ANYWHERE: dict[NpuKind, Npu] = {"vulkan": Vulkan(), "vgf": Vgf(), "openvino": OpenVino(("CPU",))}


@dataclass(frozen=True, slots=True)
class CoreCluster:
    """Identical cores: `count` x `core` ("cortex-a76") at up to `max_mhz`, with these instruction-set extensions."""

    core: str
    count: int
    max_mhz: int
    features: tuple[Feature, ...]


@dataclass(frozen=True, slots=True)
class ReferenceLatency:
    """A published figure for this very device: which model, precision and thread count, and where it stands."""

    model: str
    precision: str
    runtime: str
    threads: int | None
    ms: float
    source: str


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Where the model will run.

    `memory_mb` is the RAM of the device; `channel_multiple` is a width step that was found for this device, None where
    that of its kernels applies (see `edgeopt.device_profiles.channels`); `sources` are addresses of the facts;
    `accelerators` names them for people, `npus` describes those that files can be made for.
    """

    name: str
    title: str
    device_class: Literal["flagship", "mid-range", "low-end", "board"]
    soc: str
    year: int
    memory_mb: int
    clusters: tuple[CoreCluster, ...]
    accelerators: tuple[str, ...]
    formats: tuple[Format, ...]
    reference_latencies: tuple[ReferenceLatency, ...]
    sources: tuple[str, ...]
    channel_multiple: int | None = None
    npus: tuple[Npu, ...] = ()

    def npu(self, kind: NpuKind) -> Npu | None:
        """The accelerator of that kind; None where the device has none."""
        return next((npu for npu in self.npus if npu.kind == kind), _ANYWHERE.get(kind))
