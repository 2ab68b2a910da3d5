"""What one operator of a network asks of the Edge TPU, without the file that it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Width of the multiplier array: sums run over groups of so many values. The study of 131 compiled networks in
#: github.com/jiaheguo521/int8-pruning-pipeline finds it, too (docs/PRUNING_HAZARDS.md, "Below 64 channels").
LANES = 64
#: Up to so many input channels, the taps of a kernel share one group.
_SHALLOW = 32


@dataclass(frozen=True, slots=True)
class Work:
    """One operator, reduced to what its time and its parameters depend on.

    Attributes:
        kind: "dense" sums over all input channels (CONV_2D, FULLY_CONNECTED, TRANSPOSE_CONV), "depthwise" over one;
            "other" has no weights.
        positions: at which the kernel is applied: the pixels of the output; of the input for TRANSPOSE_CONV.
        channels: of the output.
        taps: height x width of the kernel.
        depth: input channels that one output channel sums over; 1 for "depthwise".
        bytes_in, bytes_out: activations read and written, one byte each value.
    """

    kind: Literal["dense", "depthwise", "other"]
    positions: int
    channels: int
    taps: int
    depth: int
    bytes_in: int
    bytes_out: int

    @property
    def weights(self) -> int:
        return 0 if self.kind == "other" else self.channels * self.taps * self.depth

    @property
    def macs(self) -> int:
        return self.positions * self.weights

    @property
    def padded_macs(self) -> int:
        """MACs with the lanes that stay idle because a sum does not fill its last group; `macs` for "depthwise"."""
        if self.kind != "dense":
            return self.macs
        if self.depth <= _SHALLOW:
            products = round_up(self.taps * self.depth, LANES)
        else:
            products = self.taps * round_up(self.depth, LANES)
        return self.positions * self.channels * products


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
