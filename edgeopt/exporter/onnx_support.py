"""What ONNX Runtime can't do of a scheme, said before any work."""

from __future__ import annotations

from collections.abc import Iterator

from edgeopt.exporter.onnx_products import block_size
from edgeopt.types import LayerRules, Scheme


def unsupported(scheme: Scheme, rules: LayerRules) -> str | None:
    """The first thing that can't be done, with what to take instead; None when all is possible."""
    return next(_problems(scheme, rules), None)


def _problems(scheme: Scheme, rules: LayerRules) -> Iterator[str]:
    kind = f"{scheme.precision} with {scheme.activations} activations"
    match scheme.precision, scheme.activations:
        case ("fp32" | "fp16" | "w8" | "w4", "none") | ("w8a8", "static" | "dynamic"):
            pass
        case ("w8a16", "static") | ("8da4w", "dynamic"):
            pass
        case ("w8a16" | "8da4w", _):
            other = "static" if scheme.precision == "w8a16" else "dynamic"
            yield f"ONNX has no {kind}; take {other} activations"
        case _:
            yield f"ONNX has no {kind}; take w8a8 with static or dynamic activations, or w8, w4 or fp16 with none"
    if rules.int16_activations and scheme.precision != "w8a16":
        yield (
            "ONNX Runtime has no 16-bit kernels and would compute those layers in float between two conversions; "
            "name them in keep-float instead of int16-activations, which is faster and more accurate"
        )
    if scheme.io == "int8" and (scheme.precision, scheme.activations) != ("w8a8", "static"):
        yield (
            f"int8 inputs and outputs need 8-bit ranges from calibration, which {kind} has not; take float inputs and "
            "outputs, or w8a8 with static activations"
        )
    if scheme.weight_values != "linear" and scheme.activations != "none":
        yield (
            f"{scheme.weight_values} weights are expanded to float when ONNX Runtime loads the file, so {kind} can't "
            "compute with them; take w8 or w4, or linear weights"
        )
    if scheme.activations == "dynamic" and scheme.scale == "power-of-two":
        yield (
            "ONNX Runtime computes run-time ranges itself, and their scales are no powers of two; take static "
            "activations"
        )
    if scheme.weight_granularity == "per-group" and scheme.activations == "static":
        yield (
            "ONNX Runtime's int8 kernels take one weight scale per output channel, not per group; take per-channel, "
            "or dynamic activations"
        )
    odd = scheme.weight_granularity == "per-group" and block_size(scheme, columns=scheme.group_size + 1) is None
    if odd and scheme.activations == "dynamic":
        yield (
            "ONNX Runtime multiplies in blocks of 16, 32, 64, 128 or 256 weights, none of which divides a group size "
            f"of {scheme.group_size}; take one of these"
        )
