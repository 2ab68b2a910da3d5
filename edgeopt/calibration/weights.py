"""How a weight becomes integers: the one grid that every exporter writes and every pass rounds to.

real = scale * (value - zero_point). Values are signed: symmetric ones lie in +-(2^(bits-1) - 1), so that -w is as exact
as w, asymmetric ones in -2^(bits-1) .. 2^(bits-1) - 1. Zero is always on the grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgeopt.types import Array, Scheme

#: Elements that the searches work on at a time, which bounds their temporary memory.
_CHUNK = 1 << 21

#: Ratios of the full range that the squared-error search tries: a coarse comb, then a fine one around its best tooth.
_COARSE = np.linspace(1.0, 0.3, 29)
_FINE = np.linspace(0.02, -0.02, 9)

#: Of the half-quadratic solver: the norm, the weight of the coupling in units of the step, its growth, the iterations.
_HQQ_NORM, _HQQ_BETA, _HQQ_GROWTH, _HQQ_ITERATIONS = 0.7, 10.0, 1.01, 20


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight on an integer grid.

    Attributes:
        values: int8 (4-bit values too), shaped as the weight.
        scale: float32 of shape () per tensor, (channels,) per channel, (channels, groups) per group.
        zero_point: int8, shaped as `scale`; all zero where the scheme is symmetric.
        axis: the weight's output channels; None per tensor.
        group_size: n where n weights share a scale: `to_rows(values, axis)[c, g * n : g * n + n]` belong to
            `scale[c, g]`; the last group of a channel is shorter when n does not divide the channel's weights. None
            where scales are not per group.
    """

    values: Array
    scale: Array
    zero_point: Array
    axis: int | None
    group_size: int | None

    def dequantize(self) -> Array:
        """The real weight, float32."""
        real = _decode(to_rows(self.values, self.axis), *self.parameters())
        return rows_to_shape(real, self.values.shape, self.axis)

    def parameters(self) -> tuple[Array, Array]:
        """Scale and zero point so that they broadcast against `to_rows(values, axis)`."""
        if self.group_size is None:
            return self.scale.reshape(-1, 1), self.zero_point.reshape(-1, 1)
        columns = to_rows(self.values, self.axis).shape[1]
        spread = (np.repeat(part, self.group_size, axis=1) for part in (self.scale, self.zero_point))
        scale, zero_point = (part[:, :columns] for part in spread)
        return scale, zero_point


def to_rows(weight: Array, axis: int | None) -> Array:
    """A weight as (channels, weights per channel), in the weight's own order along the second; (1, size) without axis.

    A convolution's (out, in, kh, kw) becomes (out, in * kh * kw): groups run over the kernel's positions first.
    """
    if axis is None:
        return weight.reshape(1, -1)
    front = np.moveaxis(weight, axis, 0)
    return front.reshape(front.shape[0], int(np.prod(front.shape[1:])))


def rows_to_shape(rows: Array, shape: tuple[int, ...], axis: int | None) -> Array:
    """Undo `to_rows`."""
    if axis is None:
        return rows.reshape(shape)
    front = (shape[axis], *(size for i, size in enumerate(shape) if i != axis % len(shape)))
    return np.ascontiguousarray(np.moveaxis(rows.reshape(front), 0, axis))


def quantize_weight(weight: Array, scheme: Scheme, axis: int | None) -> QuantizedWeight:
    """Round a float weight to the scheme's integers.

    Args:
        weight: real values of any shape.
        scheme: `weight_bits` (4 or 8), `weight_granularity`, `group_size`, `weight_symmetric`, `scale` and
            `weight_estimator` count. Groups are consecutive weights of one output channel, see `QuantizedWeight`.
        axis: of the output channels; None where there are none, which makes it per-tensor.

    The estimators: "max" takes max|w| / (2^(bits-1) - 1), or (max - min) / (2^bits - 1) when asymmetric; "mse" clips
    at the fraction of that range with the least squared error; "hqq" minimizes sum |w - Q(w)|^0.7 by half-quadratic
    splitting after Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), taken over
    to integer zero points: both scale and zero point are solved for, from the full range to the nearest optimum.

    Raises:
        ValueError: when the scheme's weights are neither 4 nor 8 bits wide.
    """
    if scheme.weight_bits not in (4, 8):
        raise ValueError(f"weights of {scheme.precision} are no integers of 4 or 8 bits")
    if scheme.weight_granularity == "per-tensor":
        axis = None
    rows = to_rows(np.asarray(weight, dtype=np.float32), axis)
    grouped = scheme.weight_granularity == "per-group" and axis is not None
    size = min(scheme.group_size, max(rows.shape[1], 1)) if grouped else rows.shape[1]
    blocks, count = _blocks(rows, size)
    grid = _Grid(scheme)
    values, scales, zero_points = (
        np.concatenate(part) for part in zip(*map(grid.quantize, _chunks(blocks)), strict=True)
    )
    values = values.reshape(rows.shape[0], count * size)[:, : rows.shape[1]]
    shape: tuple[int, ...] = (rows.shape[0], count) if grouped else (rows.shape[0],) if axis is not None else ()
    return QuantizedWeight(
        values=rows_to_shape(values, np.shape(weight), axis),
        scale=scales.reshape(shape),
        zero_point=zero_points.reshape(shape),
        axis=axis,
        group_size=size if grouped else None,
    )


def _blocks(rows: Array, size: int) -> tuple[Array, int]:
    """All weights that share a scale as one row, and the blocks per channel. Padded with zero, which costs no error."""
    count = -(-rows.shape[1] // max(size, 1)) or 1
    padded = np.pad(rows, ((0, 0), (0, count * size - rows.shape[1])))
    return padded.reshape(rows.shape[0] * count, size), count


def _chunks(blocks: Array) -> Iterator[Array]:
    step = max(1, _CHUNK // max(blocks.shape[1], 1))
    for start in range(0, max(blocks.shape[0], 1), step):
        yield blocks[start : start + step]


def _decode(values: Array, scale: Array, zero_point: Array) -> Array:
    real: Array = (values.astype(np.float32) - zero_point.astype(np.float32)) * scale
    return real


def _encode(blocks: Array, scale: Array, zero_point: Array, lowest: int, highest: int) -> Array:
    """Nearest values as float32; `scale` and `zero_point` are columns."""
    values: Array = np.clip(np.rint(blocks / scale) + zero_point, lowest, highest)
    return values


class _Grid:
    """Chooses scale and zero point for blocks of weights, one row each."""

    def __init__(self, scheme: Scheme) -> None:
        self._symmetric = scheme.weight_symmetric
        self._power_of_two = scheme.scale == "power-of-two"
        self._estimator = scheme.weight_estimator
        self._highest = 2 ** (scheme.weight_bits - 1) - 1
        self._lowest = -self._highest if self._symmetric else -self._highest - 1

    def quantize(self, blocks: Array) -> tuple[Array, Array, Array]:
        """Values int8 (n, size), scales float32 (n, 1), zero points int8 (n, 1)."""
        match self._estimator:
            case "max":
                scale, zero_point = self._parameters(blocks, np.float64(1.0))
            case "mse":
                scale, zero_point = self._least_squared_error(blocks)
            case "hqq":
                scale, zero_point = self._half_quadratic(blocks)
        values = _encode(blocks, scale, zero_point, self._lowest, self._highest)
        return values.astype(np.int8), scale, zero_point.astype(np.int8)

    def _parameters(self, blocks: Array, ratio: Array | np.float64) -> tuple[Array, Array]:
        """Scale and zero point (as float32 columns) that cover `ratio` of each block's range."""
        low = np.minimum(blocks.min(axis=1, keepdims=True, initial=0), 0).astype(np.float64) * ratio
        high = np.maximum(blocks.max(axis=1, keepdims=True, initial=0), 0).astype(np.float64) * ratio
        if self._symmetric:
            scale = self._usable(np.maximum(-low, high) / self._highest)
            return scale, np.zeros_like(scale)
        scale = self._usable((high - low) / (self._highest - self._lowest))
        return scale, np.clip(np.rint(self._lowest - low / scale), self._lowest, self._highest).astype(np.float32)

    def _usable(self, scale: Array) -> Array:
        if self._power_of_two:
            scale = np.exp2(np.ceil(np.log2(np.maximum(scale, np.finfo(np.float64).tiny))))
        # A block that is always zero still needs a scale, and a subnormal one is as good as none.
        return np.where(scale >= np.finfo(np.float32).tiny, scale, 1.0).astype(np.float32)

    def _least_squared_error(self, blocks: Array) -> tuple[Array, Array]:
        best = np.ones((blocks.shape[0], 1))
        least = self._error(blocks, *self._parameters(blocks, best), 2.0)
        for comb in (_COARSE - 1.0, _FINE):
            center = best.copy()
            for offset in comb:
                ratio = np.minimum(center + offset, 1.0)
                found = self._error(blocks, *self._parameters(blocks, ratio), 2.0)
                best = np.where(found < least, ratio, best)
                least = np.minimum(found, least)
        return self._parameters(blocks, best)

    def _half_quadratic(self, blocks: Array) -> tuple[Array, Array]:
        # From the full range and to the nearest optimum: the norm's own minimum over all ranges would clip large,
        # few and important weights without mercy.
        scale, zero_point = best = self._parameters(blocks, np.float64(1.0))
        least = self._error(blocks, scale, zero_point, _HQQ_NORM)
        beta = _HQQ_BETA
        for _ in range(_HQQ_ITERATIONS):
            values = _encode(blocks, scale, zero_point, self._lowest, self._highest)
            rest = (blocks - _decode(values, scale, zero_point)) / scale
            scale, zero_point = self._fit(blocks - scale * _shrink(rest, beta), values, scale)
            found = self._error(blocks, scale, zero_point, _HQQ_NORM)
            best = (np.where(found < least, scale, best[0]), np.where(found < least, zero_point, best[1]))
            least = np.minimum(found, least)
            beta *= _HQQ_GROWTH
        return best

    def _fit(self, target: Array, values: Array, scale: Array) -> tuple[Array, Array]:
        """Scale and zero point with which these values come closest to the target (linear regression)."""
        middle = np.zeros_like(scale) if self._symmetric else values.mean(axis=1, keepdims=True)
        centered = values - middle
        energy = np.einsum("ij,ij->i", centered, centered)[:, None]
        slope = np.einsum("ij,ij->i", centered, target)[:, None] / np.maximum(energy, 1.0)
        scale = self._usable(np.where(slope > 0, slope, scale).astype(np.float64))
        if self._symmetric:
            return scale, middle
        zero_point = np.rint(middle - target.mean(axis=1, keepdims=True) / scale)
        return scale, np.clip(zero_point, self._lowest, self._highest).astype(np.float32)

    def _error(self, blocks: Array, scale: Array, zero_point: Array, norm: float) -> Array:
        """Sum of |w - Q(w)|^norm of each block, as a column."""
        values = _encode(blocks, scale, zero_point, self._lowest, self._highest)
        rest = np.abs(blocks - _decode(values, scale, zero_point))
        powered = rest * rest if norm == 2.0 else rest**norm
        total: Array = powered.sum(axis=1, keepdims=True, dtype=np.float64)
        return total


def _shrink(rest: Array, beta: float) -> Array:
    """The generalized soft threshold of the l_p norm: sign(x) max(0, |x| - |x|^(p-1) / beta)."""
    size = np.maximum(np.abs(rest), np.float32(1e-8))
    shrunk: Array = np.sign(rest) * np.maximum(size - size ** (_HQQ_NORM - 1.0) / beta, 0.0)
    return shrunk
