"""What Core ML has a form for, told before any work is done, and which iOS a form needs."""

from __future__ import annotations

from dataclasses import replace

from edgeopt.types import LayerRules, NeuralEngine, Scheme

#: The first system that reads ML programs; affine and tabled weights; int8 activations; tables per group of channels,
#: 4-bit integers and scales per block (coremltools' `minimum_deployment_target` of each operator).
PROGRAMS, COMPRESSED, QUANTIZED, BLOCKWISE = 15, 16, 17, 18


def unsupported(scheme: Scheme, rules: LayerRules) -> str | None:
    """See `edgeopt.exporter.base.Exporter.unsupported`."""
    if rules.int16_activations:
        return "Core ML has no int16 activations; keep those layers in float (keep-float), which is fp16 there"
    if scheme.precision in ("w8a16", "8da4w") or scheme.activations == "dynamic":
        return (
            f"Core ML has no {scheme.activations} {scheme.precision}; take w8a8 with static activations, or w8, whose "
            "activations are fp16"
        )
    if scheme.io == "int8":
        return "a Core ML app passes float or int32 arrays; take io float"
    if scheme.is_quantized and scheme.weight_values == "linear":
        return _linear(scheme)
    if scheme.weight_values != "linear" and scheme.weight_granularity == "per-group":
        return "Core ML's tables serve whole output channels; take weight-granularity per-channel or per-tensor"
    return None


def _linear(scheme: Scheme) -> str | None:
    if scheme.weight_granularity == "per-group" and scheme.activations == "static":
        return "Core ML computes w8a8 with one scale per channel; take weight-granularity per-channel"
    if scheme.activations == "static" and not scheme.weight_symmetric:
        return "the Neural Engine's int8 weights have no zero point; take symmetric weights"
    return None


def minimum_ios(scheme: Scheme) -> int:
    """The oldest system that reads what the scheme asks for."""
    if not scheme.is_quantized:
        return PROGRAMS
    if scheme.activations == "static":
        return QUANTIZED
    if scheme.weight_granularity == "per-group" or (scheme.weight_bits == 4 and scheme.weight_values == "linear"):
        return BLOCKWISE
    if scheme.weight_values != "linear" and scheme.weight_granularity == "per-channel":
        return BLOCKWISE
    return COMPRESSED


def for_device(scheme: Scheme) -> Scheme:
    """The scheme, with one table per weight where the phone shipped with a system that has no others."""
    old = isinstance(scheme.npu, NeuralEngine) and scheme.npu.ios < BLOCKWISE
    if old and scheme.weight_values != "linear" and scheme.weight_granularity == "per-channel":
        return replace(scheme, weight_granularity="per-tensor")
    return scheme
