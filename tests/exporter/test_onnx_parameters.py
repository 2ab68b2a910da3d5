"""Scale and zero point of static activations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgeopt.calibration.ranges import Range
from edgeopt.exporter.onnx_qdq import activation_parameters, unit_scale
from edgeopt.types import Scheme

W8A8 = Scheme("w8a8", "static")
SYMMETRIC = replace(W8A8, activation_symmetric=True)
WIDE = Scheme("w8a16", "static")
SHIFTED = replace(W8A8, scale="power-of-two")


@pytest.mark.parametrize(
    ("bounds", "scheme", "scale", "zero_point"),
    [
        (Range(0.0, 2.55), W8A8, 0.01, 0),
        (Range(-1.28, 1.27), W8A8, 0.01, 128),
        (Range(1.0, 2.55), W8A8, 0.01, 0),
        (Range(-2.55, -1.0), W8A8, 0.01, 255),
        (Range(-1.27, 0.5), SYMMETRIC, 0.01, 128),
        (Range(0.0, 0.0), W8A8, 1.0, 0),
        (Range(0.0, 655.35), WIDE, 0.01, 0),
        (Range(-327.67, 1.0), replace(WIDE, activation_symmetric=True), 0.01, 32768),
        (Range(0.0, 255.0), SHIFTED, 1.0, 0),
        (Range(-100.0, 156.0), SHIFTED, 2.0, 50),
        (Range(-0.4, 0.1), replace(SHIFTED, activation_symmetric=True), 2.0**-8, 128),
    ],
)
def test_activation_parameters(bounds: Range, scheme: Scheme, scale: float, zero_point: int) -> None:
    found_scale, found_zero = activation_parameters(bounds, scheme)
    assert found_scale == pytest.approx(scale, rel=1e-6)
    assert found_zero == zero_point


def test_unit_scale() -> None:
    assert unit_scale(W8A8) == pytest.approx(1 / 255)
    assert unit_scale(SHIFTED) == 1 / 256
    assert unit_scale(WIDE) == pytest.approx(1 / 65535)
