"""ONNX operators on host values: the arithmetic on sizes that surrounds Reshape, Expand, Slice and Resize."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from edgeopt.sources.onnx_values import TORCH_TYPES, Args, Node, sizes
from edgeopt.types import Array

HostOperator = Callable[[Node, list[Array]], Array]


def _cast(node: Node, args: list[Array]) -> Array:
    dtype = TORCH_TYPES.get(node.integer("to", 0))
    if dtype is None:
        raise node.error(f"unknown element type {node.integer('to', 0)}")
    if args[0].dtype != object:
        return args[0].astype(str(dtype).removeprefix("torch."))
    convert = torch.sym_float if dtype.is_floating_point else torch.sym_int
    return _each(convert, args[0])


def _each(function: Callable[..., object], *arrays: Array) -> Array:
    result: Array = np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), dtype=object)
    return result


def _floor(node: Node, args: list[Array]) -> Array:
    del node
    return _each(math.floor, args[0]) if args[0].dtype == object else np.floor(args[0])


def _ceil(node: Node, args: list[Array]) -> Array:
    del node
    return _each(math.ceil, args[0]) if args[0].dtype == object else np.ceil(args[0])


def _divide(node: Node, args: list[Array]) -> Array:
    del node
    left, right = args
    if left.dtype.kind == "f" or right.dtype.kind == "f":
        return np.asarray(left / right)
    if object in (left.dtype, right.dtype):
        return np.asarray(left // right, dtype=object)
    # Integer division truncates towards zero.
    return np.asarray(np.sign(left) * np.sign(right) * (np.abs(left) // np.abs(right)), dtype=left.dtype)


def _gather(node: Node, args: list[Array]) -> Array:
    return np.asarray(np.take(args[0], args[1].astype(np.int64), axis=node.integer("axis", 0)))


def _slice(node: Node, args: list[Array]) -> Array:
    data = args[0]
    starts, ends, axes, steps = slice_parameters(node, args)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        limit = data.shape[axis]
        stop = None if step < 0 and end < -limit else end
        data = data[(slice(None),) * (axis % data.ndim) + (slice(start, stop, step),)]
    return data


def slice_parameters(node: Node, args: Args) -> tuple[list[int], list[int], list[int], list[int]]:
    """Starts, ends, axes and steps of a Slice, from its inputs (opset 10 on) or attributes."""
    if len(args) >= 3:
        starts, ends = sizes(args[1], node, "starts"), sizes(args[2], node, "ends")
    else:
        starts, ends = node.integers("starts") or [], node.integers("ends") or []
    axes = sizes(args[3], node, "axes") if len(args) > 3 and args[3] is not None else node.integers("axes")
    steps = sizes(args[4], node, "steps") if len(args) > 4 and args[4] is not None else [1] * len(starts)
    return starts, ends, list(range(len(starts))) if axes is None else axes, steps


def _axes(node: Node, args: list[Array]) -> list[int] | None:
    return sizes(args[1], node, "axes") if len(args) > 1 else node.integers("axes")


def _squeeze(node: Node, args: list[Array]) -> Array:
    axes = _axes(node, args)
    return np.squeeze(args[0], axis=None if axes is None else tuple(axes))


def _unsqueeze(node: Node, args: list[Array]) -> Array:
    return np.expand_dims(args[0], tuple(_axes(node, args) or ()))


def _reduce(function: Callable[..., object]) -> HostOperator:
    def reduce(node: Node, args: list[Array]) -> Array:
        axes = _axes(node, args)
        keep = bool(node.integer("keepdims", 1))
        return np.asarray(function(args[0], axis=None if axes is None else tuple(axes), keepdims=keep))

    return reduce


def _constant_of_shape(node: Node, args: list[Array]) -> Array:
    value = node.attributes.get("value")
    fill = value.reshape(-1)[0] if isinstance(value, np.ndarray) else np.float32(0)
    return np.full(sizes(args[0], node, "sizes"), fill, dtype=fill.dtype)


def _range(node: Node, args: list[Array]) -> Array:
    del node
    start, limit, delta = (item.reshape(-1)[0] for item in args)
    return np.arange(start, limit, delta, dtype=args[0].dtype)


def _binary(function: Callable[..., object]) -> HostOperator:
    def apply(node: Node, args: list[Array]) -> Array:
        del node
        result = args[0]
        for other in args[1:]:
            result = np.asarray(function(result, other))
        return result

    return apply


def _unary(function: Callable[..., object]) -> HostOperator:
    def apply(node: Node, args: list[Array]) -> Array:
        del node
        return np.asarray(function(args[0]))

    return apply


def _concat(node: Node, args: list[Array]) -> Array:
    return np.concatenate(args, axis=node.integer("axis", 0))


def _reshape(node: Node, args: list[Array]) -> Array:
    return args[0].reshape(sizes(args[1], node, "sizes"))


def _expand(node: Node, args: list[Array]) -> Array:
    return np.asarray(args[0] * np.ones(sizes(args[1], node, "sizes"), dtype=args[0].dtype))


def _transpose(node: Node, args: list[Array]) -> Array:
    return np.transpose(args[0], node.integers("perm"))


def _where(node: Node, args: list[Array]) -> Array:
    del node
    return np.where(args[0].astype(bool), args[1], args[2])


#: Used when every input of the node is a host value.
HOST_OPERATORS: dict[str, HostOperator] = {
    "Abs": _unary(np.abs),
    "Add": _binary(np.add),
    "Cast": _cast,
    "Ceil": _ceil,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _divide,
    "Equal": _binary(np.equal),
    "Expand": _expand,
    "Floor": _floor,
    "Gather": _gather,
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "Identity": _unary(np.asarray),
    "Less": _binary(np.less),
    "LessOrEqual": _binary(np.less_equal),
    "Max": _binary(np.maximum),
    "Min": _binary(np.minimum),
    "Mod": _binary(np.mod),
    "Mul": _binary(np.multiply),
    "Neg": _unary(np.negative),
    "Not": _unary(np.logical_not),
    "Range": _range,
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _binary(np.subtract),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
