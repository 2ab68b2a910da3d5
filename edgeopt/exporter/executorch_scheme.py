"""What the XNNPACK delegate has kernels for, told before any work is done."""

from __future__ import annotations

from edgeopt.types import LayerRules, Scheme

#: Weights that share a scale come in multiples of this: XNNPACK packs them so (xnn_define_blockwise_quantized_tensor).
GROUP_MULTIPLE = 32


def unsupported(scheme: Scheme, rules: LayerRules) -> str | None:
    """See `edgeopt.exporter.base.Exporter.unsupported`."""
    if rules.int16_activations:
        return "XNNPACK has no int16 activations; keep those layers in float (keep-float)"
    return _precision(scheme) or _weights(scheme) or _dynamic(scheme)


def _precision(scheme: Scheme) -> str | None:
    match scheme.precision:
        case "fp16":
            return "XNNPACK has no fp16 recipe for ExecuTorch here; take fp32, or an ONNX or LiteRT target"
        case "w8a16":
            return "XNNPACK has no int16 kernels; take w8a8 with the sensitive layers in float"
        case "w8":
            return (
                "ExecuTorch's XNNPACK delegate has no weight-only int8 kernels; take w8a8 with dynamic activations, "
                "which is as small and faster"
            )
        case "w4":
            return "ExecuTorch's XNNPACK delegate has no weight-only int4 kernels; take 8da4w, as small and faster"
        case "8da4w" if scheme.activations != "dynamic":
            return "XNNPACK's 4-bit kernels take dynamic activations only"
        case "w8a8" if scheme.activations == "none":
            return "w8a8 needs static or dynamic activations"
    return None


def _weights(scheme: Scheme) -> str | None:
    if not scheme.is_quantized:
        return None
    if scheme.weight_values != "linear":
        return (
            f"a .pte file has no {scheme.weight_values} weights that its runtime would expand; "
            "take weight-values linear"
        )
    if not scheme.weight_symmetric:
        return "XNNPACK's int8 and int4 weights have no zero point; take symmetric weights"
    if scheme.weight_granularity == "per-group":
        if scheme.weight_bits != 4:
            return "XNNPACK has group-wise scales for 4-bit weights only; take per-channel, or 8da4w"
        if scheme.group_size < 1 or scheme.group_size % GROUP_MULTIPLE:
            return f"XNNPACK takes groups of a multiple of {GROUP_MULTIPLE} weights, not {scheme.group_size}"
    return None


def _dynamic(scheme: Scheme) -> str | None:
    if scheme.activations != "dynamic":
        return None
    if scheme.weight_granularity == "per-tensor":
        return "XNNPACK's dynamic kernels take per-channel or per-group weights only"
    if scheme.activation_symmetric:
        return "XNNPACK computes dynamic zero points itself; leave activation-symmetric off"
    if scheme.io == "int8":
        return "with dynamic activations there is no fixed scale for int8 inputs and outputs"
    return None
