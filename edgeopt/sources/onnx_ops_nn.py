"""ONNX's pooling, resizing and normalization operators, and convolutions whose weights are computed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from edgeopt.sources.onnx_values import Args, Node, Operator, Value, sizes, tensor
from edgeopt.types import Array

AVERAGE_POOLS: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}
MAX_POOLS: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
#: (ONNX mode, spatial rank) -> torch's name.
RESIZE_MODES = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}


def window_pads(node: Node, data: torch.Tensor, kernel: list[int]) -> tuple[list[int], list[int]]:
    """Begin and end padding per spatial axis of a convolution or pooling, `auto_pad` worked out for this input."""
    rank = len(kernel)
    automatic = node.text("auto_pad", "NOTSET")
    if automatic in ("NOTSET", ""):
        pads = node.integers("pads") or [0] * (2 * rank)
        return pads[:rank], pads[rank:]
    if automatic == "VALID":
        return [0] * rank, [0] * rank
    strides = node.integers("strides") or [1] * rank
    dilations = node.integers("dilations") or [1] * rank
    begins, ends = [], []
    for axis in range(rank):
        size = data.shape[2 + axis]
        covered = (-(-size // strides[axis]) - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1
        total = max(covered - size, 0)
        less, more = total // 2, total - total // 2
        begins.append(less if automatic == "SAME_UPPER" else more)
        ends.append(more if automatic == "SAME_UPPER" else less)
    return begins, ends


def pad_window(data: torch.Tensor, begins: list[int], ends: list[int], value: float = 0.0) -> torch.Tensor:
    """Spatial padding in torch's order."""
    return functional.pad(
        data, [pad for pair in reversed(list(zip(begins, ends, strict=True))) for pad in pair], value=value
    )


def _conv(node: Node, args: Args) -> Value:
    data, weight = tensor(args[0], node), tensor(args[1], node)
    bias = tensor(args[2], node) if len(args) > 2 and args[2] is not None else None
    kernel = list(weight.shape[2:])
    rank = len(kernel)
    begins, ends = window_pads(node, data, kernel)
    if begins != ends:
        data, begins = pad_window(data, begins, ends), [0] * rank
    return CONVOLUTIONS[rank](
        data,
        weight,
        bias,
        stride=node.integers("strides") or [1] * rank,
        padding=begins,
        dilation=node.integers("dilations") or [1] * rank,
        groups=node.integer("group", 1),
    )


def _average_pool(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    kernel = node.integers("kernel_shape") or []
    strides = node.integers("strides") or [1] * len(kernel)
    if any(step != 1 for step in node.integers("dilations") or []):
        raise node.error("dilations are not supported")
    pool = AVERAGE_POOLS[len(kernel)]
    begins, ends = window_pads(node, data, kernel)
    ceil = bool(node.integer("ceil_mode", 0))
    counts_padding = bool(node.integer("count_include_pad", 0))
    if begins == ends:
        return pool(data, kernel, strides, begins, ceil_mode=ceil, count_include_pad=counts_padding)
    total = pool(pad_window(data, begins, ends), kernel, strides, 0, ceil_mode=ceil)
    if counts_padding:
        return total
    inside = pool(pad_window(torch.ones_like(data[:1, :1]), begins, ends), kernel, strides, 0, ceil_mode=ceil)
    return total / inside


def _max_pool(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    kernel = node.integers("kernel_shape") or []
    if len(node.outputs) > 1 and node.outputs[1]:
        raise node.error("its second output (the indices) is not supported")
    begins, ends = window_pads(node, data, kernel)
    # torch pads by at most half a kernel, the same on both sides.
    if begins != ends or any(2 * pad > size for pad, size in zip(begins, kernel, strict=True)):
        data, begins = pad_window(data, begins, ends, value=-math.inf), [0] * len(kernel)
    return MAX_POOLS[len(kernel)](
        data,
        kernel,
        node.integers("strides") or [1] * len(kernel),
        begins,
        node.integers("dilations") or [1] * len(kernel),
        ceil_mode=bool(node.integer("ceil_mode", 0)),
    )


def _global_average_pool(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    if data.ndim == 4:
        return functional.adaptive_avg_pool2d(data, 1)
    return data.mean(list(range(2, data.ndim)), keepdim=True)


def _global_max_pool(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    return data.amax(list(range(2, data.ndim)), keepdim=True)


def _resize(node: Node, args: Args) -> Value:
    data = tensor(args[0], node)
    scales, target = _resize_target(node, args, data)
    spatial = data.ndim - 2
    if target[:2] != list(data.shape[:2]):
        raise node.error("resizes batch or channels")
    mode = node.text("mode", "nearest")
    coordinates = node.text("coordinate_transformation_mode", "half_pixel" if node.op == "Resize" else "asymmetric")
    if mode == "nearest":
        return _resize_nearest(node, data, target, scales, coordinates)
    if node.integer("antialias", 0) or (mode, spatial) not in RESIZE_MODES:
        raise node.error(f"mode {mode!r} over {spatial} axes, or antialiasing, is not supported")
    if coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise node.error(f"coordinate_transformation_mode {coordinates!r} is not supported with mode {mode!r}")
    aligned = coordinates == "align_corners"
    name = RESIZE_MODES[mode, spatial]
    exact = all(
        scale == int(scale) or old * scale == new for old, scale, new in zip(data.shape, scales, target, strict=True)
    )
    if exact or aligned:
        return functional.interpolate(data, size=target[2:], mode=name, align_corners=aligned)
    return functional.interpolate(
        data, scale_factor=scales[2:], mode=name, align_corners=aligned, recompute_scale_factor=False
    )


def _resize_target(node: Node, args: Args, data: torch.Tensor) -> tuple[list[float], list[int]]:
    """Scale and size per axis; one gives the other."""
    if node.op == "Upsample" or node.opset < 11:
        given_scales, given_sizes = args[1] if len(args) > 1 else _array_attribute(node, "scales"), None
    else:
        given_scales = args[2] if len(args) > 2 else None
        given_sizes = args[3] if len(args) > 3 else None
    axes = [axis % data.ndim for axis in node.integers("axes") or range(data.ndim)]
    shape = list(data.shape)
    if given_sizes is not None:
        if node.text("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise node.error("keep_aspect_ratio_policy is not supported")
        target = list(shape)
        for axis, size in zip(axes, sizes(given_sizes, node, "sizes"), strict=True):
            target[axis] = size
        return [new / old for new, old in zip(target, shape, strict=True)], target
    if not isinstance(given_scales, np.ndarray) or given_scales.size == 0:
        raise node.error("its scales depend on the input's values")
    scales = [1.0] * data.ndim
    for axis, scale in zip(axes, given_scales.reshape(-1).tolist(), strict=True):
        scales[axis] = scale
    return scales, [
        # Whole factors stay in integers, which symbolic sizes need.
        old * int(scale) if scale == int(scale) else math.floor(old * scale)
        for old, scale in zip(shape, scales, strict=True)
    ]


def _array_attribute(node: Node, key: str) -> Array | None:
    value = node.attributes.get(key)
    return np.asarray(value, dtype=np.float32) if isinstance(value, tuple) else None


def _resize_nearest(
    node: Node, data: torch.Tensor, target: list[int], scales: list[float], coordinates: str
) -> torch.Tensor:
    rounding = node.text("nearest_mode", "round_prefer_floor" if node.op == "Resize" else "floor")
    if all(isinstance(size, int) for size in (*data.shape[2:], *target[2:])):
        positions = {
            axis: _nearest(node, data.shape[axis], target[axis], scales[axis], coordinates, rounding)
            for axis in range(2, data.ndim)
        }
        if not all(
            np.array_equal(found, np.arange(target[axis]) * data.shape[axis] // target[axis])
            for axis, found in positions.items()
        ):
            for axis, found in positions.items():
                data = data.index_select(axis, torch.from_numpy(found))
            return data
    elif any(scale != int(scale) for scale in scales):
        # At whole factors every way of rounding repeats each element the same number of times.
        raise node.error("resizes a dynamic dimension by a factor that is not whole")
    return functional.interpolate(data, size=target[2:], mode="nearest")


def _nearest(node: Node, old: int, new: int, scale: float, coordinates: str, rounding: str) -> Array:
    """Which element each output takes (ONNX operator reference, Resize)."""
    at = np.arange(new, dtype=np.float64)
    match coordinates:
        case "half_pixel" | "pytorch_half_pixel" | "half_pixel_symmetric":
            at = (at + 0.5) / scale - 0.5
        case "asymmetric":
            at = at / scale
        case "align_corners":
            at = at * (old - 1) / max(new - 1, 1)
        case _:
            raise node.error(f"coordinate_transformation_mode {coordinates!r} is not supported")
    rounded = {
        "floor": np.floor(at),
        "ceil": np.ceil(at),
        "round_prefer_floor": np.ceil(at - 0.5),
        "round_prefer_ceil": np.floor(at + 0.5),
    }[rounding]
    return np.asarray(np.clip(rounded, 0, old - 1), dtype=np.int64)


def _instance_norm(node: Node, args: Args) -> Value:
    data, scale, bias = (tensor(arg, node) for arg in args)
    return functional.instance_norm(data, weight=scale, bias=bias, eps=node.number("epsilon", 1e-5))


def _group_norm(node: Node, args: Args) -> Value:
    data, scale, bias = (tensor(arg, node) for arg in args)
    groups = node.integer("num_groups", 1)
    return functional.group_norm(data, groups, scale, bias, node.number("epsilon", 1e-5))


def _layer_norm(node: Node, args: Args) -> Value:
    data, scale = tensor(args[0], node), tensor(args[1], node)
    bias = tensor(args[2], node) if len(args) > 2 and args[2] is not None else None
    axis = node.integer("axis", -1)
    shape = list(data.shape[axis if axis < 0 else axis - data.ndim :])
    return functional.layer_norm(data, shape, scale, bias, node.number("epsilon", 1e-5))


def _batch_norm(node: Node, args: Args) -> Value:
    data, scale, bias, mean, variance = (tensor(arg, node) for arg in args)
    return functional.batch_norm(data, mean, variance, scale, bias, False, 0.0, node.number("epsilon", 1e-5))


def _local_response_norm(node: Node, args: Args) -> Value:
    return functional.local_response_norm(
        tensor(args[0], node),
        node.integer("size", 1),
        node.number("alpha", 1e-4),
        node.number("beta", 0.75),
        node.number("bias", 1.0),
    )


def _lp_normalization(node: Node, args: Args) -> Value:
    return functional.normalize(tensor(args[0], node), float(node.integer("p", 2)), node.integer("axis", -1))


NN_OPERATORS: dict[str, Operator] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response_norm,
    "LayerNormalization": _layer_norm,
    "LpNormalization": _lp_normalization,
    "MaxPool": _max_pool,
    "Resize": _resize,
    "Upsample": _resize,
}
