import math

import numpy as np
import pytest

from edgeopt.calibration.histogram import BINS_PER_SIDE, Density, Histogram


def filled(chunks):
    histogram = Histogram()
    for chunk in chunks:
        chunk = np.asarray(chunk, dtype=np.float32)
        histogram.add(chunk, float(np.abs(chunk).max()), 1)
    return histogram


@pytest.mark.parametrize("seed", range(8))
def test_counts_do_not_depend_on_the_order_of_the_data(seed):
    rng = np.random.default_rng(seed)
    chunks = [rng.normal(rng.normal(), 10.0 ** rng.integers(-6, 6), size=500) for _ in range(12)]
    once, other = filled(chunks), filled(chunks[::-1])
    whole = filled([np.concatenate(chunks)])
    for histogram in (other, whole):
        assert histogram.width == once.width
        assert (histogram.counts == once.counts).all()


def test_zeros_are_counted_apart_and_do_not_set_the_width():
    histogram = filled([np.zeros(10), [1e-3, 0.0, -1e-3]])
    assert histogram.zeros == 11
    assert histogram.counts.sum() == 2
    assert histogram.width < 1e-3 / 1024


def test_width_grows_past_the_last_merge():
    histogram = filled([[1e-20, -1e-20], [1e20]])
    assert histogram.counts.sum() == 3
    assert histogram.counts[BINS_PER_SIDE] == 1
    assert histogram.counts[BINS_PER_SIDE - 1] == 1


@pytest.mark.parametrize("largest", [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 1.0, 255.99998])
def test_every_float32_magnitude_has_a_bin(largest):
    histogram = filled([[largest, -largest, largest / 2]])
    assert histogram.counts.sum() == 3


@pytest.mark.parametrize("seed", range(6))
def test_density_accounts_for_every_value_and_folds_exactly(seed):
    rng = np.random.default_rng(seed)
    values = np.clip(rng.normal(rng.normal(), 2, size=5000), -rng.uniform(1, 3), 2.5).astype(np.float32)
    values[:100] = 0
    lo, hi = float(values.min()), float(values.max())
    at_lo, at_hi = int((values == lo).sum()), int((values == hi).sum())
    density = Density.of(filled([values]), lo, hi, at_lo, at_hi)
    assert density.total == values.size
    assert density.counts.min() >= 0
    assert density.all_counts().sum() + density.zeros == values.size
    folded = density.folded()
    magnitudes = np.abs(values[values != 0])
    assert folded.total == values.size
    assert folded.hi == magnitudes.max()
    inner = folded.edges[1:-1]
    below = np.cumsum(folded.all_counts())[:-1]
    # A negative value on a bin's edge lies in the bin above it when folded; there are few of those.
    assert np.abs(below - np.array([(magnitudes < edge).sum() for edge in inner])).max() <= 1
    assert math.isclose(inner[1] - inner[0], inner[-1] - inner[-2])


def test_density_of_one_sided_data_has_zero_as_its_end():
    for values in ([1.0, 3.0, 7.5], [-1.0, -3.0, -7.5]):
        array = np.array(values, dtype=np.float32)
        density = Density.of(filled([array]), min(values), max(values), 1, 1)
        assert density.lo == min(0.0, *values)
        assert density.hi == max(0.0, *values)
        assert density.total == 3
        assert density.folded().total == 3
