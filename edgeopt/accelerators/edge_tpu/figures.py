"""Constants of the latency model, each with its origin. `benchmarks/edge_tpu.py` fits them again and prints its errors.

The rates at the default clock are fitted to 41 networks without CPU operators that one bench measured on a Coral USB
Accelerator (github.com/jiaheguo521/int8-pruning-pipeline, results/), by least squares of the relative error; that of
the way back, 87 MiB/s, is that bench's own. At the maximum clock the chip's own times are halved; nothing is fitted to
the 32 rows of Coral's tables (coral.ai/docs/edgetpu/benchmarks, coral.ai/models/all) that judge it. The Dev Board's
link is fitted to 12 rows of the former.

The host matters: github.com/mouad-zouhdi/sparta-edgetpu measures 2.3 ms per streamed MiB with an x86 host, and 3.3 with
a Raspberry Pi 4 and the same stick. The rates of USB 3 here are those of desktop computers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

MEBI = 2**20
Link = Literal["usb3", "usb2", "pcie"]


@dataclass(frozen=True, slots=True)
class Rates:
    """Milliseconds per unit of work.

    Attributes:
        upload: per MiB of inputs that the chip waits for.
        download: per MiB of outputs.
        streaming: per MiB of parameters that are not cached, and of large inputs.
        dense: per 10^9 padded MACs.
        depthwise: per 10^9 MACs.
        operator: per operator on the Edge TPU.
        host_mac: per 10^9 MACs on the host's CPU, one thread of int8 kernels.
        host_byte: per MiB that an operator without MACs reads and writes on the host's CPU.
        quartiles: 25th and 75th percentile of (estimated - measured) / measured, for networks left out of the fit.
    """

    upload: float
    download: float
    streaming: float
    dense: float
    depthwise: float
    operator: float
    host_mac: float
    host_byte: float
    quartiles: tuple[float, float]


#: At the default clock (package libedgetpu1-std). Host: 10^9 MACs take Coral's desktop CPU about 65 ms (ResNet-50 and
#: VGG16 in Coral's table). What moves data only costs 0.1 ms per MiB in the study's control (a nearest enlargement),
#: 0.6 in the zoo's EfficientDets and 1.2 in its DeepLabs: 0.8, an order of magnitude and no more. The interval is that
#: of networks that nothing was fitted to, as the next one's: the study alone would be too sure of other kinds.
_USB3 = Rates(8.7, 11.49, 2.31, 1.48, 83.3, 0.018, 65.0, 0.8, (-0.05, 0.07))
#: At the maximum clock (package libedgetpu1-max): the same link, the chip twice as fast.
USB3_MAXIMUM = replace(_USB3, dense=_USB3.dense / 2, depthwise=_USB3.depthwise / 2, operator=_USB3.operator / 2)
#: The Dev Board, whose chip always runs at the maximum clock. Its own CPU (Cortex-A53) is the host.
_PCIE = replace(USB3_MAXIMUM, upload=7.98, streaming=2.79, host_mac=250.0, host_byte=5.0, quartiles=(-0.18, 0.10))
#: Nobody publishes figures over USB 2.0: the chip of the USB 3 row behind about 40 MB/s, 25 ms per MiB, which is what
#: drivers reach there.
_USB2 = replace(_USB3, upload=25.0, download=25.0, streaming=25.0, quartiles=(-0.5, 0.5))

RATES: dict[Link, Rates] = {"usb3": _USB3, "usb2": _USB2, "pcie": _PCIE}
