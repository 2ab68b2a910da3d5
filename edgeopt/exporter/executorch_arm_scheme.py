"""What Arm's ExecuTorch backends offer, told before any work is done."""

from __future__ import annotations

from edgeopt.types import LayerRules, Scheme


def unsupported(scheme: Scheme, rules: LayerRules) -> str | None:
    """See `edgeopt.exporter.base.Exporter.unsupported`."""
    if rules.int16_activations:
        return "ExecuTorch's Arm backend has no mix of int8 and int16 activations here; take w8a16 for all layers"
    if scheme.precision not in ("w8a8", "w8a16") or scheme.activations != "static":
        return f"the accelerator computes with static int8 or int16 activations, not with {_words(scheme)}; take w8a8"
    if not scheme.weight_symmetric:
        return "TOSA's convolutions take int8 weights without a zero point; take symmetric weights"
    if scheme.weight_granularity == "per-group":
        return "TOSA has no group-wise scales; take per-channel weights"
    if scheme.weight_values != "linear":
        return f"the accelerator has no {scheme.weight_values} weights; take weight-values linear"
    return None


def _words(scheme: Scheme) -> str:
    return scheme.precision if scheme.activations == "none" else f"{scheme.activations} {scheme.precision}"
