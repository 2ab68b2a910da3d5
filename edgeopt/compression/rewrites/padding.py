"""Padding with the image's own pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compression.graph import arguments, is_node, name_of, shape_of
from edgeopt.compression.rewrites.base import EXACT_DB, Form
from edgeopt.types import NpuKind

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

#: Rows on one side; each becomes an operator of its own.
_MOST = 8


@dataclass(frozen=True, slots=True)
class MirrorPad:
    """Reflected and repeated borders as a concatenation of rows and columns."""

    name: ClassVar[str] = "mirror-pad"
    summary: ClassVar[str] = "reflecting or repeating padding as a concatenation of slices"
    helps: ClassVar[frozenset[NpuKind]] = frozenset({"edge-tpu", "ethos-u55", "ethos-u65", "ethos-u85"})
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        if name_of(node) != "aten.pad" or arguments(node)["mode"] not in ("reflect", "replicate"):
            return None
        pads, source = arguments(node)["pad"], node.args[0]
        if not isinstance(pads, list | tuple) or not is_node(source) or shape_of(source) is None:
            return None
        return _padded if all(isinstance(pad, int) and 0 <= pad <= _MOST for pad in pads) else None


def _padded(x: Tensor, pads: list[int], mode: str, value: object) -> Tensor:
    import torch

    del value
    # Pairs of (before, after), the last axis first.
    for back, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True), 1):
        axis = x.ndim - back
        last = x.shape[axis] - 1
        rows = range(-before, 0), range(last + 1, last + 1 + after)
        if mode == "reflect":
            left, right = [-i for i in rows[0]], [2 * last - i for i in rows[1]]
        else:
            left, right = [0] * before, [last] * after
        if not (before or after):
            continue
        x = torch.cat([*(x.narrow(axis, i, 1) for i in left), x, *(x.narrow(axis, i, 1) for i in right)], axis)
    return x
