"""Rounding in the forward pass, and gradients that pass through it: the arithmetic of an int8 file in float32.

Formulas: real = scale * (quantized - zero_point), scale = (max - min) / (2^bits - 1), round half to even, as the ONNX
operators QuantizeLinear and DequantizeLinear define them. The gradient is the straight-through estimator: one inside
the range, zero where a value is clipped. Learned step sizes follow Esser et al., "Learned Step Size Quantization"
(2020), their zero points Bhalgat et al., "LSQ+" (2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeopt.calibration.ranges import Range

#: Weights use -127..127, so that scale = max|w| / 127 and zero is exact.
WEIGHT_STEPS = 127
_TINY = float(torch.finfo(torch.float32).tiny)


def _round(values: Tensor) -> Tensor:
    """Round half to even; the gradient is that of the identity."""
    return values.round().detach() + (values - values.detach())


def _learned(parameter: Tensor, values: int, steps: int) -> Tensor:
    """LSQ's gradient scale, 1 / sqrt(number of values x number of steps): steps then move as slowly as weights do."""
    # The value of the parameter, with a gradient that is multiplied by the factor.
    factor = 1 / math.sqrt(max(values * steps, 1))
    scaled = parameter * factor
    return parameter.detach() + (scaled - scaled.detach())


@dataclass(frozen=True, slots=True)
class Grid:
    """Which integers a format holds activations in.

    Attributes:
        bits: 8 or 16.
        symmetric: zero point in the middle.
        smallest_scale: finer steps are widened to it.
    """

    bits: int = 8
    symmetric: bool = False
    smallest_scale: float = _TINY

    @property
    def steps(self) -> int:
        """Distance between the smallest and the largest integer."""
        return (1 << self.bits) - (2 if self.symmetric else 1)


class ActivationQuantizer(nn.Module):
    """One scale and zero point for a whole tensor.

    Args:
        grid: the integers.
        learned: whether training moves the range (LSQ); otherwise `set_range` alone does.

    Attributes:
        low, high: the range in real units, scalars; low <= 0 <= high.
    """

    low: Tensor
    high: Tensor

    def __init__(self, grid: Grid, *, learned: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.learned = learned
        for name, value in (("low", 0.0), ("high", 1.0)):
            bound = torch.tensor(value)
            if learned:
                self.register_parameter(name, nn.Parameter(bound))
            else:
                self.register_buffer(name, bound)

    def set_range(self, bounds: Range) -> None:
        with torch.no_grad():
            self.low.fill_(min(bounds.min, 0.0))
            self.high.fill_(max(bounds.max, 0.0))

    def range(self) -> Range:
        """What the grid spans now: the symmetric hull where zero points are fixed."""
        low, high = float(self.low.detach().clamp(max=0)), float(self.high.detach().clamp(min=0))
        if self.grid.symmetric:
            return Range(-max(-low, high), max(-low, high))
        return Range(low, high)

    def forward(self, values: Tensor) -> Tensor:
        """The values on the grid, float32, same shape. Learned bounds get their gradients here."""
        if self.learned:
            return self._forward_learned(values.float())
        return quantize(values.float(), self.low, self.high, self.grid)

    def _forward_learned(self, values: Tensor) -> Tensor:
        steps = self.grid.steps
        low = _learned(self.low, values.numel(), steps).clamp(max=0)
        high = _learned(self.high, values.numel(), steps).clamp(min=0)
        if self.grid.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / steps).clamp(min=self.grid.smallest_scale)
        zero_point = _round(-low / scale)
        integers = (_round(values / scale) + zero_point).clamp(0, steps)
        return (integers - zero_point) * scale


def quantize(values: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """`values` (float32) on the grid that spans low..high, both scalars; straight-through gradient to the values."""
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / grid.steps).clamp(min=grid.smallest_scale).reshape(1)
    zero_point = torch.round(-low / scale).clamp(0, grid.steps).to(torch.int32).reshape(1)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, grid.steps)


def quantize_to_own_range(values: Tensor, grid: Grid, *, leading: int = 0) -> Tensor:
    """`values` on the grid that just covers them, as run-time ranges and constants have it.

    Args:
        leading: so many first dimensions have a range for each entry: 1 gives one per sample.
    """
    real = values.float()
    if not 0 < leading < real.dim():
        low, high = real.detach().amin().clamp(max=0), real.detach().amax().clamp(min=0)
        return quantize(real, low, high, grid)
    rest = tuple(range(leading, real.dim()))
    low, high = real.detach().amin(rest, True).clamp(max=0), real.detach().amax(rest, True).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / grid.steps).clamp(min=grid.smallest_scale)
    zero_point = torch.round(-low / scale)
    return ((_round(real / scale) + zero_point).clamp(0, grid.steps) - zero_point) * scale


class WeightQuantizer(nn.Module):
    """Symmetric int8 weights, -127..127 steps.

    Args:
        weight: the initial weight.
        axis: dimension with a scale for each entry; None for one scale in all.
        learned: whether training moves the scale (LSQ). It never exceeds max|w| / 127, so that some weight always
            lies on the last step and an exporter that looks at the maximum finds this very scale.
    """

    def __init__(self, weight: Tensor, axis: int | None, *, learned: bool = False) -> None:
        super().__init__()
        self.axis = axis
        self.scale = nn.Parameter(self._peak_scale(weight.detach().float())) if learned else None

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its grid, float32, same shape."""
        real = weight.float()
        peak_scale = self._peak_scale(real.detach())
        if self.scale is not None:
            learned = _learned(self.scale.abs(), real.numel() // max(self.scale.numel(), 1), WEIGHT_STEPS)
            scale = torch.minimum(learned, peak_scale).clamp(min=_TINY)
            spread = self._spread(scale, real)
            return _round(real / spread).clamp(-WEIGHT_STEPS, WEIGHT_STEPS) * spread
        if self.axis is None:
            origin = torch.zeros(1, dtype=torch.int32, device=real.device)
            return torch.fake_quantize_per_tensor_affine(
                real, peak_scale.reshape(1), origin, -WEIGHT_STEPS, WEIGHT_STEPS
            )
        origins = torch.zeros(peak_scale.shape, dtype=torch.int32, device=real.device)
        return torch.fake_quantize_per_channel_affine(real, peak_scale, origins, self.axis, -WEIGHT_STEPS, WEIGHT_STEPS)

    def _peak_scale(self, weight: Tensor) -> Tensor:
        if self.axis is None:
            peaks = weight.abs().amax()
        else:
            peaks = weight.abs().amax(dim=[i for i in range(weight.dim()) if i != self.axis % weight.dim()])
        scale = peaks / WEIGHT_STEPS
        return torch.where(scale >= _TINY, scale, torch.ones_like(scale))

    def _spread(self, scale: Tensor, weight: Tensor) -> Tensor:
        if self.axis is None:
            return scale
        shape = [1] * weight.dim()
        shape[self.axis] = -1
        return scale.view(shape)
