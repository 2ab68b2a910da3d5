"""Equivalent PyTorch graphs that litert-torch lowers well: to fast kernels that also keep their precision in int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


def rewrite(program: torch.fx.GraphModule) -> None:
    """Apply every rewrite below to an exported program's module, in place."""
    split_overhanging_pools(program)
    keep_spatial_reductions(program)
    infer_dynamic_sizes(program)


def split_overhanging_pools(program: torch.fx.GraphModule) -> None:
    """Average the windows that `ceil_mode` lets hang over the edge on their own, over what is inside only.

    litert-torch pads with zeros, averages whole windows and multiplies by (whole window / part inside). In int8 the
    average has its input's scale, so the zeros cost the result its lower bits: a window that is much larger than the
    feature map, which is how some models pool globally, leaves nothing of it.
    """
    import torch

    aten = torch.ops.aten
    for node in list(program.graph.nodes):
        if node.target not in (aten.avg_pool1d.default, aten.avg_pool2d.default):
            continue
        axes = _overhanging(node)
        if not axes:
            continue
        with program.graph.inserting_before(node):
            (source,) = node.all_input_nodes
            if any(axis.padding for axis in axes):
                sides = [side for axis in reversed(axes) for side in (axis.padding, axis.padding)]
                source = _insert(node, aten.constant_pad_nd.default, source, sides)
            replacement = _pooled(node, source, axes)
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        program.graph.erase_node(node)
    program.recompile()


class _Windows(NamedTuple):
    """Pooling windows of one size along one axis."""

    start: int
    kernel: int
    stride: int


@dataclass(frozen=True, slots=True)
class _Axis:
    """An average pooling along one axis; `size` is the padded input's, `count` that of the output."""

    size: int
    count: int
    kernel: int
    stride: int
    padding: int

    @property
    def hangs_over(self) -> bool:
        return (self.count - 1) * self.stride + self.kernel > self.size

    def parts(self) -> list[_Windows]:
        """The windows in parts that pool without `ceil_mode`. PyTorch lets only the last one hang over the edge."""
        whole = _Windows(0, self.kernel, self.stride)
        if not self.hangs_over:
            return [whole]
        start = (self.count - 1) * self.stride
        rest = _Windows(start, self.size - start, self.size - start)
        return [whole, rest] if self.count > 1 else [rest]


def _overhanging(pool: torch.fx.Node) -> tuple[_Axis, ...]:
    """The axes of a pooling of which some windows hang over the edge; empty for all others.

    Also empty for those that litert-torch makes sums of (padding that isn't counted, a divisor of its own), and where
    sizes are dynamic.
    """
    import torch

    (source,) = pool.all_input_nodes
    # Arguments that have their default may be absent from the end.
    rank = 1 if pool.target is torch.ops.aten.avg_pool1d.default else 2
    kernels, strides, paddings = (_per_axis(pool.args[i : i + 1], rank) for i in (1, 2, 3))
    strides, paddings = strides or kernels, paddings or [0] * rank
    is_sum = pool.args[6:] not in ((), (None,)) or (any(paddings) and pool.args[5:6] == (False,))
    sizes, counts = (tuple(node.meta["val"].shape[-rank:]) for node in (source, pool))
    if is_sum or not all(isinstance(size, int) for size in (*sizes, *counts)):
        return ()
    axes = tuple(
        _Axis(size + 2 * padding, count, kernel, stride, padding)
        for size, count, kernel, stride, padding in zip(sizes, counts, kernels, strides, paddings, strict=True)
    )
    return axes if any(axis.hangs_over for axis in axes) else ()


def _per_axis(argument: Sequence[torch.fx.node.Argument], rank: int) -> list[int]:
    """The argument's value for each axis, where there is an argument; one value stands for all axes."""
    values = [value for given in argument if isinstance(given, Sequence) for value in given if isinstance(value, int)]
    return values * rank if len(values) == 1 else values


def _pooled(
    pool: torch.fx.Node, source: torch.fx.Node, axes: Sequence[_Axis], chosen: tuple[_Windows, ...] = ()
) -> torch.fx.Node:
    """Pool `source` part by part along the axes after the chosen ones, and join the results."""
    import torch

    aten = torch.ops.aten
    if len(chosen) == len(axes):
        return _insert(pool, pool.target, source, [part.kernel for part in chosen], [part.stride for part in chosen])
    dim = pool.meta["val"].ndim - len(axes) + len(chosen)
    results = []
    for part in axes[len(chosen)].parts():
        cut = source
        if part.start:
            cut = _insert(pool, aten.slice.Tensor, source, dim, part.start, part.start + part.kernel)
        results.append(_pooled(pool, cut, axes, (*chosen, part)))
    return results[0] if len(results) == 1 else _insert(pool, aten.cat.default, results, dim)


def _insert(like: torch.fx.Node, target: torch.fx.node.Target, *arguments: torch.fx.node.Argument) -> torch.fx.Node:
    """A call on behalf of `like`, at the graph's point of insertion: it belongs to the same layer."""
    inserted = like.graph.create_node("call_function", target, arguments)
    inserted.meta = {key: value for key, value in like.meta.items() if key != "val"}
    return inserted


def keep_spatial_reductions(program: torch.fx.GraphModule) -> None:
    """Write global pooling in the one form that litert-torch keeps channel-last: a reduction that keeps dimensions.

    For `x.mean((2, 3))` it would transpose the whole feature map back, and `AdaptiveAvgPool2d(1)` becomes an
    as_strided that it can't lower with a dynamic batch.
    """
    import torch

    aten = torch.ops.aten
    reductions = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
    for node in list(program.graph.nodes):
        if node.target is aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            node.target, node.args = aten.mean.dim, (node.args[0], [2, 3], True)
        elif node.target in reductions and _drops_spatial_dimensions(node):
            with program.graph.inserting_after(node):
                squeeze = program.graph.call_function(aten.squeeze.dims, (node, [2, 3]))
            squeeze.meta = dict(node.meta)
            node.replace_all_uses_with(squeeze)
            squeeze.args, node.args = (node, [2, 3]), (node.args[0], [2, 3], True)
    program.recompile()


def drop_unread_weights(program: torch.fx.GraphModule) -> None:
    """Forget the parameters and buffers that no operator reads. A part of a larger network is traced with all of its
    weights, and litert-torch would copy every one of them."""
    program.graph.eliminate_dead_code()
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    parameters = program.named_parameters(remove_duplicate=False)
    for name in [name for name, _ in (*parameters, *program.named_buffers(remove_duplicate=False)) if name not in read]:
        path, _, attribute = name.rpartition(".")
        delattr(program.get_submodule(path), attribute)
    program.recompile()


def infer_dynamic_sizes(program: torch.fx.GraphModule) -> None:
    """Leave a reshape's one dynamic size to be inferred (-1): litert-torch can't reshape to a computed size."""
    import torch

    aten = torch.ops.aten
    for node in program.graph.nodes:
        if node.target not in (aten.view.default, aten.reshape.default, aten.flatten.using_ints):
            continue
        sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
        if sizes.count(-1) == 1:
            node.target, node.args = aten.reshape.default, (node.args[0], sizes)
    program.recompile()


def _drops_spatial_dimensions(reduction: torch.fx.Node) -> bool:
    source, dims, keeps = (*reduction.args, *((None, False)[len(reduction.args) - 1 :]))[:3]
    value = source.meta.get("val") if isinstance(source, type(reduction)) else None
    if keeps or value is None or value.ndim != 4 or not isinstance(dims, (list, tuple)):
        return False
    return sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]
