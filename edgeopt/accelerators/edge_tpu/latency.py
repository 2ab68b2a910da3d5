"""Time of one inference from what a network computes and moves. Nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeopt.accelerators.edge_tpu.figures import MEBI, Rates
from edgeopt.accelerators.edge_tpu.parameters import parameter_bytes
from edgeopt.accelerators.edge_tpu.work import Work

_GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Estimate:
    """Milliseconds of one inference; `spread` is the range that half of the measured networks fall into."""

    ms: float
    spread: tuple[float, float]


def device_ms(work: Work, rates: Rates, *, streamed: bool) -> float:
    """Time of one operator on the Edge TPU, with its weights where they cross the link each time."""
    rate = rates.depthwise if work.kind == "depthwise" else rates.dense
    streaming = parameter_bytes(work) / MEBI * rates.streaming if streamed else 0.0
    return work.padded_macs / _GIGA * rate + rates.operator + streaming


def host_ms(work: Work, rates: Rates) -> float:
    """Time of one operator on the CPU: a rough figure, since the host is not known."""
    moved = 0.0 if work.weights else (work.bytes_in + work.bytes_out) / MEBI * rates.host_byte
    return work.macs / _GIGA * rates.host_mac + moved


def total(operators_ms: Sequence[float], transfer_bytes: int, rates: Rates) -> Estimate:
    """The whole inference: all operators one after the other, and inputs and outputs over the link."""
    ms = sum(operators_ms) + transfer_bytes / MEBI * rates.transfer
    low, high = rates.quartiles
    return Estimate(ms, (ms / (1 + high), ms / (1 + low)))
