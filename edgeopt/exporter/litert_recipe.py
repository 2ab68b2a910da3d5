"""A scheme in ai-edge-quantizer's terms, and what LiteRT can't do of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeopt.types import LayerRules, Scheme

if TYPE_CHECKING:
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer import quantizer as aeq

#: Sizes of group that XNNPACK's and ai-edge-quantizer's block-wise weights come in.
GROUP_SIZES = (32, 64, 128, 256)


def unsupported(scheme: Scheme, rules: LayerRules) -> str | None:
    """See `Exporter.unsupported`."""
    if rules.int16_activations and (scheme.precision, scheme.activations) not in (
        ("w8a8", "static"),
        ("w8a16", "static"),
    ):
        return f"16-bit activations of single layers need a static w8a8 file, this is {scheme.precision}"
    if not scheme.is_quantized:
        return None
    return _unsupported_weights(scheme) or _unsupported_activations(scheme, rules)


def _unsupported_weights(scheme: Scheme) -> str | None:
    if scheme.weight_values != "linear":
        return (
            f"LiteRT expands no {scheme.weight_values} weight tables when it loads a file; take linear weights (w4 for "
            "less storage), or an ONNX target"
        )
    if scheme.weight_granularity == "per-group":
        if scheme.precision != "8da4w":
            return (
                f"LiteRT has per-group weights at 8da4w only, not at {scheme.precision}; take per-channel, or an "
                "8da4w target"
            )
        if scheme.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            return f"LiteRT has weight groups of {sizes}, not of {scheme.group_size}; take one of those"
    if not scheme.weight_symmetric and scheme.precision not in ("w8", "w4"):
        return (
            "LiteRT's integer kernels take weights with a zero point of 0 only; take symmetric weights, or quantize "
            "weights alone (w8, w4)"
        )
    return None


def _unsupported_activations(scheme: Scheme, rules: LayerRules) -> str | None:
    if scheme.activations == "dynamic":
        if scheme.precision == "w8a16":
            return "LiteRT has no run-time ranges at 16 bits; take static activations"
        if scheme.activation_symmetric:
            return "LiteRT's run-time ranges have a free zero point; take static activations, or asymmetric ones"
        if scheme.scale == "power-of-two":
            return "LiteRT's run-time scales are no powers of two; take static activations"
    if scheme.precision == "8da4w" and scheme.activations == "static":
        return "LiteRT's 4-bit weights go with run-time activation ranges; take dynamic activations, or w8a8"
    if scheme.precision == "w8a16" and scheme.io == "int8":
        return "inputs and outputs of a w8a16 LiteRT file are float or int16; take float ones"
    if rules.int16_activations and scheme.scale == "power-of-two":
        return (
            "LiteRT converts between 8-bit and 16-bit layers with scales that are no powers of two; take w8a16 for all "
            "layers, or any scale"
        )
    return None


def has_recipe(kind: str, scheme: Scheme) -> bool:
    """Whether ai-edge-quantizer has a quantized form of a LiteRT operator at this scheme."""
    from ai_edge_quantizer import default_policy

    policy = json.loads(default_policy.DEFAULT_JSON_POLICY)["ops_per_config"]
    name = "CONV_2D_TRANSPOSE" if kind == "TRANSPOSE_CONV" else kind
    return name in policy[_policy(scheme)]


def _policy(scheme: Scheme) -> str:
    if scheme.activations == "static":
        return f"static_wi8_ai{scheme.activation_bits}"
    if scheme.activations == "none":
        return f"weightonly_wi{scheme.weight_bits}_afp32"
    blocks = "_blockwise" if scheme.weight_granularity == "per-group" else ""
    return f"dynamic_wi{scheme.weight_bits}_afp32{blocks}"


def write_recipe(quantizer: aeq.Quantizer, scheme: Scheme, *, wide: Sequence[str], kept: Sequence[str]) -> None:
    """Tell ai-edge-quantizer what to do. Later rules win over earlier ones.

    16-bit activations are symmetric whatever the scheme says: LiteRT's int16 kernels have no zero point.

    Args:
        wide: scopes of the operators with 16-bit activations.
        kept: scopes of the operators that stay float.
    """
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.quantizer import AlgorithmName

    name = qtyping.TFLOperationName
    if scheme.precision == "fp16":
        quantizer.add_weight_only_config(
            ".*", name.ALL_SUPPORTED, num_bits=16, algorithm_key=AlgorithmName.FLOAT_CASTING
        )
    else:
        quantizer.update_quantization_recipe(".*", name.ALL_SUPPORTED, _config(scheme, scheme.activation_bits))
    if scheme.activations == "static":
        # There is no static form of a table look-up; this one at least stores the table in int8.
        quantizer.add_dynamic_config(
            ".*", name.EMBEDDING_LOOKUP, num_bits=8, granularity=_config(scheme, 8).weight_tensor_config.granularity
        )
        if wide:
            quantizer.update_quantization_recipe(_any_of(wide), name.ALL_SUPPORTED, _config(scheme, 16))
        for border in (name.INPUT, name.OUTPUT):
            # Under a pattern of its own, to come after the 16-bit rule: a scope may name the file's last operator.
            if scheme.io == "float":
                quantizer.update_quantization_recipe(".", border, algorithm_key=AlgorithmName.NO_QUANTIZE)
            else:
                quantizer.update_quantization_recipe(".", border, _config(scheme, scheme.activation_bits))
    if kept:
        quantizer.update_quantization_recipe(_any_of(kept), name.ALL_SUPPORTED, algorithm_key=AlgorithmName.NO_QUANTIZE)


def _any_of(scopes: Sequence[str]) -> str:
    return f"^(?:{'|'.join(map(re.escape, scopes))})$"


def _config(scheme: Scheme, activation_bits: int) -> qtyping.OpQuantizationConfig:
    from ai_edge_quantizer import qtyping

    granularity = qtyping.QuantGranularity
    sizes = {
        "per-channel": granularity.CHANNELWISE,
        "per-tensor": granularity.TENSORWISE,
        "per-group": getattr(granularity, f"BLOCKWISE_{scheme.group_size}", None),
    }
    activations = None
    if scheme.activations == "static":
        activations = qtyping.TensorQuantizationConfig(
            num_bits=activation_bits, symmetric=activation_bits == 16 or scheme.activation_symmetric
        )
    weights_only = scheme.activations == "none"
    precision = qtyping.ComputePrecision
    return qtyping.OpQuantizationConfig(
        activation_tensor_config=activations,
        weight_tensor_config=qtyping.TensorQuantizationConfig(
            num_bits=scheme.weight_bits,
            symmetric=scheme.weight_symmetric,
            granularity=sizes[scheme.weight_granularity],
        ),
        compute_precision=precision.FLOAT if weights_only else precision.INTEGER,
        explicit_dequantize=weights_only,
    )
