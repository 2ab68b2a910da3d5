"""The check of a device judges as the bundle's own check.py and as edgeopt do: one definition, three places."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from edgeopt.bundle import templates
from edgeopt.bundle.templates.device.devicecheck import figures
from edgeopt.types import Array
from edgeopt.validation import golden

Deviation = Callable[[Array, Array], float]


@pytest.fixture(scope="module")
def of_check_py() -> Deviation:
    """The arithmetic of the script that lies in every bundle."""
    spec = spec_from_file_location("check_of_a_bundle", Path(templates.__file__).parent / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Deviation, module.deviation)


def on_device(found: Array, wanted: Array) -> float:
    """From the bytes, as a device sends them."""
    dtype = wanted.dtype.name
    return figures.deviation(figures.decode(found.tobytes(), dtype), figures.decode(wanted.tobytes(), dtype))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool"])
def test_numbers_of_every_type(dtype: str, of_check_py: Deviation) -> None:
    random = np.random.default_rng(0)
    wanted = (random.standard_normal((3, 5)) * 50).astype(dtype)
    found = (wanted + random.standard_normal((3, 5)) * 2).astype(dtype)
    assert on_device(found, wanted) == pytest.approx(of_check_py(found, wanted), rel=1e-9)
    assert on_device(found, wanted) == pytest.approx(golden._difference(wanted, found), rel=1e-9)
    assert on_device(wanted, wanted) == 0.0


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ([0.5, 0.5], [1.0, 1.0]),
        ([-1.0, -1.0], [-3.0, -3.0]),
        ([0.5], [0.0]),
        ([np.inf, 1.0], [np.inf, 0.0]),
        ([np.inf, 1.0], [-np.inf, 1.0]),
        ([np.nan, 1.0], [np.nan, 3.0]),
        ([np.nan, 1.0], [0.0, 1.0]),
        ([1.0, 2.0], [np.inf, 2.0]),
        ([-1e308, 1e308], [1e308, -1e308]),  # the difference is more than a float64 holds
        ([], []),
    ],
)
def test_what_is_no_plain_number(found: list[float], wanted: list[float], of_check_py: Deviation) -> None:
    pair = np.array(found, np.float64), np.array(wanted, np.float64)
    with np.errstate(all="ignore"):
        assert on_device(*pair) == of_check_py(*pair)


def test_many_runs_are_judged_quickly() -> None:
    start = time.monotonic()
    assert figures.slowed_down([1.0 + k / 100_000 for k in range(100_000)]) is True
    assert time.monotonic() - start < 5


def test_ties_are_half_a_win() -> None:
    assert figures.slowed_down([1.0] * 50 + [1.0] * 50) is False
    assert figures.slowed_down([1.0] * 30 + [2.0] * 30) is True
