"""Constants of the latency model, each with its origin. `benchmarks/edge_tpu.py` fits them again and prints its errors.

Shape of the model, and the rates at the default clock: fitted to 41 networks without CPU operators that one bench
measured on a Coral USB Accelerator (github.com/jiaheguo521/int8-pruning-pipeline, results/), by non-negative least
squares of the relative error. Rates of the link at the maximum clock: fitted to 12 networks of Coral's benchmark table
(coral.ai/docs/edgetpu/benchmarks), with the chip's own times halved, as its clock is doubled there.

The host matters: github.com/mouad-zouhdi/sparta-edgetpu measures 2.3 ms per streamed MiB with an x86 host, and 3.3 with
a Raspberry Pi 4 and the same stick. The rates of USB 3 here are those of desktop computers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MEBI = 2**20
Link = Literal["usb3", "usb2", "pcie"]


@dataclass(frozen=True, slots=True)
class Rates:
    """Milliseconds per unit of work.

    Attributes:
        transfer: per MiB of inputs and outputs.
        streaming: per MiB of parameters that are not cached.
        dense: per 10^9 padded MACs.
        depthwise: per 10^9 MACs.
        operator: per operator on the Edge TPU.
        host_mac: per 10^9 MACs on the host's CPU, one thread of int8 kernels.
        host_byte: per MiB that an operator without MACs reads and writes on the host's CPU.
        quartiles: 25th and 75th percentile of (estimated - measured) / measured, for networks left out of the fit (at
            the default clock: with all others of their family).
    """

    transfer: float
    streaming: float
    dense: float
    depthwise: float
    operator: float
    host_mac: float
    host_byte: float
    quartiles: tuple[float, float]


#: At the default clock (package libedgetpu1-std). Host: 10^9 MACs take Coral's desktop CPU about 65 ms (ResNet-50 and
#: VGG16 in Coral's table). What moves data only costs 0.1 ms per MiB in the study's control (a nearest enlargement on
#: the host) and 3 in Coral's DeepLab row (a bilinear one and an arg-max): 0.5, an order of magnitude and no more.
_USB3 = Rates(9.45, 1.97, 1.36, 89.0, 0.0164, 65.0, 0.5, (-0.056, 0.045))
#: At the maximum clock (package libedgetpu1-max): Coral's table for the USB Accelerator.
USB3_MAXIMUM = Rates(8.11, 2.23, 0.68, 44.5, 0.0082, 65.0, 0.5, (-0.052, 0.077))
#: The Dev Board, whose chip always runs at the maximum clock. Its own CPU (Cortex-A53) is the host.
_PCIE = Rates(8.52, 2.68, 0.68, 44.5, 0.0082, 250.0, 5.0, (-0.135, 0.080))
#: Nobody publishes figures over USB 2.0: the chip of the USB 3 row behind about 40 MB/s, 25 ms per MiB, which is what
#: drivers reach there.
_USB2 = Rates(25.0, 25.0, 1.36, 89.0, 0.0164, 65.0, 0.5, (-0.5, 0.5))

RATES: dict[Link, Rates] = {"usb3": _USB3, "usb2": _USB2, "pcie": _PCIE}
