"""Time of one inference from what a network computes and moves. Nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.accelerators.edge_tpu.figures import MEBI, Rates
from edgeopt.accelerators.edge_tpu.parameters import parameter_bytes
from edgeopt.accelerators.edge_tpu.work import Work

_GIGA = 1e9
#: What of the inputs the chip waits for. More comes in parts, each while the chip works on the one before it: compiled
#: files take 300 KiB in one part and 770 KiB in two (docs/HARDWARE_ANALYSIS.md of
#: github.com/ricardodeazambuja/LibrEdgeTPU).
_AWAITED_BYTES = 2**18
#: How much of the shorter of computing and streaming parameters happens during the longer. Chosen so that networks of
#: families left out of the fit are met best; at none and at all of it, errors are larger.
_AT_ONCE = 0.5


@dataclass(frozen=True, slots=True)
class Load:
    """What one inference asks for.

    Attributes:
        chip_ms, streaming_ms, host_ms: of all operators: computing on the Edge TPU, their parameters over the link, and
            on the host's CPU.
        sent_bytes, received_bytes: activations to the Edge TPU and back.
    """

    chip_ms: float
    streaming_ms: float
    host_ms: float
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Milliseconds of one inference; `spread` is the range that half of the measured networks fall into."""

    ms: float
    spread: tuple[float, float]


def chip_ms(work: Work, rates: Rates) -> float:
    """Time of one operator on the Edge TPU, once its weights are there."""
    rate = rates.depthwise if work.kind == "depthwise" else rates.dense
    return work.padded_macs / _GIGA * rate + rates.operator


def streaming_ms(work: Work, rates: Rates) -> float:
    """Time of one operator's weights on the link."""
    return parameter_bytes(work) / MEBI * rates.streaming


def host_ms(work: Work, rates: Rates) -> float:
    """Time of one operator on the CPU: a rough figure, since the host is not known."""
    moved = 0.0 if work.weights else (work.bytes_in + work.bytes_out) / MEBI * rates.host_byte
    return work.macs / _GIGA * rates.host_mac + moved


def total(load: Load, rates: Rates) -> Estimate:
    """The whole inference: inputs, computing and streaming partly at once, outputs, and what is left to the host."""
    awaited = min(load.sent_bytes, _AWAITED_BYTES)
    link = awaited * rates.upload + (load.sent_bytes - awaited) * rates.streaming + load.received_bytes * rates.download
    device = load.chip_ms + load.streaming_ms - _AT_ONCE * min(load.chip_ms, load.streaming_ms)
    ms = link / MEBI + device + load.host_ms
    low, high = rates.quartiles
    return Estimate(ms, (ms / (1 + high), ms / (1 + low)))
