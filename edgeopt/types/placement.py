"""Which operators of a file an accelerator takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class OpPlacement:
    """Where one operator of the exported file runs.

    Attributes:
        name: unique in the file.
        type: the format's operator name ("CONV_2D", "Conv", "aten.convolution.default").
        on: the accelerator, or the CPU that it falls back to.
        layer: path of the source layer where the format keeps it.
        reason: why not on the accelerator; None where it is.
        fix: what would bring it there, where something would.
        ms: estimated time of one inference there; None where nobody can tell.
    """

    name: str
    type: str
    on: Literal["accelerator", "cpu"]
    layer: str | None = None
    reason: str | None = None
    fix: str | None = None
    ms: float | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where all operators of a file run, in file order. Constants and the file's own bookkeeping are not listed.

    Attributes:
        accelerator: as people call it: "Ethos-U55-128", "Edge TPU", "Hexagon v73".
        told_by: who says so: "vela 5.1.0", "edgetpu_compiler 16.0", "published operator rules".
        predicted: whether that is a prediction, and not the word of the compiler or runtime that decides.
    """

    accelerator: str
    told_by: str
    predicted: bool
    ops: tuple[OpPlacement, ...]

    @property
    def on_cpu(self) -> tuple[OpPlacement, ...]:
        return tuple(op for op in self.ops if op.on == "cpu")

    @property
    def accelerated(self) -> float:
        """Fraction of the operators that run on the accelerator; 1 for a file without operators."""
        return 1 - len(self.on_cpu) / len(self.ops) if self.ops else 1.0

    @property
    def fallbacks(self) -> Counter[tuple[str, str]]:
        """(operator type, reason) -> how many operators fall back to the CPU for it."""
        return Counter((op.type, op.reason or "not told") for op in self.on_cpu)
