"""Frozen values as JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest

from edgeopt.errors import UsageError
from edgeopt.json_data import dumps, from_plain, loads
from edgeopt.types import EstimatorSpec, StepRecord


def test_numbers_of_every_kind() -> None:
    text = dumps({"inf": math.inf, "minus": -math.inf, "nan": math.nan, "np": np.float32(0.5), "n": np.int64(3)})
    assert json.loads(text) == {"inf": math.inf, "minus": -math.inf, "nan": None, "np": 0.5, "n": 3}
    assert "Infinity" not in text
    assert "NaN" not in text


def test_equal_values_give_equal_bytes() -> None:
    assert dumps(StepRecord("a", {"x": 1, "y": 0.1})) == dumps(StepRecord("a", {"y": 0.1, "x": 1}))
    assert dumps({}).endswith("}\n")


def test_settings_keep_their_types() -> None:
    record = StepRecord("a", {"flag": True, "count": 1, "share": 1.0, "name": "1", "none": None})
    back = from_plain(StepRecord, loads(dumps(record), "x"), "x")
    assert back == record
    assert {key: type(value) for key, value in back.config.items()} == {
        key: type(value) for key, value in record.config.items()
    }


def test_what_can_not_be_written() -> None:
    @dataclass
    class Odd:
        thing: object

    with pytest.raises(TypeError, match="object"):
        dumps(Odd(object()))


def test_mistakes_name_the_place_and_the_key() -> None:
    with pytest.raises(UsageError, match=r"file\.json: name: Input should be 'min-max'"):
        from_plain(EstimatorSpec, {"name": "avg"}, "file.json")
    with pytest.raises(UsageError, match=r"file\.json: is not valid JSON"):
        loads(b"\xff", "file.json")
