"""What ONNX Runtime can't do is refused by name, with what to take instead."""

from __future__ import annotations

import pytest

from edgeopt.exporter.onnx import OnnxExporter
from edgeopt.types import LayerRules, Scheme

NO_RULES = LayerRules()


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("fp16", "none"),
        Scheme("w8a8", "static"),
        Scheme("w8a8", "static", io="int8", scale="power-of-two", weight_symmetric=False),
        Scheme("w8a8", "dynamic"),
        Scheme("w8a8", "dynamic", "per-group", weight_estimator="hqq"),
        Scheme("w8a16", "static"),
        Scheme("w8", "none", weight_values="k-means"),
        Scheme("w4", "none", "per-group", group_size=24),
        Scheme("8da4w", "dynamic", "per-group", group_size=96),
    ],
)
def test_what_it_can_do(scheme: Scheme) -> None:
    assert OnnxExporter().unsupported(scheme, LayerRules(keep_float=("head",))) is None


@pytest.mark.parametrize(
    ("scheme", "rules", "problem", "instead"),
    [
        (Scheme("w8", "dynamic"), NO_RULES, "no w8 with dynamic activations", "take w8a8"),
        (Scheme("w8a16", "dynamic"), NO_RULES, "no w8a16 with dynamic activations", "take static"),
        (Scheme("8da4w", "static"), NO_RULES, "no 8da4w with static activations", "take dynamic"),
        (Scheme("w8a16", "static", io="int8"), NO_RULES, "int8 inputs and outputs need", "take float inputs"),
        (Scheme("w8a8", "dynamic", io="int8"), NO_RULES, "int8 inputs and outputs need", "take float inputs"),
        (Scheme("w8a8", "static"), LayerRules((), ("a",)), "no 16-bit kernels", "keep-float"),
        (Scheme("w8a8", "static", weight_values="k-means"), NO_RULES, "k-means weights are expanded", "take w8"),
        (Scheme("w8a8", "dynamic", scale="power-of-two"), NO_RULES, "no powers of two", "take static"),
        (Scheme("w8a8", "static", "per-group"), NO_RULES, "one weight scale per output channel", "take per-channel"),
        (Scheme("8da4w", "dynamic", "per-group", group_size=24), NO_RULES, "group size of 24", "take one of these"),
    ],
)
def test_what_it_can_not(scheme: Scheme, rules: LayerRules, problem: str, instead: str) -> None:
    message = OnnxExporter().unsupported(scheme, rules)
    assert message is not None
    before, _, after = message.partition("; ")
    assert problem in before
    assert instead in after
