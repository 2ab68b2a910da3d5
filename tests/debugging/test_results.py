"""Figures of a layer, and which layer is the first to stray."""

from __future__ import annotations

import numpy as np
import pytest

from edgeopt.debugging.results import Divergence, LayerError, against_inputs, first_divergence
from edgeopt.debugging.sums import ErrorSums


def layer(sqnr_db: float, *inputs: int, before: float | None = None) -> LayerError:
    drop = None if before is None else before - sqnr_db
    return LayerError("l", 0, "Conv", "Conv", sqnr_db, 0.0, 0.0, (0, 1), (0, 1), before, drop, inputs, 0.0)


def test_figures_do_not_depend_on_how_the_samples_come() -> None:
    random = np.random.default_rng(0)
    a = random.standard_normal((6, 5)).astype(np.float32)
    b = a + np.float32(0.5)
    whole, parts = ErrorSums(), ErrorSums()
    whole.add(a, b)
    for x, y in zip(a, b, strict=True):
        parts.add(x, y)
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    assert whole.sqnr_db == pytest.approx(10 * np.log10(np.square(a).sum() / (30 * 0.25)), abs=1e-4)
    assert parts.mean_error == pytest.approx(0.5, abs=1e-6)
    assert parts.largest == pytest.approx(0.5, abs=1e-6)
    assert (parts.range_a, parts.range_b) == ((a.min(), a.max()), (b.min(), b.max()))


@pytest.mark.parametrize(
    ("a", "b", "sqnr_db"),
    [
        ([1.0, 2.0], [1.0, 2.0], 200.0),
        ([0.0, 0.0], [0.0, 0.0], 200.0),
        ([0.0, 0.0], [0.0, 1.0], -200.0),
        ([1.0, 2.0], [1.0, np.nan], -200.0),
        ([1.0, 2.0], [1.0, np.inf], -200.0),
        ([1.0, -np.inf], [1.0, -128.0], 200.0),
        ([1.0, -1e10], [1.0, -5.0], 200.0),
        ([], [], 200.0),
    ],
)
def test_edges(a: list[float], b: list[float], sqnr_db: float) -> None:
    sums = ErrorSums()
    sums.add(np.array(a, np.float32), np.array(b, np.float32))
    assert sums.sqnr_db == sqnr_db
    assert all(np.isfinite([*sums.range_a, *sums.range_b, sums.mean_error, sums.largest]))


def test_error_is_split_into_inherited_and_introduced() -> None:
    assert against_inputs(20.0, []) == (None, None, 1.0)
    assert against_inputs(200.0, []) == (None, None, 0.0)
    worst, drop, introduced = against_inputs(20.0, [40.0, 23.0])
    assert (worst, drop) == (23.0, 3.0)
    assert introduced == pytest.approx(0.5, abs=0.01)
    assert against_inputs(25.0, [20.0]) == (20.0, -5.0, 0.0)


def test_first_divergence_is_the_first_below_the_threshold() -> None:
    layers = [layer(30), layer(12, 0, before=30), layer(5, 1, before=12), layer(3, 2, before=5)]
    assert first_divergence(layers, 10, 20) == Divergence(2, "low")
    assert first_divergence(layers, 10, 15) == Divergence(1, "drop")
    assert first_divergence(layers, 2, 50) is None


def test_a_drop_from_high_to_high_is_none() -> None:
    assert first_divergence([layer(120), layer(45, 0, before=120)], 10, 10) is None


def test_a_layer_that_everything_recovers_from_is_written_differently() -> None:
    layers = [layer(30), layer(-27, 0, before=30), layer(28, 0, 1, before=-27)]
    assert first_divergence(layers, 10, 10) is None
    assert first_divergence(layers[:2], 10, 10) == Divergence(1, "low")
