"""What one operator asks of a processor: the terms that every file format is reduced to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: "conv" sums over channels and a window, "matmul" over one axis, "depthwise" over a window of one channel; "pool"
#: looks at a window without weights, "elementwise" at a value or two, "transcendental" computes exponentials (softmax,
#: sigmoid, normalization), "movement" copies; "free" renames memory; "unknown" is an operator that edgeopt can't place.
Kind = Literal[
    "conv", "depthwise", "matmul", "pool", "elementwise", "transcendental", "movement", "free", "unknown"
]  # fmt: skip
#: In which the products are formed. Weights may be stored narrower.
Arithmetic = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True, slots=True)
class OpWork:
    """One operator of a file.

    Attributes:
        name, type: as `edgeopt inspect --all` shows them.
        macs: multiply-accumulates; for "pool" the values looked at.
        channels: of the output, which matrix kernels compute a tile at a time; 0 where that means nothing.
        elements: values written.
        weight_bytes, activation_bytes: read of constants; read and written of everything else.
    """

    name: str
    type: str
    kind: Kind
    arithmetic: Arithmetic
    macs: int
    channels: int
    elements: int
    weight_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class FileWork:
    """All operators of a file that take time, in file order.

    Attributes:
        ops: without those that the runtime fuses into others or does once when it loads the file.
        assumed: sizes that were chosen for dynamic dimensions, by name.
        delegates: blocks that another processor or a vendor's library runs, and nobody else can look into.
        unsupported: why no time can be told; None where it can.
    """

    ops: tuple[OpWork, ...]
    assumed: tuple[str, ...] = ()
    delegates: tuple[str, ...] = ()
    unsupported: str | None = None

    @property
    def macs(self) -> int:
        return sum(op.macs for op in self.ops if op.kind in ("conv", "depthwise", "matmul"))
