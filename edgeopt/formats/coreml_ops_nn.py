"""MIL operators of networks: convolution, pooling, normalization, resizing, products, quantization.

Definitions: apple.github.io/coremltools, "MIL Ops"; names of the parameters are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from edgeopt.formats.coreml_values import INTEGER_BOUNDS, TORCH_TYPES, Arguments, Operator


def _window_padding(
    a: Arguments, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) along each spatial dimension."""
    match a.text("pad_type", "valid"):
        case "valid":
            return [(0, 0)] * len(sizes)
        case "custom":
            amounts = a.ints("pad", [0] * 2 * len(sizes))
            return [(amounts[2 * i], amounts[2 * i + 1]) for i in range(len(sizes))]
        case kind:
            totals = [
                max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
                for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
            ]
            smaller = [(total // 2, total - total // 2) for total in totals]
            return [(after, before) for before, after in smaller] if kind == "same_lower" else smaller


def _padded(x: torch.Tensor, padding: Sequence[tuple[int, int]], value: float = 0.0) -> torch.Tensor:
    if not any(amount for pair in padding for amount in pair):
        return x
    return functional.pad(x, [amount for pair in reversed(padding) for amount in pair], value=value)


_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def _conv(a: Arguments) -> torch.Tensor:
    x, weight = a.tensor(), a.tensor("weight")
    spatial = x.ndim - 2
    strides, dilations = a.ints("strides", [1] * spatial), a.ints("dilations", [1] * spatial)
    padding = _window_padding(a, x.shape[2:], weight.shape[2:], strides, dilations)
    own = [before for before, _ in padding]
    if any(before != after for before, after in padding):
        x, own = _padded(x, padding), [0] * spatial
    return _CONVOLUTIONS[spatial](x, weight, a.optional("bias"), strides, own, dilations, a.integer("groups", 1))


def _conv_transpose(a: Arguments) -> torch.Tensor:
    x, weight = a.tensor(), a.tensor("weight")
    spatial = x.ndim - 2
    strides, dilations = a.ints("strides", [1] * spatial), a.ints("dilations", [1] * spatial)
    full = _TRANSPOSED[spatial](x, weight, None, strides, groups=a.integer("groups", 1), dilation=dilations)
    padding = _transposed_padding(a, full.shape[2:], x.shape[2:], strides)
    sizes = a.ints("output_shape")[2:] if "output_shape" in a else None
    for axis, (before, after) in enumerate(padding, start=2):
        length = full.shape[axis] - before - after if sizes is None else sizes[axis - 2]
        # What the output shape asks for beyond the last window is zero before the bias.
        missing = max(before + length - full.shape[axis], 0)
        if missing:
            full = functional.pad(full, [*[0, 0] * (full.ndim - 1 - axis), 0, missing])
        full = full.narrow(axis, before, length)
    bias = a.optional("bias")
    return full if bias is None else full + bias.reshape(-1, *[1] * spatial)


def _transposed_padding(
    a: Arguments, full: Sequence[int], sizes: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    match a.text("pad_type", "valid"):
        case "valid":
            return [(0, 0)] * len(full)
        case "custom":
            amounts = a.ints("pad", [0] * 2 * len(full))
            return [(amounts[2 * i], amounts[2 * i + 1]) for i in range(len(full))]
        case kind:
            surplus = [max(f - size * stride, 0) for f, size, stride in zip(full, sizes, strides, strict=True)]
            smaller = [(total // 2, total - total // 2) for total in surplus]
            return [(after, before) for before, after in smaller] if kind == "same_lower" else smaller


def _windows(a: Arguments, value: float) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """The padded input and, of the same shape, 1 where a window may count: kernel and strides with them."""
    x, kernel = a.tensor(), a.ints("kernel_sizes")
    strides = a.ints("strides", [1] * len(kernel))
    padding = _window_padding(a, x.shape[2:], kernel, strides, [1] * len(kernel))
    excluded = a.flag("exclude_padding_from_average", default=False)
    ones = torch.ones(1, 1, *x.shape[2:])
    counted = _padded(ones, padding, 0.0 if excluded else 1.0)
    padded = _padded(x, padding, value)
    if a.flag("ceil_mode", default=False):
        more = []
        for size, k, stride, (before, _), own in zip(
            padded.shape[2:], kernel, strides, padding, x.shape[2:], strict=True
        ):
            count = math.ceil((size - k) / stride)
            count -= count * stride >= own + before  # no window starts in the padding behind
            more.append((0, max(count * stride + k - size, 0)))
        padded, counted = _padded(padded, more, value), _padded(counted, more, 0.0)
    return padded, counted, kernel, strides


_MAX_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE_POOLS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def _max_pool(a: Arguments) -> torch.Tensor:
    padded, _, kernel, strides = _windows(a, -math.inf)
    return _MAX_POOLS[len(kernel)](padded, kernel, strides)


def _average(values: torch.Tensor, counted: torch.Tensor, kernel: list[int], strides: list[int]) -> torch.Tensor:
    pool = _AVERAGE_POOLS[len(kernel)]
    # Both are means over whole windows: their ratio is the sum over what counts divided by its number.
    return pool(values, kernel, strides) / pool(counted, kernel, strides)


def _avg_pool(a: Arguments) -> torch.Tensor:
    return _average(*_windows(a, 0.0))


def _l2_pool(a: Arguments) -> torch.Tensor:
    padded, _, kernel, strides = _windows(a, 0.0)
    mean = _AVERAGE_POOLS[len(kernel)](padded.square(), kernel, strides)
    return (mean * math.prod(kernel)).sqrt()


def _along_channels(a: Arguments, name: str) -> torch.Tensor | None:
    values = a.optional(name)
    return None if values is None else values.reshape(-1, *[1] * (a.tensor().ndim - 2))


def _scaled(x: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None) -> torch.Tensor:
    x = x if gamma is None else x * gamma
    return x if beta is None else x + beta


def _batch_norm(a: Arguments) -> torch.Tensor:
    mean, variance = _along_channels(a, "mean"), _along_channels(a, "variance")
    if mean is None or variance is None:
        raise KeyError("mean and variance")
    normal = (a.tensor() - mean) * (variance + a.number("epsilon", 1e-5)).rsqrt()
    return _scaled(normal, _along_channels(a, "gamma"), _along_channels(a, "beta"))


def _normalized(x: torch.Tensor, axes: list[int], epsilon: float) -> torch.Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + epsilon).rsqrt()


def _instance_norm(a: Arguments) -> torch.Tensor:
    x = a.tensor()
    normal = _normalized(x, list(range(2, x.ndim)), a.number("epsilon", 1e-5))
    return _scaled(normal, _along_channels(a, "gamma"), _along_channels(a, "beta"))


def _layer_norm(a: Arguments) -> torch.Tensor:
    x = a.tensor()
    axes = sorted(axis % x.ndim for axis in a.ints("axes", range(x.ndim)))
    normal = _normalized(x, axes, a.number("epsilon", 1e-5))
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    gamma, beta = a.optional("gamma"), a.optional("beta")
    return _scaled(
        normal, None if gamma is None else gamma.reshape(shape), None if beta is None else beta.reshape(shape)
    )


def _l2_norm(a: Arguments) -> torch.Tensor:
    x = a.tensor()
    axes = list(range(max(x.ndim - 3, 0), x.ndim))
    return x * (x.square().sum(axes, keepdim=True) + a.number("epsilon", 1e-6)).rsqrt()


def _local_response_norm(a: Arguments) -> torch.Tensor:
    return functional.local_response_norm(
        a.tensor(), a.integer("size"), a.number("alpha", 1e-4), a.number("beta", 0.75), a.number("k", 1.0)
    )


def _linear(a: Arguments) -> torch.Tensor:
    return functional.linear(a.tensor(), a.tensor("weight"), a.optional("bias"))


def _matmul(a: Arguments) -> torch.Tensor:
    x, y = a.tensor("x"), a.tensor("y")
    x = x.transpose(-1, -2) if a.flag("transpose_x", default=False) else x
    y = y.transpose(-1, -2) if a.flag("transpose_y", default=False) else y
    if x.is_floating_point():
        return torch.matmul(x, y)
    return torch.matmul(x.long(), y.long()).to(x.dtype)


def _einsum(a: Arguments) -> torch.Tensor:
    return torch.einsum(a.text("equation"), *a.tensors())


def _attention(a: Arguments) -> torch.Tensor:
    mask = a.optional("attn_mask")
    return functional.scaled_dot_product_attention(a.tensor("query"), a.tensor("key"), a.tensor("value"), mask)


# --- resizing --------------------------------------------------------------------------------------------------------


def _positions(size: int, count: int, mode: str) -> torch.Tensor:
    """Where along an axis of `size` values each of `count` samples lies, by Core ML's names of the ways to do it."""
    i = torch.arange(count, dtype=torch.float64)
    match mode:
        case "STRICT_ALIGN_CORNERS" | "ALIGN_CORNERS":
            places = i * ((size - 1) / max(count - 1, 1))
        case "DEFAULT":
            places = i * (size / count)
        case "OFFSET_CORNERS":
            delta = max(1, size - 1) / count
            places = i * delta + 0.5 * delta
        case "UNALIGN_CORNERS":
            places = (i + 0.5) * (size / count) - 0.5
        case _:
            raise ValueError(f"unknown sampling mode {mode}")
    return places.clamp(0, size - 1)


def _bilinear(x: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    for axis, count in ((-2, height), (-1, width)):
        size = x.shape[axis]
        places = _positions(size, count, mode)
        below = places.floor().long()
        share = (places - below).to(torch.float32)
        share = share.unsqueeze(-1) if axis == -2 else share
        lower, upper = x.index_select(axis, below), x.index_select(axis, (below + 1).clamp(max=size - 1))
        x = torch.lerp(lower, upper, share.expand_as(lower))
    return x


def _nearest(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    for axis, count in ((-2, height), (-1, width)):
        x = x.index_select(axis, torch.div(torch.arange(count) * x.shape[axis], count, rounding_mode="floor"))
    return x


def _upsample_bilinear(a: Arguments) -> torch.Tensor:
    height, width = _scaled_sizes(a)
    aligned = a.flag("align_corners", default=True)
    centred = a.flag("half_pixel_centers", default=not aligned)
    mode = "ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS" if centred else "DEFAULT"
    return _bilinear(a.tensor(), height, width, mode)


def _scaled_sizes(a: Arguments) -> tuple[int, int]:
    height, width = a.tensor().shape[-2:]
    # A factor such as 5 / 3 in float32 must not lose the last row.
    factors = a.number("scale_factor_height", 1.0), a.number("scale_factor_width", 1.0)
    return math.floor(height * factors[0] + 1e-4), math.floor(width * factors[1] + 1e-4)


def _upsample_nearest(a: Arguments) -> torch.Tensor:
    return _nearest(a.tensor(), *_scaled_sizes(a))


def _resize_bilinear(a: Arguments) -> torch.Tensor:
    sizes = a.integer("target_size_height", 1), a.integer("target_size_width", 1)
    return _bilinear(a.tensor(), *sizes, a.text("sampling_mode", "DEFAULT"))


def _resize_nearest(a: Arguments) -> torch.Tensor:
    return _nearest(a.tensor(), a.integer("target_size_height"), a.integer("target_size_width"))


def _resize(a: Arguments) -> torch.Tensor:
    x, resized = a.tensor(), a.integer("resized_dims")
    wanted = a.ints("shape")[-2:]
    if resized != 2:
        raise ValueError(f"resizes {resized} dimensions, not the last two")
    height, width = (own if size == 0 else size for own, size in zip(x.shape[-2:], wanted, strict=True))
    if a.text("interpolation_mode", "LINEAR") == "NEAREST_NEIGHBOR":
        return _nearest(x, height, width)
    return _bilinear(x, height, width, a.text("sampling_mode", "DEFAULT"))


_PADDING_MODES = {"constant": "zeros", "border": "border", "reflection": "reflection"}


def _resample(a: Arguments) -> torch.Tensor:
    coordinates = a.text("coordinates_mode")
    if coordinates != "normalized_minus_one_to_one" or a.number("padding_value", 0.0) != 0:
        raise ValueError(f"samples with {coordinates} coordinates")
    return functional.grid_sample(
        a.tensor(),
        a.tensor("coordinates"),
        mode=a.text("sampling_mode"),
        padding_mode=_PADDING_MODES[a.text("padding_mode")],
        align_corners=a.flag("align_corners", default=False),
    )


# --- quantization ----------------------------------------------------------------------------------------------------


def _parameters(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point so that they broadcast along `axis`."""
    rank = a.tensor("input").ndim
    shape = [1] * rank
    scale = a.tensor("scale")
    if scale.ndim:
        shape[a.integer("axis")] = -1
    zero = a.optional("zero_point")
    zero_point = torch.zeros_like(scale) if zero is None else zero.to(torch.float32)
    return (scale.reshape(shape), zero_point.reshape(shape)) if scale.ndim else (scale, zero_point)


def _quantize(a: Arguments) -> torch.Tensor:
    scale, zero_point = _parameters(a)
    kind = a.text("output_dtype")
    low, high = INTEGER_BOUNDS[kind]
    return (torch.round(a.tensor("input") / scale) + zero_point).clamp(low, high).to(TORCH_TYPES[kind])


def _dequantize(a: Arguments) -> torch.Tensor:
    scale, zero_point = _parameters(a)
    return (a.tensor("input").to(torch.float32) - zero_point) * scale


NETWORK: dict[str, Operator] = {
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "dequantize": _dequantize,
    "einsum": _einsum,
    "instance_norm": _instance_norm,
    "l2_norm": _l2_norm,
    "l2_pool": _l2_pool,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "local_response_norm": _local_response_norm,
    "matmul": _matmul,
    "max_pool": _max_pool,
    "quantize": _quantize,
    "resample": _resample,
    "resize": _resize,
    "resize_bilinear": _resize_bilinear,
    "resize_nearest_neighbor": _resize_nearest,
    "scaled_dot_product_attention": _attention,
    "upsample_bilinear": _upsample_bilinear,
    "upsample_nearest_neighbor": _upsample_nearest,
}
