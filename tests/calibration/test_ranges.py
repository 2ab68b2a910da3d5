import math

import numpy as np
import pytest

from edgeopt.calibration.ranges import ActivationRanges, Range
from edgeopt.errors import DataError, UsageError
from edgeopt.types import EstimatorSpec

ESTIMATORS = ("min-max", "percentile", "entropy", "mse")


def relu6(x):
    return np.clip(x, 0, 6)


def hardswish(x):
    return x * relu6(x + 3) / 6


DISTRIBUTIONS = {
    "gauss": lambda rng, n: rng.normal(size=n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "heavy": lambda rng, n: rng.standard_t(2.5, size=n),
    "outlier": lambda rng, n: np.append(rng.normal(size=n - 1), 30.0),
    "relu": lambda rng, n: np.maximum(rng.normal(size=n), 0),
    "relu6": lambda rng, n: relu6(rng.normal(3, 4, size=n)),
    "hardswish": lambda rng, n: hardswish(4 * rng.normal(size=n)),
    "hardtanh": lambda rng, n: np.clip(rng.normal(0, 2, size=n), -1, 1),
    "negative": lambda rng, n: -np.abs(rng.normal(size=n)),
    "far-from-zero": lambda rng, n: rng.normal(100, 1, size=n),
}


def data(name, samples=8, size=20_000, seed=0):
    rng = np.random.default_rng(seed)
    return DISTRIBUTIONS[name](rng, samples * size).astype(np.float32).reshape(samples, size)


def estimate(samples, estimator, symmetric=False, bits=8, percentile=99.999):
    ranges = ActivationRanges(EstimatorSpec(estimator, percentile), symmetric=symmetric, bits=bits, total=len(samples))
    for sample in samples:
        ranges.update("t", sample)
        ranges.next_sample()
    return ranges.ranges()["t"]


def error(values, found, symmetric=False, bits=8):
    """Mean squared error of quantizing to that range, element by element."""
    steps = 2**bits - 2 if symmetric else 2**bits - 1
    step = (found.max - found.min) / steps
    first = np.rint(found.min / step)
    exact = np.asarray(values, dtype=np.float64)
    return np.mean((exact - step * np.clip(np.rint(exact / step), first, first + steps)) ** 2)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_ranges_lie_within_the_data_include_zero_and_do_not_depend_on_order(name, estimator, symmetric):
    samples = data(name, samples=6, size=5000)
    found = estimate(samples, estimator, symmetric)
    assert found.min <= 0 <= found.max
    assert found.min < found.max
    bound = np.abs(samples).max()
    assert found.min >= (-bound if symmetric else min(samples.min(), 0))
    assert found.max <= (bound if symmetric else max(samples.max(), 0))
    if symmetric:
        assert found.min == -found.max
    assert estimate(samples[::-1], estimator, symmetric) == found


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_min_max_is_exact_also_for_tensors_that_are_thinned_out(name):
    samples = data(name, samples=3, size=150_000)
    assert estimate(samples, "min-max") == Range(min(float(samples.min()), 0.0), max(float(samples.max()), 0.0))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_is_never_worse_than_min_max_and_near_the_best_of_a_grid(name, symmetric):
    samples = data(name)
    full = estimate(samples, "min-max", symmetric)
    chosen = estimate(samples, "mse", symmetric)
    own = error(samples, chosen, symmetric)
    assert own <= error(samples, full, symmetric) * 1.01
    rivals = [Range(full.min * f, full.max * f) for f in np.linspace(0.05, 1, 60)]
    rivals += [Range(full.min, full.max * f) for f in np.linspace(0.05, 1, 30)] * (not symmetric)
    assert own <= min(error(samples, rival, symmetric) for rival in rivals if rival.min < rival.max) * 1.05


@pytest.mark.parametrize(("name", "samples"), [("heavy", 8), ("laplace", 8), ("outlier", 60)])
def test_mse_gains_a_lot_where_tails_are_heavy(name, samples):
    values = data(name, samples)
    assert error(values, estimate(values, "mse")) < 0.85 * error(values, estimate(values, "min-max"))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_natural_bounds_are_kept(estimator, symmetric):
    assert estimate(data("relu6"), estimator, symmetric) == Range(-6.0 if symmetric else 0.0, 6.0)
    assert estimate(data("hardtanh"), estimator, symmetric) == Range(-1.0, 1.0)
    assert estimate(data("relu"), estimator).min == 0.0


@pytest.mark.parametrize("estimator", ["entropy", "mse"])
def test_the_short_end_of_hardswish_stays(estimator):
    found = estimate(data("hardswish"), estimator)
    assert found.min == pytest.approx(-0.375, abs=1e-4)
    assert 8 < found.max < 22


@pytest.mark.parametrize("keep", [90.0, 99.0, 99.9])
@pytest.mark.parametrize("name", ["gauss", "laplace", "hardswish"])
def test_percentile_is_right_within_a_bin(name, keep):
    samples = data(name)
    values = samples.astype(np.float64).ravel()
    width = 2 * np.abs(values).max() / 4096
    found = estimate(samples, "percentile", percentile=keep)
    cut = values.size * (1 - keep / 100) / 2
    assert (values > found.max + width).sum() <= cut <= (values > found.max - width).sum()
    assert (values < found.min - width).sum() <= cut <= (values < found.min + width).sum()
    bound = estimate(samples, "percentile", symmetric=True, percentile=keep).max
    assert (np.abs(values) > bound + width).sum() <= 2 * cut <= (np.abs(values) > bound - width).sum()


def test_percentile_of_one_sided_data_cuts_one_tail():
    values = data("relu")
    found = estimate(values, "percentile", percentile=99.0)
    assert found.min == 0
    assert found.max == pytest.approx(np.percentile(values, 99.0), abs=0.003)


def test_percentile_of_a_nearly_always_zero_tensor_is_its_range():
    values = np.zeros((4, 10_000), dtype=np.float32)
    values[2, 7] = 3.0
    assert estimate(values, "percentile", percentile=99.0) == Range(0.0, 3.0)


def test_percentile_100_keeps_everything():
    values = data("gauss")
    assert estimate(values, "percentile", percentile=100.0) == estimate(values, "min-max")


@pytest.mark.parametrize("percentile", [0.0, 50.0, 100.1, math.nan])
def test_a_percentile_out_of_bounds_is_refused(percentile):
    with pytest.raises(UsageError, match="percentile"):
        ActivationRanges(EstimatorSpec("percentile", percentile), symmetric=False, total=1)


def test_entropy_on_a_gaussian_keeps_nearly_all_and_cuts_an_outlier():
    assert 3.0 < estimate(data("gauss"), "entropy").max < 5.0
    assert estimate(data("outlier", samples=50), "entropy", symmetric=True).max < 15.0


def test_entropy_keeps_data_that_lie_far_from_zero():
    # Scaled to P's total, Q would call a threshold below nearly all values perfect.
    values = data("far-from-zero")
    assert estimate(values, "entropy").max > 102


def test_more_bits_need_less_clipping():
    values = data("heavy")
    assert estimate(values, "mse", bits=4).max < estimate(values, "mse", bits=8).max < 1.0001 * np.abs(values).max()
    assert estimate(values, "mse", bits=16).max > 0.9 * values.max()


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "int32", "int64", "uint8", "bool"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_other_types_are_taken(dtype, estimator):
    values = np.tile(np.arange(100), 20).astype(dtype)
    found = estimate([values], estimator)
    assert found.min == 0
    assert found.max <= float(values.max())


def test_any_shape_layout_and_emptiness_are_taken():
    ranges = ActivationRanges(EstimatorSpec("mse"), symmetric=False, total=1)
    image = np.random.default_rng(0).normal(size=(1, 8, 6, 6)).astype(np.float32)
    for name, values in {
        "a": image,
        "b": image.transpose(0, 2, 3, 1),
        "scalar": np.float32(3.0),
        "none": image[:0],
    }.items():
        ranges.update(name, np.asarray(values))
    found = ranges.ranges()
    assert found["a"] == found["b"]
    assert found["scalar"] == Range(0.0, 3.0)
    assert found["none"].min < found["none"].max
    assert [(f.code, f.where) for f in ranges.findings()] == [
        ("constant-activation", "scalar"),
        ("constant-activation", "none"),
    ]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-12])
def test_a_tensor_that_is_always_zero_gets_a_usable_range(estimator, symmetric, value):
    found = estimate([np.full(100, value, dtype=np.float32)], estimator, symmetric)
    assert found.max == pytest.approx((127 if symmetric else 255) * 2**-12)
    assert found.min == (-found.max if symmetric else 0.0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_constant_gets_a_range_that_holds_it(estimator):
    assert estimate([np.full(100, 5.0)], estimator) == Range(0.0, 5.0)
    assert estimate([np.full(100, -5.0)], estimator) == Range(-5.0, 0.0)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf"), (1e39, "Inf")])
def test_what_is_not_finite_is_named(value, word):
    ranges = ActivationRanges(EstimatorSpec(), symmetric=False, total=2)
    ranges.update("ok", np.ones(4))
    ranges.next_sample()
    with pytest.raises(DataError, match=rf"activation 'conv1': holds {word} in calibration sample 1"):
        ranges.update("conv1", np.array([1.0, value]))


def codes(samples):
    ranges = ActivationRanges(EstimatorSpec(), symmetric=False, total=len(samples))
    for sample in samples:
        ranges.update("t", sample)
        ranges.next_sample()
    return [finding.code for finding in ranges.findings()]


@pytest.mark.parametrize("name", ["gauss", "heavy", "relu", "relu6", "hardswish", "far-from-zero"])
def test_healthy_activations_raise_no_finding(name):
    assert codes(data(name, samples=16)) == []


def test_saturation_is_found_on_bounds_other_than_zero():
    ranges = ActivationRanges(EstimatorSpec(), symmetric=False, total=8)
    for sample in data("hardtanh"):
        ranges.update("t", sample)
    low, high = ranges.findings()
    assert low.code == high.code == "saturated-activation"
    assert "31% of its values lie exactly on its bound -1" in low.message


def test_a_background_is_no_saturation():
    rng = np.random.default_rng(0)
    picture = np.where(rng.random(1000) < 0.5, -1.0, rng.uniform(-1.0, 1.0, 1000))
    assert codes([picture] * 8) == []
    assert codes([-picture] * 8) == []


def test_halves_that_differ_are_found():
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=100) * (1 if i < 8 else 6) for i in range(16)]
    assert codes(samples) == ["activation-halves-differ"]
    assert codes(samples[::2] + samples[1::2]) == []


def test_attention_masks_are_found():
    assert codes([np.array([0.0, 1.0, np.finfo(np.float32).min])] * 4) == [
        "mask-like-activation",
        "saturated-activation",
        "saturated-activation",
    ]


def test_memory_does_not_grow_with_the_number_of_samples():
    import tracemalloc

    rng = np.random.default_rng(0)
    ranges = ActivationRanges(EstimatorSpec("mse"), symmetric=False, total=400)
    values = rng.normal(size=10_000).astype(np.float32)
    for _ in range(20):
        ranges.update("t", values)
    tracemalloc.start()
    for _ in range(200):
        ranges.update("t", values)
        ranges.next_sample()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 150_000
