"""The processors that a device gives to so many threads, in the terms of the latency model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import Field

from edgeopt.device_profiles.schema import CoreCluster, DeviceProfile
from edgeopt.errors import UsageError
from edgeopt.prediction.work import Arithmetic, Kind
from edgeopt.toml_data import Form, parse, read_toml

_TABLE = Path(__file__).with_name("cores.toml")
#: Columns of a tile of the matrix kernels; see `edgeopt.device_profiles.channels` for the sources.
_NARROW, _WIDE = 8, 16


class _CoreForm(Form):
    kind: str
    macs: float = Field(gt=0)


class _TableForm(Form):
    kinds: dict[str, float]
    cores: dict[str, _CoreForm]


@dataclass(frozen=True, slots=True)
class Core:
    """One core: `macs` fp32 multiply-accumulates and `stream` bytes per cycle at best, at `ghz`."""

    name: str
    kind: str
    macs: float
    stream: float
    ghz: float
    features: tuple[str, ...]

    def lanes(self, arithmetic: Arithmetic, kind: Kind) -> float:
        """Multiply-accumulates per cycle as a multiple of those in fp32."""
        if arithmetic == "fp32":
            return 1.0
        if arithmetic == "fp16":
            return 2.0 if "fp16" in self.features else 1.0
        # The dot-product instructions sum four or eight neighbours in memory, which in a depthwise layer are channels.
        if kind == "depthwise":
            return 2.0
        if "i8mm" in self.features:
            return 8.0
        return 4.0 if "dotprod" in self.features else 2.0

    def efficiency_key(self, arithmetic: Arithmetic, kind: Kind) -> str:
        """Name of the fitted efficiency that applies."""
        if kind == "depthwise":
            return "depthwise-int8" if arithmetic == "int8" else "depthwise-float"
        if kind not in ("conv", "matmul"):
            return kind
        if arithmetic == "int8":
            return {2.0: "matrix-int8", 4.0: "matrix-dotprod", 8.0: "matrix-i8mm"}[self.lanes("int8", kind)]
        return "matrix-fp16" if self.lanes(arithmetic, kind) > 1.0 else "matrix-fp32"

    def tile(self, arithmetic: Arithmetic, kind: Kind) -> int:
        """Output channels that the kernel computes together."""
        if kind == "depthwise":
            return _NARROW
        return _WIDE if self.lanes(arithmetic, kind) > (2.0 if arithmetic == "int8" else 1.0) else _NARROW


@dataclass(frozen=True)
class Machine:
    """The cores at work, fastest first: threads go to the big cores first, as schedulers and benchmarks do."""

    name: str
    cores: tuple[Core, ...]

    @property
    def threads(self) -> int:
        return len(self.cores)

    @property
    def fastest(self) -> Core:
        return self.cores[0]

    @cached_property
    def stream(self) -> float:
        """Bytes per nanosecond that the fastest core streams."""
        return self.fastest.stream * self.fastest.ghz


def machine(device: DeviceProfile, threads: int, max_mhz: int | None = None) -> Machine:
    """The cores of `device` that `threads` threads run on.

    Threads beyond the last core share cores and add nothing. `max_mhz` caps the clock, for boards that run slower than
    their profile says.

    Raises:
        UsageError: `threads` is not positive, or the device is one that the model knows nothing about.
    """
    if threads < 1:
        raise UsageError("must be 1 or more", where="--threads")
    cores = sorted(_cores(device, max_mhz), key=lambda core: core.macs * core.ghz, reverse=True)
    return Machine(device.name, tuple(cores[:threads]))


def _cores(device: DeviceProfile, max_mhz: int | None) -> Sequence[Core]:
    table = parse(_TableForm, read_toml(_TABLE), _TABLE)
    return [core for cluster in device.clusters for core in _cluster(device, cluster, table, max_mhz)]


def _cluster(device: DeviceProfile, cluster: CoreCluster, table: _TableForm, max_mhz: int | None) -> Sequence[Core]:
    known = table.cores.get(cluster.core)
    if known is None:
        raise UsageError(
            f"the latency model knows nothing about the core {cluster.core}",
            where=f"device {device.name!r}",
            fix="measure on the device, or name the Arm core that this one derives from",
        )
    ghz = min(cluster.max_mhz, max_mhz or cluster.max_mhz) / 1000
    core = Core(cluster.core, known.kind, known.macs, table.kinds[known.kind], ghz, cluster.features)
    return [core] * cluster.count
