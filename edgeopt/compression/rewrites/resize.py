"""Enlarging images in steps that accelerators have no kernel for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compression.graph import arguments, is_node, name_of, shape_of
from edgeopt.compression.rewrites.base import EXACT_DB, Form
from edgeopt.types import NpuKind

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node


@dataclass(frozen=True, slots=True)
class AlignCorners:
    """Bilinear interpolation with aligned corners as two products with constant matrices, one per axis.

    Pixel i of m takes its value from position i (n - 1) / (m - 1) of n, which is between two pixels. The matrices are
    weights of 1x1 convolutions, with the axis in the place of the channels.
    """

    name: ClassVar[str] = "align-corners"
    summary: ClassVar[str] = "bilinear resizing with aligned corners as two 1x1 convolutions"
    helps: ClassVar[frozenset[NpuKind]] = frozenset({"ethos-u55", "ethos-u65", "ethos-u85"})
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        if name_of(node) != "aten.upsample_bilinear2d" or arguments(node)["align_corners"] is not True:
            return None
        before, after = _sizes(node)
        if before is None or after is None or before == after:
            return None

        def resized(x: Tensor, *rest: object) -> Tensor:
            del rest
            return _along_width(_along_height(x, after[0]), after[1])

        return resized


@dataclass(frozen=True, slots=True)
class NearestFactor:
    """Nearest-neighbour enlargement by whole factors other than powers of two: with channels last, repeating each
    pixel is a concatenation along the channels, read as more pixels."""

    name: ClassVar[str] = "nearest-factor"
    summary: ClassVar[str] = "nearest-neighbour resizing by an odd factor as concatenations"
    helps: ClassVar[frozenset[NpuKind]] = frozenset({"ethos-u55", "ethos-u65"})
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        if name_of(node) != "aten.upsample_nearest2d":
            return None
        before, after = _sizes(node)
        if before is None or after is None or any(new % old for new, old in zip(after, before, strict=True)):
            return None
        factors = [new // old for new, old in zip(after, before, strict=True)]
        if all(factor & (factor - 1) == 0 for factor in factors):
            return None

        def repeated(x: Tensor, *rest: object) -> Tensor:
            del rest
            return _repeated(x, *factors)

        return repeated


def _sizes(node: Node) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Height and width before and after."""
    source = node.args[0]
    before, after = shape_of(source) if is_node(source) else None, shape_of(node)
    return None if before is None else before[-2:], None if after is None else after[-2:]


def _along_height(x: Tensor, size: int) -> Tensor:
    from torch.nn import functional

    weight = _interpolation(x.shape[2], size).to(x.dtype)[:, :, None, None]
    return functional.conv2d(x.transpose(1, 2), weight).transpose(1, 2)


def _along_width(x: Tensor, size: int) -> Tensor:
    from torch.nn import functional

    weight = _interpolation(x.shape[3], size).to(x.dtype)[:, :, None, None]
    return functional.conv2d(x.transpose(1, 3), weight).transpose(1, 3)


def _interpolation(old: int, new: int) -> Tensor:
    """(new, old): how much each old pixel has of each new one."""
    import torch

    matrix = torch.zeros(new, old, dtype=torch.float64)
    position = torch.arange(new, dtype=torch.float64) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    low = position.floor().clamp(max=old - 1).long()
    share = (position - low)[:, None]
    matrix = matrix.scatter_add(1, low[:, None], 1 - share)
    return matrix.scatter_add(1, (low + 1).clamp(max=old - 1)[:, None], share)


def _repeated(x: Tensor, tall: int, wide: int) -> Tensor:
    import torch

    batch, channels, height, width = x.shape
    last = x.permute(0, 2, 3, 1)
    if wide > 1:
        last = torch.cat([last] * wide, 3).reshape(batch, height, width * wide, channels)
    if tall > 1:
        rows = last.reshape(batch, height, 1, width * wide * channels)
        last = torch.cat([rows] * tall, 2).reshape(batch, height * tall, width * wide, channels)
    return last.permute(0, 3, 1, 2)
