"""Rounding a weight to a given grid so that the layer's output, not the weight, comes closest to what it should be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.weights import QuantizedWeight, to_rows
from edgeopt.compression.moments import Moments
from edgeopt.types import Array, Scheme

if TYPE_CHECKING:
    import torch

#: Added to the input covariance's diagonal, as a share of its mean. Frantar et al. take 0.01; with the few samples
#: that make a pass quick, more of it does better on others (EfficientNet-Lite0: 25.8 -> 26.0 dB).
_DAMPING = 0.3
#: The same for the least squares that come before rounding, which have far more freedom to fit the samples.
_RIDGE = 2.0
#: Columns whose errors are passed on to the rest in one matrix product.
_BLOCK = 128
#: Sweeps over all columns of the descent; it settles before.
_SWEEPS = 8
#: How often a damping that doesn't make the covariance positive definite is raised tenfold.
_MORE_DAMPING = 8


class Grid:
    """A weight's integer grid in rows, as (groups, rows, columns): scales, zero points, bounds and what must not move.

    An exporter derives the grid again from the rounded weight's extremes, so these keep their values.
    """

    def __init__(self, quantized: QuantizedWeight, scheme: Scheme, groups: int) -> None:
        import torch

        values = to_rows(quantized.values, quantized.axis)
        channels = quantized.values.shape[0]
        scale, zero_point, pinned = (
            torch.from_numpy(np.array(np.broadcast_to(part, values.shape)).reshape(groups, channels // groups, -1))
            for part in (*quantized.parameters(), _extremes(values, quantized.group_size))
        )
        self.scale = scale.double()
        self.zero_point = zero_point.double()
        self.pinned = pinned
        self.start = torch.from_numpy(values.reshape(scale.shape).copy()).double()
        self.highest = 2 ** (scheme.weight_bits - 1) - 1
        self.lowest = -self.highest if scheme.weight_symmetric else -self.highest - 1

    def nearest(self, real: torch.Tensor, column: int) -> torch.Tensor:
        """Values (groups, rows) of one column."""
        import torch

        steps = torch.round(real / self.scale[:, :, column]) + self.zero_point[:, :, column]
        free = torch.clamp(steps, self.lowest, self.highest)
        return torch.where(self.pinned[:, :, column], self.start[:, :, column], free)

    def real(self, values: torch.Tensor) -> torch.Tensor:
        return (values - self.zero_point) * self.scale


def _extremes(values: Array, group_size: int | None) -> Array:
    """Marks the smallest and the largest value of each row, or of each group of it."""
    marked = np.zeros(values.shape, dtype=bool)
    size = group_size or values.shape[1]
    for start in range(0, values.shape[1], size):
        part, marks = values[:, start : start + size], marked[:, start : start + size]
        for extreme in (part.argmin(axis=1), part.argmax(axis=1)):
            np.put_along_axis(marks, extreme[:, None], True, axis=1)
    return marked


def aim(weight: torch.Tensor, grid: Grid, moments: Moments) -> torch.Tensor:
    """The real weight that brings the layer's output, for the rounded network's input, closest to the float network's.

    Least squares held to the float weight by a ridge, so that it makes up for rounding errors before the layer and does
    not learn the samples by heart; the asymmetric target of Li et al., "GPTAQ" (2025).

    Args:
        weight: (groups, rows, columns), float64.

    Returns:
        Of the same shape, within the grid's ends.
    """
    import torch

    covariance, variance = moments.input_covariance, moments.input_covariance.diagonal(dim1=1, dim2=2)
    ridge = _RIDGE * variance.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    held = covariance + torch.diag_embed(ridge.expand_as(variance))
    wanted = moments.output_covariance + ridge[:, :, None] * weight
    solved = torch.linalg.solve_ex(held, wanted.mT).result.mT
    ends = (grid.real(torch.full_like(weight, end)) for end in (grid.lowest, grid.highest))
    return torch.minimum(torch.maximum(solved, next(ends)), next(ends))


def compensate(weight: torch.Tensor, grid: Grid, moments: Moments) -> torch.Tensor:
    """Round column by column, each time moving the columns still to come so that they make up for the error.

    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2023): H is
    the input covariance, U the upper Cholesky factor of its inverse, and columns go by falling variance.

    Args:
        weight: (groups, rows, columns), float64.

    Returns:
        The values on the grid, float64.

    Raises:
        ArithmeticError: no damping makes the covariance positive definite.
    """
    import torch

    variance = moments.input_covariance.diagonal(dim1=1, dim2=2)
    # One order for all groups: it is that of columns in memory, so a column's grid is read as one slice.
    order = variance.mean(0).argsort(descending=True)
    upper = _inverse_factor(moments.input_covariance[:, order][:, :, order])
    rest = weight[:, :, order].clone()
    values = torch.empty_like(weight)
    columns = order.tolist()
    for first in range(0, len(columns), _BLOCK):
        last = min(first + _BLOCK, len(columns))
        errors = torch.empty(*rest.shape[:2], last - first, dtype=rest.dtype)
        for i in range(first, last):
            column = columns[i]
            values[:, :, column] = grid.nearest(rest[:, :, i], column)
            kept = (values[:, :, column] - grid.zero_point[:, :, column]) * grid.scale[:, :, column]
            error = (rest[:, :, i] - kept) / upper[:, i, i, None]
            rest[:, :, i:last] -= error[:, :, None] * upper[:, None, i, i:last]
            errors[:, :, i - first] = error
        rest[:, :, last:] -= errors @ upper[:, first:last, last:]
    return values


def _inverse_factor(covariance: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped covariance's inverse."""
    import torch

    variance = covariance.diagonal(dim1=1, dim2=2)
    damping = _DAMPING * variance.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    for attempt in range(_MORE_DAMPING + 1):
        damped = covariance + torch.diag_embed((damping * 10**attempt).expand_as(variance))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed.any():
            continue
        upper: torch.Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed.any():
            return upper
    raise ArithmeticError("no damping makes the covariance positive definite")


def descend(weight: torch.Tensor, grid: Grid, moments: Moments, start: torch.Tensor) -> torch.Tensor:
    """Choose between rounding up and down, one column after the other, while that lowers the output's squared error.

    The choice is that of Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020), with the
    error against the float network's output for the rounded network's input; the quadratic problem is solved by
    coordinate descent (as in Behdin et al., "QuantEase", 2023) in place of their continuous relaxation.

    Args:
        weight: (groups, rows, columns), float64.
        start: the values to start from.

    Returns:
        The values on the grid, float64, at most one step from the weight or where they started.
    """
    import torch

    covariance, wanted = moments.input_covariance, moments.output_covariance
    variance = covariance.diagonal(dim1=1, dim2=2)
    damping = _DAMPING * variance.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    # Damped towards the float weight, so that columns that hardly vary in the samples stay where they are.
    covariance = covariance + torch.diag_embed(damping.expand_as(variance))
    wanted = wanted + damping[:, :, None] * weight
    exact = weight / grid.scale + grid.zero_point
    lowest = torch.minimum(torch.floor(exact), start)
    highest = torch.maximum(torch.ceil(exact), start)
    values = start.clone()
    slope = grid.real(values) @ covariance - wanted
    for _ in range(_SWEEPS):
        changed = False
        for first in range(0, values.shape[2], _BLOCK):
            last = min(first + _BLOCK, values.shape[2])
            before = grid.real(values)[:, :, first:last]
            for i in range(first, last):
                scale = grid.scale[:, :, i]
                step = slope[:, :, i] / (covariance[:, i, i, None] * scale)
                better = torch.round(values[:, :, i] - step)
                better = torch.minimum(torch.maximum(better, lowest[:, :, i]), highest[:, :, i])
                better = torch.where(grid.pinned[:, :, i], values[:, :, i], better.clamp(grid.lowest, grid.highest))
                move = (better - values[:, :, i]) * scale
                values[:, :, i] = better
                slope[:, :, i:last] += move[:, :, None] * covariance[:, None, i, i:last]
                changed = changed or bool(move.any())
            # What the rest of the block's columns did to those before them, and the block to all others.
            moved = grid.real(values)[:, :, first:last] - before
            slope = grid.real(values) @ covariance - wanted if moved.any() else slope
        if not changed:
            break
    return values
