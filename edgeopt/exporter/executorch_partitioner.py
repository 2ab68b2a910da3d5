"""XNNPACK's partitioner, without the operators that its kernels compute otherwise than torch.

ExecuTorch's own checks let them through, and nothing tells: the file runs, and its results differ.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import (
    AvgPoolingConfig,
    UpsampleBilinear2dConfig,
)
from executorch.backends.xnnpack.partition.config.node_configs import MaxDimConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node


class _AveragePooling(AvgPoolingConfig):  # type: ignore[misc]  # executorch ships no types
    """XNNPACK divides by the elements that are no padding; a divisor of one's own counts everywhere."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        padding = node.args[3] if len(node.args) > 3 else 0
        pads = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
        divides_by = node.args[6] if len(node.args) > 6 else None
        return bool(super().check_constraints(node, ep)) and not (pads and divides_by is not None)


class _BilinearResize(UpsampleBilinear2dConfig):  # type: ignore[misc]
    """XNNPACK takes the scale from the sizes. torch takes the factor that it was given, and the two differ where the
    output's size was rounded (9 pixels by 1.5 are 13)."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        return bool(super().check_constraints(node, ep)) and _factors_fit(node)


def _factors_fit(node: Node) -> bool:
    align_corners = node.args[2]
    factors = node.args[3] if len(node.args) > 3 else None
    if align_corners or not isinstance(factors, (list, tuple)):
        return True
    sizes = node.all_input_nodes[0].meta["val"].shape[-2:]
    results = node.meta["val"].shape[-2:]
    return all(
        isinstance(factor, (int, float)) and math.isclose(size * factor, result)
        for size, factor, result in zip(sizes, factors, results, strict=True)
    )


class _Maximum(MaxDimConfig):  # type: ignore[misc]
    """XNNPACK's stands for a pooling over one whole axis of an image. The others it is given, and fails."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        _, axis, keeps_axis, *_ = (*node.args, False)
        return bool(super().check_constraints(node, ep)) and axis in (2, 3) and bool(keeps_axis)


_STRICTER = {
    AvgPoolingConfig: _AveragePooling,
    MaxDimConfig: _Maximum,
    UpsampleBilinear2dConfig: _BilinearResize,
}


def partitioner() -> XnnpackPartitioner:
    """The partitioner of every .pte file for XNNPACK."""
    return XnnpackPartitioner([_STRICTER.get(config, config) for config in ALL_PARTITIONER_CONFIGS])
