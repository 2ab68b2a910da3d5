"""What a quantized file should look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeopt.types.names import Precision
from edgeopt.types.npu import Npu


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a quantized file should look like; means the same in every format.

    Attributes:
        precision: `w8a8` quantizes weights and activations, `w8` and `w4` weights only, `8da4w` has 4-bit weights and
            int8 activations with run-time ranges, fp16/fp32 are plain casts.
        activations: "static" ranges come from calibration; "dynamic" ones are computed at run time.
        weight_granularity: one scale per output channel, one per tensor, or one per `group_size` consecutive weights
            of an output channel.
        activation_symmetric: zero point fixed at 0.
        io: whether the file's float inputs and outputs stay float32 or become int8 (uint8 where the format's
            fast kernels want that).
        weight_symmetric: zero point of weights fixed at 0.
        scale: "power-of-two" rounds every scale up to a power of two, for hardware that shifts.
        weight_estimator: how a weight scale is chosen: "max" covers the largest magnitude, "mse" minimizes the squared
            error of the weights, "hqq" their half-quadratic, outlier-robust error (Badri and Shaji 2023).
        weight_values: "linear" integers; "logarithmic" (signed powers of two) and "k-means" values are stored as codes
            with a table and expanded when the file is loaded, so they save storage only.
        group_size: for "per-group".
        npu: the accelerator whose form the file takes; None for the CPU kernels of the format's runtime.
    """

    precision: Precision
    activations: Literal["none", "static", "dynamic"]
    weight_granularity: Literal["per-channel", "per-tensor", "per-group"] = "per-channel"
    activation_symmetric: bool = False
    io: Literal["float", "int8"] = "float"
    weight_symmetric: bool = True
    scale: Literal["any", "power-of-two"] = "any"
    weight_estimator: Literal["max", "mse", "hqq"] = "max"
    weight_values: Literal["linear", "logarithmic", "k-means"] = "linear"
    group_size: int = 32
    npu: Npu | None = None

    @property
    def needs_calibration(self) -> bool:
        return self.activations == "static"

    @property
    def is_quantized(self) -> bool:
        return self.precision not in ("fp32", "fp16")

    @property
    def is_plain_float(self) -> bool:
        """Whether the format's fp32 file is all that is asked for; one for an accelerator is a file of its own."""
        return self.precision == "fp32" and self.npu is None

    @property
    def weight_bits(self) -> int:
        """Bits of one stored weight; 32 and 16 for float."""
        return {"fp32": 32, "fp16": 16, "w4": 4, "8da4w": 4}.get(self.precision, 8)

    @property
    def activation_bits(self) -> int:
        """Bits of one quantized activation; 32 where activations stay float."""
        return {"w8a8": 8, "8da4w": 8, "w8a16": 16}.get(self.precision, 32)


@dataclass(frozen=True, slots=True)
class LayerRules:
    """Exceptions from a scheme, as shell patterns matched against source layer paths ("features.0.*", "classifier").

    Attributes:
        keep_float: layers that stay float.
        int16_activations: layers whose inputs and outputs have 16 bits (w8a16) in a w8a8 file.
    """

    keep_float: tuple[str, ...] = ()
    int16_activations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EstimatorSpec:
    """Which range estimator, and its one parameter (the percentile kept, e.g. 99.99; unused by the others)."""

    name: Literal["min-max", "percentile", "entropy", "mse"] = "min-max"
    percentile: float = 99.999
