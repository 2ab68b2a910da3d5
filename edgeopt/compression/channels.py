"""Which channels of a network must be rescaled together for its function to stay the same.

Every channel of every activation carries a label. All tensor elements with one label may be divided by one positive
number s, provided that every operator that writes the label divides its weights by s and every one that reads it
multiplies them; label 0 stands for "can't be scaled". Labels are int64 tensors with the rank of the activation and
size 1 along axes on which they don't depend, so data movement (a flatten, a split of attention heads, a concatenation)
is followed by performing it on the labels. What no rule knows pins its inputs to label 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeopt.compression.graph import MOVES, Graph, Operator, arguments, aten, is_in_place, is_node, name_of, shape_of
from edgeopt.types import Array

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

#: f(x / s) = f(x) / s for every s > 0, element by element.
_HOMOGENEOUS = aten(
    "abs alias clone contiguous detach dropout alpha_dropout feature_dropout identity leaky_relu lift_fresh_copy "
    "neg prelu relu"
)
#: The same, mixing elements along their last axes, of which there are so many.
_POOLING = {
    f"aten.{name}{rank}d": rank
    for rank in (1, 2, 3)
    for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest")
} | {"aten.upsample_linear1d": 1, "aten.upsample_bilinear2d": 2, "aten.upsample_bicubic2d": 2}
_REDUCTIONS = frozenset(("aten.mean", "aten.sum", "aten.amax", "aten.amin"))
#: Both operands must be scaled alike.
_JOINING = frozenset(("aten.add", "aten.sub", "aten.maximum", "aten.minimum"))
_PADDING = frozenset(("aten.pad", "aten.constant_pad_nd"))
#: Types between which values are the same up to rounding.
_FLOATS = ("torch.float32", "torch.float64")


class Channels:
    """Labels of all activations of a graph.

    Attributes:
        inputs, outputs: label of each input and output channel of each operator, before joining: what one operator
            wrote has the same label where another reads it, unless two of them met.
        count: number of labels, 0 included.
    """

    def __init__(self, graph: Graph) -> None:
        self.inputs: dict[Node, Array] = {}
        self.outputs: dict[Node, Array] = {}
        self.count = 1
        self._labels: dict[Node, torch.Tensor | tuple[torch.Tensor, ...]] = {}
        self._joined: list[tuple[Array, Array]] = []
        self._operators = graph.operators
        for node in graph.nodes:
            if node.op == "output":
                self._pin_inputs(node)
            else:
                self._labels[node] = self._follow(node)

    def classes(self) -> Array:
        """For each label the smallest label that it is joined with; 0 for all that can't be scaled."""
        root: Array = np.arange(self.count)
        if not self._joined:
            return root
        left, right = (np.concatenate(side) for side in zip(*self._joined, strict=True))
        while True:
            lowest = np.minimum(root[left], root[right])
            smaller = root.copy()
            # Hooking the roots too, and not only the labels, makes whole trees move at once.
            for labels in (left, right):
                np.minimum.at(smaller, labels, lowest)
                np.minimum.at(smaller, root[labels], lowest)
            smaller = smaller[smaller]
            if np.array_equal(smaller, root):
                return root
            root = smaller

    # --- one rule per kind of operator -------------------------------------------------------------------------------

    def _follow(self, node: Node) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if node in self._operators:
            return self._through_weights(self._operators[node])
        name = name_of(node)
        if str(node.target) == "<built-in function getitem>":
            return self._item(node)
        if not name or (shape_of(node) is None and name not in MOVES):
            return self._unknown(node)
        if name in _HOMOGENEOUS or (name in ("aten._to_copy", "aten.to") and self._keeps_precision(node)):
            return self._of(node.args[0])
        if name in _POOLING:
            return self._within(node, range(-_POOLING[name], 0))
        if name in _JOINING:
            return self._join(node)
        if name in ("aten.mul", "aten.div") and arguments(node).get("rounding_mode") is None:
            return self._product(node)
        if name in MOVES:
            return self._move(node)
        if name == "aten.cat":
            return self._concatenate(node)
        if name in _REDUCTIONS:
            return self._reduce(node)
        if name in _PADDING:
            return self._pad(node)
        if name in ("aten.clamp", "aten.clamp_min", "aten.hardtanh", "aten.relu6"):
            return self._clip(node)
        if name in ("aten.matmul", "aten.bmm"):
            return self._matrix_product(node)
        if name == "aten.scaled_dot_product_attention":
            return self._attention(node)
        return self._unknown(node)

    def _through_weights(self, operator: Operator) -> torch.Tensor:
        """The one place where a label ends and another begins."""
        import torch

        labels = self._of(operator.value)
        rank = labels.dim()
        axis = operator.channel_axis % rank
        if operator.kind == "affine":
            self._pin(labels)
        elif all(size == 1 for other, size in enumerate(labels.shape) if other != axis):
            self.inputs[operator.node] = labels.reshape(-1).expand(operator.in_channels).numpy().copy()
        else:
            self._pin(labels)
            self.inputs[operator.node] = np.zeros(operator.in_channels, np.int64)
        shape = shape_of(operator.node) or ()
        if operator.has_foreign_bias:
            self.outputs[operator.node] = np.zeros(operator.out_channels, np.int64)
            return torch.zeros([1] * len(shape), dtype=torch.int64)
        fresh = np.arange(self.count, self.count + operator.out_channels)
        self.count += operator.out_channels
        self.outputs[operator.node] = fresh
        made = torch.from_numpy(fresh)
        if operator.kind == "affine" and operator.channel_axis == -1:
            own = operator.out_index.shape
            return made.reshape([1] * (len(shape) - len(own)) + list(own))
        return made.reshape([-1 if other == operator.channel_axis % len(shape) else 1 for other in range(len(shape))])

    def _within(self, node: Node, axes: range) -> torch.Tensor:
        """Mixes values along these axes, without changing the number of axes."""
        labels = self._of(node.args[0])
        return labels if all(labels.shape[axis] == 1 for axis in axes) else self._unknown(node)

    def _join(self, node: Node) -> torch.Tensor:
        if any(isinstance(operand, int | float) and operand != 0 for operand in node.args[:2]):
            return self._unknown(node)
        left, right = self._of(node.args[0]), self._of(node.args[1])
        shape = np.broadcast_shapes(left.shape, right.shape)
        left, right = left.expand(shape), right.expand(shape)
        self._joined.append((left.reshape(-1).numpy(), right.reshape(-1).numpy()))
        return left.contiguous()

    def _product(self, node: Node) -> torch.Tensor:
        """One factor keeps its scale, the other must not be scaled."""
        import torch

        scaled, fixed = self._of(node.args[0]), self._of(node.args[1])
        # In place, the first factor stays what its other readers see.
        if name_of(node) == "aten.mul" and not is_in_place(node) and not scaled.any():
            scaled, fixed = fixed, scaled
        self._pin(fixed)
        if node.args[0] is node.args[1]:
            return torch.zeros_like(scaled)
        missing = len(shape_of(node) or ()) - scaled.dim()
        return scaled.reshape([1] * missing + list(scaled.shape))

    def _move(self, node: Node) -> torch.Tensor | tuple[torch.Tensor, ...]:
        import torch
        from torch.fx.node import map_arg

        if any(shape_of(source) is None for source in node.all_input_nodes):
            return self._unknown(node)
        full = {source: self._of(source).expand(shape_of(source) or ()) for source in node.all_input_nodes}
        # The labels' memory may be laid out otherwise than the activation's.
        is_view = str(node.target) in ("aten.view.default", "aten._unsafe_view.default")
        operator = torch.ops.aten.reshape.default if is_view else node.target
        assert callable(operator)
        moved = operator(*map_arg(node.args, full.__getitem__), **map_arg(node.kwargs, full.__getitem__))
        return tuple(_compress(part) for part in moved) if isinstance(moved, list | tuple) else _compress(moved)

    def _concatenate(self, node: Node) -> torch.Tensor:
        """Joined along the axis without spreading the labels over the others."""
        import torch

        given = arguments(node)
        parts, axis, rank = given["tensors"], given["dim"], len(shape_of(node) or ())
        assert isinstance(parts, list | tuple)
        assert isinstance(axis, int)
        if any(len(shape_of(part) or ()) != rank for part in parts):
            return self._unknown(node)
        labels = [self._of(part) for part in parts]
        widest = [max(sizes) for sizes in zip(*(part.shape for part in labels), strict=True)]
        spread = []
        for part, own in zip(parts, labels, strict=True):
            sizes = list(widest)
            sizes[axis] = (shape_of(part) or ())[axis]
            spread.append(own.expand(sizes))
        return _compress(torch.cat(spread, axis))

    def _reduce(self, node: Node) -> torch.Tensor:
        given = arguments(node)
        axes, keeps = given.get("dim"), given.get("keepdim")
        labels = self._of(node.args[0])
        if isinstance(axes, int):
            axes = [axes]
        if not isinstance(axes, list | tuple) or not axes or any(labels.shape[int(axis)] != 1 for axis in axes):
            return self._unknown(node)
        if keeps:
            return labels
        gone = {int(axis) % labels.dim() for axis in axes}
        return labels.reshape([size for axis, size in enumerate(labels.shape) if axis not in gone])

    def _pad(self, node: Node) -> torch.Tensor:
        given = arguments(node)
        amounts, mode, value = given["pad"], given.get("mode", "constant"), given.get("value")
        assert isinstance(amounts, list | tuple)
        if mode == "constant" and value not in (None, 0):
            return self._unknown(node)
        # Amounts come in pairs, last axis first.
        padded = [-1 - index // 2 for index, amount in enumerate(amounts) if amount != 0]
        labels = self._of(node.args[0])
        return labels if all(labels.shape[axis] == 1 for axis in padded) else self._unknown(node)

    def _clip(self, node: Node) -> torch.Tensor:
        """A lower bound of 0 alone is a ReLU. Under others the channels stay themselves but can't be scaled."""
        labels = self._of(node.args[0])
        given = arguments(node)
        is_relu = name_of(node) in ("aten.clamp", "aten.clamp_min") and given.get("min") == 0
        if not is_relu or given.get("max") is not None:
            self._pin_inputs(node)
        return labels

    def _matrix_product(self, node: Node) -> torch.Tensor:
        """Of two activations: a weighted mean of the rows of the right one where the left one can't be scaled."""
        left, right = self._of(node.args[0]), self._of(node.args[1])
        rank = len(shape_of(node) or ())
        if left.dim() != rank or right.dim() != rank or rank < 2 or left.any() or right.shape[-2] != 1:
            return self._unknown(node)
        return right

    def _attention(self, node: Node) -> torch.Tensor:
        given = arguments(node)
        values, rank = self._of(given["value"]), len(shape_of(node) or ())
        if given.get("enable_gqa") or values.dim() != rank or values.shape[-2] != 1:
            return self._unknown(node)
        for name in ("query", "key", "attn_mask"):
            if is_node(given[name]):
                self._pin(self._of(given[name]))
        return values

    def _item(self, node: Node) -> torch.Tensor | tuple[torch.Tensor, ...]:
        source, index = node.args[0], node.args[1]
        parts = self._labels[source] if is_node(source) else None
        return parts[index] if isinstance(parts, tuple) and isinstance(index, int) else self._unknown(node)

    # --- labels ------------------------------------------------------------------------------------------------------

    def _of(self, argument: object) -> torch.Tensor:
        """Labels of an operand; a number, like a weight that no rule knows, can't be scaled."""
        import torch

        labels = self._labels[argument] if is_node(argument) else None
        return labels if isinstance(labels, torch.Tensor) else torch.zeros((), dtype=torch.int64)

    def _unknown(self, node: Node) -> torch.Tensor:
        import torch

        self._pin_inputs(node)
        return torch.zeros([1] * len(shape_of(node) or ()), dtype=torch.int64)

    def _pin_inputs(self, node: Node) -> None:
        for source in node.all_input_nodes:
            labels = self._labels[source]
            for part in labels if isinstance(labels, tuple) else (labels,):
                self._pin(part)

    def _pin(self, labels: torch.Tensor) -> None:
        pinned = np.unique(labels.numpy())
        self._joined.append((pinned, np.zeros_like(pinned)))

    def _keeps_precision(self, node: Node) -> bool:
        source = node.args[0]
        dtypes = [str(other.meta["val"].dtype) for other in (source, node) if is_node(other)]
        return len(dtypes) == 2 and all(dtype in _FLOATS for dtype in dtypes)


def _compress(full: torch.Tensor) -> torch.Tensor:
    """Keep one entry along every axis on which nothing depends."""
    import torch

    # Axes that were never spread cost nothing to recognize, and make the others cheap.
    for axis in sorted(range(full.dim()), key=lambda axis: full.stride()[axis] != 0):
        first = full.narrow(axis, 0, 1) if full.size(axis) else full
        if full.stride()[axis] == 0 or torch.equal(full, first.expand_as(full)):
            full = first
    return full
