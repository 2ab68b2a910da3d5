from itertools import product

import numpy as np
import pytest

from edgeopt.calibration.codebooks import code_weight
from edgeopt.types import Array, Scheme


def weight(shape: tuple[int, ...] = (6, 5, 3, 3)) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def scheme(values: str, precision: str = "w4", granularity: str = "per-channel") -> Scheme:
    return Scheme(precision, "none", granularity, weight_values=values)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", ["logarithmic", "k-means"])
def test_shapes_and_nearest_entries(values: str) -> None:
    shapes = {"per-tensor": (), "per-channel": (6,), "per-group": (6, 2)}
    for precision, granularity in product(("w4", "w8"), shapes):
        found = code_weight(weight(), scheme(values, precision, granularity), 0)
        entries = 16 if precision == "w4" else 256
        assert found.table.shape == (*shapes[granularity], entries)
        assert found.table.dtype == np.float32
        assert found.codes.dtype == np.uint8
        assert found.codes.shape == weight().shape
        assert int(found.codes.max()) < entries
        assert (np.diff(found.table) >= 0).all()
        table = found.table.reshape(-1, entries)[0]
        first = weight().reshape(6, -1)[0, :8]
        np.testing.assert_allclose(
            np.abs(found.expand().reshape(6, -1)[0, :8] - first), np.abs(first[:, None] - table).min(axis=1), atol=1e-7
        )


def test_logarithmic_entries_are_zero_and_signed_powers_of_two() -> None:
    found = code_weight(weight(), scheme("logarithmic"), 0)
    mantissa, _ = np.frexp(found.expand())
    assert set(np.unique(np.abs(mantissa))) <= {0.0, 0.5}
    assert (found.table == -found.table[:, ::-1]).all()


def test_k_means_is_exact_with_few_values_and_beats_even_steps_otherwise() -> None:
    few = np.array([[0.0, 1.5, -2.25, 1.5, 0.0, 7.0]], dtype=np.float32)
    np.testing.assert_array_equal(code_weight(few, scheme("k-means"), 0).expand(), few)
    real = weight((4, 2000))
    rest = real - code_weight(real, scheme("k-means", granularity="per-tensor"), 0).expand()
    even = np.linspace(real.min(), real.max(), 16)
    nearest = np.abs(real.reshape(-1, 1) - even).min(axis=1)
    assert (rest**2).sum() < 0.6 * (nearest**2).sum()


def test_k_means_gives_pruned_weights_one_entry() -> None:
    real = weight((1, 4000))
    real[0, :3000] = 0
    found = code_weight(real, scheme("k-means", granularity="per-tensor"), 0)
    assert len(np.unique(found.expand()[0, :3000])) == 1
    assert len(np.unique(found.codes)) == 16


@pytest.mark.parametrize("values", ["logarithmic", "k-means"])
def test_zero_and_axis(values: str) -> None:
    assert not code_weight(np.zeros((2, 3), dtype=np.float32), scheme(values), 0).expand().any()
    real = weight((4, 6))
    across = code_weight(np.ascontiguousarray(real.T), scheme(values), 1)
    np.testing.assert_array_equal(across.expand().T, code_weight(real, scheme(values), 0).expand())
    assert code_weight(real, scheme(values), None).table.shape == (16,)


def test_linear_weights_have_no_table() -> None:
    with pytest.raises(ValueError, match="linear"):
        code_weight(weight(), Scheme("w4", "none"), 0)
