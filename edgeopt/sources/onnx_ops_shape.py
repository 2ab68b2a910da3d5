"""ONNX operators that move elements about."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from edgeopt.sources.onnx_ops_host import slice_parameters
from edgeopt.sources.onnx_values import Args, Node, Operator, Value, argument, host, operand, sizes, tensor
from edgeopt.types import Array

#: ONNX's padding modes in torch's words.
PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _shape(node: Node, args: Args) -> Value:
    shape = list(tensor(args[0], node).shape)
    end = node.attributes.get("end")
    return host(shape[node.integer("start", 0) : end if isinstance(end, int) else None])


def _size(node: Node, args: Args) -> Value:
    return np.asarray(host([tensor(args[0], node).numel()])[0])


def _constant(node: Node, args: Args) -> Value:
    del args
    for key in ("value", "value_int", "value_float", "value_ints", "value_floats"):
        if key in node.attributes:
            value = node.attributes[key]
            return value if isinstance(value, np.ndarray) else _array(value)
    raise node.error("its value is neither a number nor a tensor")


def _array(value: object) -> Array:
    array = np.asarray(value)
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)


def _reshape(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    target = argument(node, args, 1, "shape", "sizes") or []
    if not node.integer("allowzero", 0):
        target = [data.shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    return data.reshape(target)


def _flatten(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    axis = node.integer("axis", 1)
    axis += data.ndim if axis < 0 else 0
    if axis == 1 and data.ndim > 1:
        return data.flatten(1)
    rows = 1
    for size in data.shape[:axis]:
        rows = rows * size
    return data.reshape(rows, -1)


def _squeeze(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    axes = argument(node, args, 1, "axes", "axes")
    return data.squeeze() if axes is None else data.squeeze(tuple(axes))


def _unsqueeze(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    axes = argument(node, args, 1, "axes", "axes") or []
    rank = data.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        data = data.unsqueeze(axis)
    return data


def _transpose(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    return data.permute(node.integers("perm") or list(range(data.ndim))[::-1])


def _expand(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    target = sizes(args[1], node, "sizes")
    # Both sides broadcast: a 1 in the target keeps the tensor's size.
    shape = [1] * (len(target) - data.ndim) + list(data.shape)
    target = [1] * (len(shape) - len(target)) + target
    return data.expand([old if new == 1 else new for old, new in zip(shape, target, strict=True)])


def _tile(node: Node, args: Args) -> Value:
    return tensor(args[0], node).repeat(sizes(args[1], node, "repeats"))


def _concat(node: Node, args: Args) -> Value:
    return torch.cat([tensor(arg, node) for arg in args], node.integer("axis", 0))


def _split(node: Node, args: Args) -> tuple[Value, ...]:
    data = tensor(args[0], node)
    axis = node.integer("axis", 0)
    parts = argument(node, args, 1, "split", "sizes")
    if parts is None:
        each = -(-data.shape[axis] // len(node.outputs))
        return tuple(torch.split(data, each, axis))
    return tuple(torch.split(data, parts, axis))


def _slice(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    for start, end, axis, step in zip(*slice_parameters(node, args), strict=True):
        if step > 0:
            data = data[(slice(None),) * (axis % data.ndim) + (slice(start, end, step),)]
        else:
            data = _slice_backwards(data, start, end, axis, step)
    return data


def _slice_backwards(data: torch.Tensor, start: int, end: int, axis: int, step: int) -> torch.Tensor:
    """torch has no negative steps: flip, and slice the positions counted from the other end."""
    size = data.shape[axis]
    first = min(start if start >= 0 else start + size, size - 1)
    last = -1 if end < -size else (end if end >= 0 else end + size)
    flipped = torch.flip(data, [axis])
    return flipped[(slice(None),) * (axis % data.ndim) + (slice(size - 1 - first, size - 1 - last, -step),)]


def _gather(node: Node, args: Args) -> Value:
    data, indices = tensor(args[0], node), args[1]
    axis = node.integer("axis", 0) % data.ndim
    if isinstance(indices, np.ndarray):
        positions = [index + data.shape[axis] if index < 0 else index for index in sizes(indices, node, "indices")]
        if indices.ndim == 0:
            return data.select(axis, positions[0])
        picked = data.index_select(axis, torch.tensor(positions))
        return picked.reshape(data.shape[:axis] + indices.shape + data.shape[axis + 1 :])
    index = tensor(indices, node)
    if axis == 0 and data.ndim == 2 and data.is_floating_point():
        return functional.embedding(index, data)
    picked = data.index_select(axis, index.reshape(-1))
    return picked.reshape(data.shape[:axis] + index.shape + data.shape[axis + 1 :])


def _gather_elements(node: Node, args: Args) -> Value:
    return torch.gather(tensor(args[0], node), node.integer("axis", 0), tensor(args[1], node).long())


def _gather_nd(node: Node, args: Args) -> Value:
    if node.integer("batch_dims", 0):
        raise node.error("batch_dims is not supported")
    return tensor(args[0], node)[tuple(tensor(args[1], node).long().unbind(-1))]


def _scatter_nd(node: Node, args: Args) -> Value:
    if node.text("reduction", "none") != "none":
        raise node.error("reductions are not supported")
    data, indices, updates = (tensor(arg, node) for arg in args)
    return data.index_put(tuple(indices.long().unbind(-1)), updates)


def _pad(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    pads = argument(node, args, 1, "pads", "paddings") or []
    axes = sizes(args[3], node, "axes") if len(args) > 3 and args[3] is not None else list(range(data.ndim))
    begins, ends = pads[: len(axes)], pads[len(axes) :]
    both: dict[int, tuple[int, int]] = {
        axis % data.ndim: pair for axis, pair in zip(axes, zip(begins, ends, strict=True), strict=True)
    }
    mode = PAD_MODES.get(node.text("mode", "constant"))
    if mode is None:
        raise node.error(f"unknown mode {node.text('mode', '')!r}")
    if mode != "constant":
        # torch takes no zeros for leading axes in these modes.
        first = min((axis for axis, pair in both.items() if any(pair)), default=data.ndim - 1)
        return functional.pad(data, _torch_pads(both, first, data.ndim), mode=mode)
    fill = operand(args[2], data, node) if len(args) > 2 and args[2] is not None else node.number("value", 0.0)
    if isinstance(fill, torch.Tensor):
        raise node.error("its value depends on the input's values")
    return functional.pad(data, _torch_pads(both, 0, data.ndim), value=float(fill))


def _torch_pads(both: dict[int, tuple[int, int]], first: int, rank: int) -> list[int]:
    """torch lists (begin, end) from the last axis backwards."""
    return [pad for axis in reversed(range(first, rank)) for pad in both.get(axis, (0, 0))]


def _constant_of_shape(node: Node, args: Args) -> Value:
    value = node.attributes.get("value")
    fill = value.reshape(-1)[0] if isinstance(value, np.ndarray) else np.float32(0)
    dtype = torch.from_numpy(np.array([fill])).dtype
    return torch.full(sizes(args[0], node, "sizes"), fill.item(), dtype=dtype)


def _range(node: Node, args: Args) -> Value:
    start, limit, delta = (sizes(arg, node, "bounds")[0] for arg in args)
    return torch.arange(start, limit, delta)


def _depth_to_space(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    block = node.integer("blocksize", 1)
    if node.text("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(data, block)
    batch, channels, height, width = data.shape
    split = data.reshape(batch, block, block, channels // block**2, height, width)
    return split.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // block**2, height * block, width * block)


def _space_to_depth(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    block = node.integer("blocksize", 1)
    batch, channels, height, width = data.shape
    split = data.reshape(batch, channels, height // block, block, width // block, block)
    return split.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * block**2, height // block, width // block)


SHAPE_OPERATORS: dict[str, Operator] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
