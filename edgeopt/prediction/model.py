"""The latency model: time of an operator = the longer of computing and moving data, and a fixed cost to start it.

The roofline of Williams, Waterman and Patterson (CACM 52(4), 2009), with efficiencies per kind of kernel, Amdahl's law
over threads, and memory that several cores share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from edgeopt.prediction.machine import Machine
from edgeopt.prediction.work import OpWork

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]

#: What limits an operator.
LIMITS = ("compute", "memory", "dispatch")
#: Rates are in multiply-accumulates and values per nanosecond, times in milliseconds.
_NANOSECONDS = 1e-6
_REFERENCE_GHZ = 2.0

#: Efficiencies (of multiply-accumulates at the instruction set's peak) and, for kinds without any, the peak's cycles
#: that one value takes.
EFFICIENCIES = (
    "matrix-fp32", "matrix-fp16", "matrix-int8", "matrix-dotprod", "matrix-i8mm", "depthwise-float", "depthwise-int8",
    "pool", "elementwise", "transcendental", "movement",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parameters:
    """What the fit found, all positive.

    Attributes:
        efficiency: by name of `EFFICIENCIES`.
        serial: share of an operator's computing that stays on one core.
        sharing: n cores together stream n ** sharing as much as one.
        dispatch_us: to start an operator, on a core of 2 GHz.
        core: factor on the time of computing, by kind of core. memory: factor on the time of streaming, by the same.
        device: factors on the time of computing and of streaming that are left for a device with published figures.
    """

    efficiency: Mapping[str, float]
    serial: float
    sharing: float
    dispatch_us: float
    core: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    device: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Demand:
    """Operators on a machine before any parameter is known: arrays with one entry per operator.

    Attributes:
        compute: milliseconds at full efficiency, spread perfectly. alone: on the fastest core only.
        stream: milliseconds for one core to move the bytes.
        efficiency: index into `EFFICIENCIES`.
        starts: 1 for an operator that has to be started.
        threads, ghz: of the machine.
    """

    compute: Vector
    alone: Vector
    stream: Vector
    efficiency: np.ndarray[tuple[int], np.dtype[np.int64]]
    starts: Vector
    threads: int
    ghz: float
    core: str
    device: str


def demand(works: Iterable[OpWork], on: Machine) -> Demand:
    """What the operators ask of the machine."""
    rows = [_row(work, on) for work in works]
    compute, alone, stream, efficiency, starts = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    return Demand(
        compute=np.asarray(compute, dtype=np.float64),
        alone=np.asarray(alone, dtype=np.float64),
        stream=np.asarray(stream, dtype=np.float64),
        efficiency=np.asarray(efficiency, dtype=np.int64),
        starts=np.asarray(starts, dtype=np.float64),
        threads=on.threads,
        ghz=on.fastest.ghz,
        core=on.fastest.kind,
        device=on.name,
    )


def _row(work: OpWork, on: Machine) -> tuple[float, float, float, int, float]:
    stream = (work.weight_bytes + work.activation_bytes) / on.stream * _NANOSECONDS
    if work.kind == "free":
        return 0.0, 0.0, 0.0, EFFICIENCIES.index("movement"), 0.0
    if work.kind in ("conv", "matmul", "depthwise"):
        tile = on.fastest.tile(work.arithmetic, work.kind)
        amount = work.macs * (-(-work.channels // tile) * tile / work.channels) if work.channels else float(work.macs)
        key = on.fastest.efficiency_key(work.arithmetic, work.kind)
        rates = [core.macs * core.ghz * core.lanes(work.arithmetic, work.kind) for core in on.cores]
    else:
        amount = float(work.macs if work.kind == "pool" else work.elements)
        key = "movement" if work.kind == "unknown" else work.kind
        rates = [core.macs * core.ghz for core in on.cores]
    compute, alone = (amount / rate * _NANOSECONDS for rate in (sum(rates), rates[0]))
    return compute, alone, stream, EFFICIENCIES.index(key), 1.0


def parts(asked: Demand, parameters: Parameters) -> tuple[Vector, Vector, Vector]:
    """Milliseconds of computing, of moving data and of starting, per operator."""
    efficiency = np.array([parameters.efficiency[name] for name in EFFICIENCIES])
    own_compute, own_memory = parameters.device.get(asked.device, (1.0, 1.0))
    factor = parameters.core.get(asked.core, 1.0) * own_compute
    spread = asked.compute * (1.0 - parameters.serial) + asked.alone * parameters.serial
    compute = spread / efficiency[asked.efficiency] * factor
    memory = asked.stream * parameters.memory.get(asked.core, 1.0) * own_memory / asked.threads**parameters.sharing
    return compute, memory, asked.starts * parameters.dispatch_us * 1e-3 * _REFERENCE_GHZ / asked.ghz


def milliseconds(asked: Demand, parameters: Parameters) -> Vector:
    """Time of each operator."""
    compute, memory, start = parts(asked, parameters)
    return np.maximum(compute, memory) + start
