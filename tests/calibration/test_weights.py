from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from edgeopt.calibration.weights import quantize_weight, rows_to_shape, to_rows
from edgeopt.types import Array, Scheme

INT8 = Scheme("w8a8", "static")
INT4 = Scheme("w4", "none", "per-group")


def weight(shape: tuple[int, ...] = (6, 5, 3, 3), seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_t(4, size=shape).astype(np.float32)


def error(real: Array, scheme: Scheme, axis: int | None = 0) -> float:
    rest = real - quantize_weight(real, scheme, axis).dequantize()
    return float(np.dot(rest.ravel(), rest.ravel()))


def test_int8_per_channel_is_the_largest_magnitude_over_127() -> None:
    real = weight()
    found = quantize_weight(real, INT8, 0)
    assert found.scale.dtype == np.float32
    np.testing.assert_array_equal(found.scale, (np.abs(real).max(axis=(1, 2, 3)).astype(float) / 127).astype("f"))
    assert found.values.dtype == np.int8
    assert (np.abs(found.values).max(axis=(1, 2, 3)) == 127).all()
    assert (np.abs(real - found.dequantize()) <= found.scale[:, None, None, None] * 0.50001).all()
    assert not found.zero_point.any()


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_rows_and_back_along_any_axis(axis: int) -> None:
    real = weight((4, 5, 6))
    rows = to_rows(real, axis)
    assert rows.shape == (real.shape[axis], real.size // real.shape[axis])
    np.testing.assert_array_equal(rows_to_shape(rows, real.shape, axis), real)
    moved = quantize_weight(np.ascontiguousarray(np.moveaxis(real, axis, 0)), INT8, 0)
    np.testing.assert_array_equal(
        np.moveaxis(moved.dequantize(), 0, axis), quantize_weight(real, INT8, axis).dequantize()
    )


def test_groups_are_consecutive_weights_of_one_channel_and_the_last_may_be_short() -> None:
    real = weight((2, 5, 3, 3))
    found = quantize_weight(real, replace(INT4, group_size=32), 0)
    assert found.scale.shape == found.zero_point.shape == (2, 2)
    rows = real.reshape(2, 45)
    np.testing.assert_allclose(found.scale[:, 0], np.abs(rows[:, :32]).max(axis=1) / 7, rtol=1e-6)
    np.testing.assert_allclose(found.scale[:, 1], np.abs(rows[:, 32:]).max(axis=1) / 7, rtol=1e-6)
    assert found.dequantize().shape == real.shape


def test_a_group_larger_than_a_channel_is_the_channel() -> None:
    found = quantize_weight(weight((3, 8)), replace(INT4, group_size=64), 0)
    assert found.group_size == 8
    assert found.scale.shape == (3, 1)


def test_without_an_axis_or_per_tensor_there_is_one_scale() -> None:
    real = weight((3, 8))
    for scheme, axis in ((INT8, None), (INT4, None), (replace(INT8, weight_granularity="per-tensor"), 0)):
        found = quantize_weight(real, scheme, axis)
        assert found.scale.shape == ()
        assert found.axis is None


def test_asymmetric_spans_the_range_and_keeps_zero() -> None:
    real = np.array([[1.0, 2.0, 3.0], [-4.0, 0.0, 1.0]], dtype=np.float32)
    found = quantize_weight(real, replace(INT8, weight_symmetric=False), 0)
    np.testing.assert_allclose(found.scale, [3 / 255, 5 / 255], rtol=1e-6)
    assert found.zero_point.tolist() == [-128, 76]
    assert found.values.max() == 127
    assert found.dequantize()[1, 1] == 0.0
    assert error(real, replace(INT8, weight_symmetric=False)) < error(real, INT8)


@pytest.mark.parametrize("estimator", ["max", "mse", "hqq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_power_of_two_scales(estimator: str, symmetric: bool) -> None:
    scheme = Scheme("w4", "none", weight_symmetric=symmetric, scale="power-of-two", weight_estimator=estimator)  # type: ignore[arg-type]
    mantissa, _ = np.frexp(quantize_weight(weight(), scheme, 0).scale)
    assert (mantissa == 0.5).all()


def test_a_power_of_two_is_rounded_up() -> None:
    real = weight((3, 9))
    found = quantize_weight(real, replace(INT8, scale="power-of-two"), 0)
    assert (found.scale * 127 >= np.abs(real).max(axis=1)).all()
    assert np.abs(found.values).max() <= 127


def test_mse_never_loses_against_max_and_wins_with_outliers() -> None:
    for precision, granularity, symmetric in product(
        ("w8a8", "w4"), ("per-tensor", "per-channel", "per-group"), (True, False)
    ):
        full = Scheme(precision, "none", granularity, weight_symmetric=symmetric)  # type: ignore[arg-type]
        assert error(weight(), replace(full, weight_estimator="mse")) <= error(weight(), full) * (1 + 1e-6)
    outlier = weight((4, 200))
    outlier[:, 0] = 20.0
    assert error(outlier, replace(INT4, weight_estimator="mse", group_size=200)) < 0.9 * error(
        outlier, replace(INT4, group_size=200)
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_lowers_its_own_norm(symmetric: bool) -> None:
    scheme = replace(INT4, weight_symmetric=symmetric)
    real = weight((8, 64))

    def norm(estimator: str) -> float:
        found = quantize_weight(real, replace(scheme, weight_estimator=estimator), 0)  # type: ignore[arg-type]
        return float((np.abs(real - found.dequantize()) ** 0.7).sum())

    assert norm("hqq") < norm("max")


@pytest.mark.parametrize("estimator", ["max", "mse", "hqq"])
def test_zero_and_empty_weights(estimator: str) -> None:
    scheme = replace(INT4, weight_estimator=estimator)  # type: ignore[arg-type]
    found = quantize_weight(np.zeros((2, 3), dtype=np.float32), scheme, 0)
    assert not found.dequantize().any()
    assert (found.scale == 1).all()
    for shape in ((0, 3), (2, 0)):
        empty = quantize_weight(np.zeros(shape, dtype=np.float32), scheme, 0)
        assert empty.dequantize().shape == shape


@pytest.mark.parametrize("estimator", ["max", "mse", "hqq"])
@pytest.mark.parametrize("granularity", ["per-tensor", "per-channel", "per-group"])
def test_what_is_on_the_grid_stays_there(estimator: str, granularity: str) -> None:
    scheme = Scheme("w8", "none", granularity, weight_estimator=estimator)  # type: ignore[arg-type]
    on_grid = quantize_weight(weight(), replace(scheme, weight_estimator="max"), 0).dequantize()
    np.testing.assert_allclose(quantize_weight(on_grid, scheme, 0).dequantize(), on_grid, rtol=1e-6)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_weight(weight(), replace(INT4, weight_estimator="mse"), 0).values
    monkeypatch.setattr("edgeopt.calibration.weights._CHUNK", 40)
    np.testing.assert_array_equal(quantize_weight(weight(), replace(INT4, weight_estimator="mse"), 0).values, whole)


def test_float_weights_are_no_integers() -> None:
    with pytest.raises(ValueError, match="fp16"):
        quantize_weight(weight(), Scheme("fp16", "none"), 0)
