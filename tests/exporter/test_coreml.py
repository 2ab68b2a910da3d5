"""What the Core ML exporter decides before it converts anything."""

from __future__ import annotations

import pytest

from edgeopt.calibration.ranges import Range
from edgeopt.exporter.coreml import CoreMLExporter
from edgeopt.exporter.coreml_activations import parameters
from edgeopt.exporter.coreml_convert import native_name
from edgeopt.exporter.coreml_scheme import for_device, minimum_ios
from edgeopt.exporter.coreml_weights import _channels_per_table
from edgeopt.types import LayerRules, NeuralEngine, Scheme

STATIC = Scheme("w8a8", "static", activation_symmetric=True)
PALETTE = Scheme("w4", "none", weight_values="k-means")


@pytest.mark.parametrize(
    ("scheme", "ios"),
    [
        (Scheme("fp32", "none"), 15),
        (Scheme("fp16", "none"), 15),
        (Scheme("w8", "none"), 16),
        (STATIC, 17),
        (PALETTE, 18),
        (Scheme("w4", "none", weight_values="k-means", weight_granularity="per-tensor"), 16),
        (Scheme("w4", "none"), 18),
        (Scheme("w8", "none", weight_granularity="per-group"), 18),
    ],
)
def test_each_form_needs_its_system(scheme: Scheme, ios: int) -> None:
    assert CoreMLExporter().unsupported(scheme, LayerRules()) is None
    assert minimum_ios(scheme) == ios


@pytest.mark.parametrize(
    ("scheme", "word"),
    [
        (Scheme("w8a16", "static"), "w8a16"),
        (Scheme("8da4w", "dynamic"), "8da4w"),
        (Scheme("w8a8", "dynamic"), "static"),
        (Scheme("w8a8", "static", io="int8"), "io float"),
        (Scheme("w8a8", "static", weight_symmetric=False), "symmetric weights"),
        (Scheme("w8a8", "static", weight_granularity="per-group"), "per-channel"),
        (Scheme("w4", "none", weight_values="k-means", weight_granularity="per-group"), "per-channel"),
    ],
)
def test_what_core_ml_has_not_is_refused_with_what_to_take(scheme: Scheme, word: str) -> None:
    assert word in (CoreMLExporter().unsupported(scheme, LayerRules()) or "")


def test_int16_layers_are_refused() -> None:
    assert "int16" in (CoreMLExporter().unsupported(STATIC, LayerRules(int16_activations=("head",))) or "")


def test_an_old_phone_gets_one_table_per_weight() -> None:
    from dataclasses import replace

    old, new = (replace(PALETTE, npu=NeuralEngine("A", 16, ios)) for ios in (17, 18))
    assert for_device(old).weight_granularity == "per-tensor"
    assert for_device(new) == new


@pytest.mark.parametrize(
    ("bounds", "symmetric", "wanted"),
    [
        ((0.0, 6.0), True, (6 / 255, 0, "uint8")),
        ((-2.0, 6.0), True, (6 / 127, 0, "int8")),
        ((-2.0, 6.0), False, (8 / 255, -64, "int8")),
        ((0.0, 6.0), False, (6 / 255, -128, "int8")),
        ((-1.0, 0.0), False, (1 / 255, 127, "int8")),
    ],
)
def test_parameters_of_an_activation(
    bounds: tuple[float, float], symmetric: bool, wanted: tuple[float, int, str]
) -> None:
    scale, zero_point, dtype = parameters(Range(*bounds), Scheme("w8a8", "static", activation_symmetric=symmetric))
    assert scale == pytest.approx(wanted[0], rel=1e-3)
    assert (zero_point, dtype) == wanted[1:]


def test_a_tiny_range_keeps_a_scale_that_fp16_can_hold() -> None:
    scale, _, _ = parameters(Range(0.0, 1e-7), STATIC)
    assert scale == 2.0**-14


def test_power_of_two_scales() -> None:
    scheme = Scheme("w8a8", "static", activation_symmetric=True, scale="power-of-two")
    assert parameters(Range(0.0, 6.0), scheme)[0] == 2.0**-5


@pytest.mark.parametrize(("channels", "weights", "shared"), [(64, 576, 8), (32, 9, 32), (256, 16, 64), (7, 5000, 7)])
def test_channels_share_a_table_until_it_pays(channels: int, weights: int, shared: int) -> None:
    assert _channels_per_table(channels, weights) == shared


@pytest.mark.parametrize(("name", "native"), [("input ids", "input_ids"), ("0.out", "_0_out"), ("x", "x")])
def test_names_as_core_ml_takes_them(name: str, native: str) -> None:
    assert native_name(name) == native
