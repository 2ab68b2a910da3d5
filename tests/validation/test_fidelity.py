import math

import numpy as np
import pytest

from edgeopt.errors import ConversionError
from edgeopt.validation.fidelity import SQNR_CAP_DB, Fidelity


def compare(*pairs):
    fidelity = Fidelity()
    for reference, candidate in pairs:
        fidelity.update({"y": np.asarray(reference)}, {"y": np.asarray(candidate)})
    (result,) = fidelity.results()
    return result


def test_sqnr_and_errors_are_those_of_all_samples_together():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(7, 1, 10)).astype(np.float32)
    candidate = reference + 0.01 * rng.normal(size=reference.shape).astype(np.float32)
    result = compare(*zip(reference, candidate, strict=True))
    error = reference.astype(np.float64) - candidate
    assert result.sqnr_db == pytest.approx(
        10 * math.log10((reference.astype(np.float64) ** 2).sum() / (error**2).sum())
    )
    assert result.max_abs_error == pytest.approx(np.abs(error).max())
    assert result.mean_abs_error == pytest.approx(np.abs(error).mean())


def test_agreement_counts_rows():
    reference = np.eye(4, dtype=np.float32)[None, [0, 1, 2, 3]]
    candidate = np.eye(4, dtype=np.float32)[None, [0, 1, 3, 2]]
    assert compare((reference, candidate)).agreement == 0.5
    assert compare((reference[0, :1], candidate[0, :1]), (reference[0, 2:3], candidate[0, 2:3])).agreement == 0.5


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 3, 4, 4), ()])
def test_regression_outputs_have_no_agreement(shape):
    assert compare((np.ones(shape, np.float32), np.ones(shape, np.float32))).agreement is None


def test_integer_outputs_are_compared_exactly():
    result = compare((np.array([1, 2, 3, 4]), np.array([1, 2, 3, 7])))
    assert result.agreement == 0.75
    assert result.sqnr_db is None
    assert result.max_abs_error == 3
    assert compare((np.array([True, False]), np.array([True, True]))).agreement == 0.5


def test_identical_outputs_are_capped_also_where_all_is_zero():
    assert compare((np.ones((1, 3)), np.ones((1, 3)))).sqnr_db == SQNR_CAP_DB
    assert compare((np.zeros((1, 3)), np.zeros((1, 3)))).sqnr_db == SQNR_CAP_DB
    assert compare((np.zeros((1, 3)), np.ones((1, 3)))).sqnr_db == -SQNR_CAP_DB


@pytest.mark.parametrize("masked", [-np.inf, np.finfo(np.float32).min, -1e9])
@pytest.mark.parametrize("given", [-np.inf, np.finfo(np.float32).min, -20.0])
def test_masked_logits_are_no_signal(masked, given):
    reference = np.array([[3.0, 1.0, masked]], dtype=np.float32)
    candidate = np.array([[3.1, 1.0, given]], dtype=np.float32)
    result = compare((reference, candidate))
    assert result.agreement == 1.0
    assert result.sqnr_db == pytest.approx(10 * math.log10(10 / 0.01), rel=1e-4)
    assert result.max_abs_error == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_candidate_that_is_not_finite_is_worthless(broken):
    good = np.array([[1.0, 2.0]])
    result = compare((good, good), (good, np.array([[broken, 2.0]])))
    assert result.sqnr_db == -SQNR_CAP_DB
    assert result.agreement == 0.5
    assert math.isfinite(result.max_abs_error)
    assert compare((good, np.full((1, 2), broken))).sqnr_db == -SQNR_CAP_DB


def test_a_reference_without_a_finite_value_tells_nothing():
    assert compare((np.full((1, 2), np.nan), np.ones((1, 2)))).sqnr_db is None


def test_huge_and_tiny_values_do_not_overflow():
    big = np.array([[1e8, 5e8]], dtype=np.float32)
    assert compare((big, big * np.float32(1.001))).sqnr_db == pytest.approx(60, abs=0.1)
    small = np.array([[1e-20, 5e-20]], dtype=np.float32)
    assert compare((small, small * np.float32(1.001))).sqnr_db == pytest.approx(60, abs=0.1)


def test_a_missing_output_or_another_shape_is_named():
    with pytest.raises(ConversionError, match="output 'y': is missing in the exported file"):
        Fidelity().update({"y": np.ones(1)}, {"z": np.ones(1)})
    with pytest.raises(ConversionError, match=r"output 'y': has shape \[1, 3\] in the exported file, \[3, 1\]"):
        Fidelity().update({"y": np.ones((3, 1))}, {"y": np.ones((1, 3))})


def test_empty_outputs_count_nothing():
    result = compare((np.ones((0, 3)), np.ones((0, 3))))
    assert result.agreement is None
    assert result.sqnr_db is None
