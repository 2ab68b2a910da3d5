"""An int32 bias has the scale of its input times that of its weight, which may be too fine for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeopt.calibration.weights import QuantizedWeight
from edgeopt.types import Array, Scheme

#: Keeps int32 biases clear of overflow: |bias| / (activation scale * weight scale) stays below this.
MAX_QUANTIZED_BIAS = 2**30


def with_room_for_bias(
    weight: QuantizedWeight, original: Array, bias: Array, input_scale: float, scheme: Scheme
) -> QuantizedWeight:
    """A channel of tiny weights with a large bias would overflow int32: such channels get a coarser scale.

    Args:
        original: the float weight, of the shape of `weight.values`.
    """
    need = np.abs(bias).astype(np.float64) / (input_scale * MAX_QUANTIZED_BIAS)
    if not weight.scale.ndim:
        need = np.asarray(need.max(initial=0))
    if np.all(need <= weight.scale):
        return weight
    coarse = np.maximum(need, np.finfo(np.float32).tiny)
    if scheme.scale == "power-of-two":
        coarse = np.exp2(np.ceil(np.log2(coarse)))
    scale = np.where(need > weight.scale, coarse, weight.scale).astype(np.float32)
    shape = [-1 if i == weight.axis else 1 for i in range(weight.values.ndim)] if scale.ndim else []
    bounds = np.iinfo(np.int8)
    steps = np.rint(original / scale.reshape(shape)) + weight.zero_point.reshape(shape)
    values = np.clip(steps, bounds.min + int(scheme.weight_symmetric), bounds.max).astype(np.int8)
    return replace(weight, values=values, scale=scale)
