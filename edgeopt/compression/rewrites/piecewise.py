"""Piecewise linear functions, written with operators that quantizers and accelerators know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compression.graph import arguments, name_of
from edgeopt.compression.rewrites.base import EXACT_DB, Form
from edgeopt.types import NpuKind

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

_LITERT_NPUS: frozenset[NpuKind] = frozenset({"ethos-u55", "ethos-u65", "ethos-u85", "edge-tpu"})
#: What LiteRT fuses into the operator before it: RELU_N1_TO_1, RELU_0_TO_1 and RELU6.
_FUSED = ((-1.0, 1.0), (0.0, 1.0), (0.0, 6.0))


@dataclass(frozen=True, slots=True)
class LeakyRelu:
    """LeakyReLU(x) = max(x, slope x) for slopes from 0 to 1."""

    name: ClassVar[str] = "leaky-relu"
    summary: ClassVar[str] = "LeakyReLU as the maximum of x and its multiple"
    helps: ClassVar[frozenset[NpuKind]] = _LITERT_NPUS
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        if name_of(node) != "aten.leaky_relu":
            return None
        slope = arguments(node)["negative_slope"]
        return _leaky if isinstance(slope, int | float) and 0 <= slope <= 1 else None


@dataclass(frozen=True, slots=True)
class Absolute:
    """|x| = max(x, -x)."""

    name: ClassVar[str] = "absolute"
    summary: ClassVar[str] = "the absolute value as the maximum of x and -x"
    helps: ClassVar[frozenset[NpuKind]] = _LITERT_NPUS
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        value = node.meta.get("val")
        return _absolute if name_of(node) == "aten.abs" and value is not None and value.is_floating_point() else None


@dataclass(frozen=True, slots=True)
class Clamp:
    """clamp(x, low, high) = high - relu(high - max(x, low)), where the bounds are none that LiteRT fuses."""

    name: ClassVar[str] = "clamp"
    summary: ClassVar[str] = "clipping to unusual bounds as a difference of ReLUs"
    helps: ClassVar[frozenset[NpuKind]] = _LITERT_NPUS
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        value = node.meta.get("val")
        if name_of(node) not in ("aten.clamp", "aten.hardtanh") or value is None or not value.is_floating_point():
            return None
        _, low, high = arguments(node).values()
        if not isinstance(high, int | float) or not (low is None or isinstance(low, int | float)):
            return None
        return None if (low, high) in _FUSED or (low is not None and low > high) else _clamp


def _leaky(x: Tensor, slope: float) -> Tensor:
    import torch

    return torch.maximum(x, x * slope)


def _absolute(x: Tensor) -> Tensor:
    import torch

    return torch.maximum(x, x * -1.0)


def _clamp(x: Tensor, low: float | None, high: float) -> Tensor:
    above = x if low is None else (x - low).relu() + low if low else x.relu()
    return high - (high - above).relu()
