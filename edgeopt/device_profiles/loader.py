"""The TOML form of a device profile, and how one is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from edgeopt.device_profiles.schema import CoreCluster, DeviceProfile, Feature, ReferenceLatency
from edgeopt.toml_data import Form, find_file, parse, read_with_bases
from edgeopt.types import EdgeTpu, EthosU, EthosUKind, Format, Hexagon, NeuralEngine, Npu, OpenVino, Precision

DIRECTORY = Path(__file__).parent

Text = Annotated[str, Field(min_length=1)]
Address = Annotated[str, Field(pattern=r"^https?://\S+$")]
Count = Annotated[int, Field(gt=0)]


class ClusterForm(Form):
    core: Text
    count: Count
    max_mhz: Count
    features: list[Feature]


class LatencyForm(Form):
    model: Text
    precision: Precision
    runtime: Text
    threads: Count | None = None
    ms: Annotated[float, Field(gt=0)]
    source: Address


class EthosUForm(Form):
    kind: EthosUKind
    macs: Literal[64, 128, 256, 512, 1024, 2048]
    mhz: Count
    system_config: Text
    memory_mode: Text
    sram_kb: Count
    storage_kb: Count

    def npu(self) -> Npu:
        return EthosU(
            self.kind,
            self.macs,
            self.mhz,
            self.system_config,
            self.memory_mode,
            self.sram_kb << 10,
            self.storage_kb << 10,
        )


class EdgeTpuForm(Form):
    kind: Literal["edge-tpu"]
    cache_kb: Count
    link: Literal["usb3", "usb2", "pcie"]

    def npu(self) -> Npu:
        return EdgeTpu(self.cache_kb << 10, self.link)


class HexagonForm(Form):
    kind: Literal["hexagon"]
    architecture: Annotated[str, Field(pattern=r"^v\d\d$")]
    soc_model: Count | None = None
    vtcm_mb: Count | None = None

    def npu(self) -> Npu:
        return Hexagon(self.architecture, self.soc_model, self.vtcm_mb)


class NeuralEngineForm(Form):
    kind: Literal["neural-engine"]
    chip: Text
    cores: Count
    ios: Count

    def npu(self) -> Npu:
        return NeuralEngine(self.chip, self.cores, self.ios)


class OpenVinoForm(Form):
    kind: Literal["openvino"]
    devices: Annotated[list[Literal["CPU", "GPU", "NPU"]], Field(min_length=1)]

    def npu(self) -> Npu:
        return OpenVino(tuple(self.devices))


NpuForm = Annotated[
    EthosUForm | EdgeTpuForm | HexagonForm | NeuralEngineForm | OpenVinoForm, Field(discriminator="kind")
]


class DeviceForm(Form):
    title: Text
    device_class: Literal["flagship", "mid-range", "low-end", "board"]
    soc: Text
    year: Annotated[int, Field(ge=2000, le=2100)]
    memory_mb: Count
    cluster: Annotated[list[ClusterForm], Field(min_length=1)]
    accelerators: list[Text] = Field(default_factory=list)
    formats: Annotated[list[Format], Field(min_length=1)]
    reference_latency: list[LatencyForm] = Field(default_factory=list)
    sources: Annotated[list[Address], Field(min_length=1)]
    channel_multiple: Count | None = None
    npu: list[NpuForm] = Field(default_factory=list)


def names() -> list[str]:
    """Names of the built-in devices, sorted."""
    return sorted(path.stem for path in DIRECTORY.glob("*.toml"))


def load(name_or_path: str) -> DeviceProfile:
    path = find_file("device", name_or_path, DIRECTORY)
    form = parse(DeviceForm, read_with_bases("device", path, DIRECTORY), path)
    return DeviceProfile(
        name=path.stem,
        title=form.title,
        device_class=form.device_class,
        soc=form.soc,
        year=form.year,
        memory_mb=form.memory_mb,
        clusters=tuple(
            CoreCluster(core=c.core, count=c.count, max_mhz=c.max_mhz, features=tuple(c.features)) for c in form.cluster
        ),
        accelerators=tuple(form.accelerators),
        formats=tuple(form.formats),
        reference_latencies=tuple(ReferenceLatency(**latency.model_dump()) for latency in form.reference_latency),
        sources=tuple(form.sources),
        channel_multiple=form.channel_multiple,
        npus=tuple(npu.npu() for npu in form.npu),
    )
