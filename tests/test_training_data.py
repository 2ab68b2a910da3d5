"""What the data of a training run prove."""

from __future__ import annotations

import pytest

from edgeopt.config import config_of
from edgeopt.plan import with_training_data


@pytest.mark.parametrize(
    ("given", "validation", "evaluation", "codes"),
    [
        ({}, None, None, ["evaluated-on-training-data"]),
        ({}, "val.npz", "val.npz", ["evaluated-on-validation-data"]),
        ({"calibration": "cal.npz"}, "val.npz", "val.npz", ["evaluated-on-validation-data"]),
        ({"calibration": "cal.npz"}, None, None, []),  # what the calibration data have to spare, which no epoch saw
        ({"calibration": "train.npz"}, None, None, ["evaluated-on-training-data"]),
        ({"evaluation": "test.npz"}, None, "test.npz", []),
        ({"evaluation": "train.npz"}, "val.npz", "train.npz", ["evaluated-on-training-data"]),
        ({"evaluation": "val.npz"}, "val.npz", "val.npz", ["evaluated-on-validation-data"]),
        ({"evaluation": "test.npz"}, "val.npz", "test.npz", []),
    ],
)
def test_a_proof_on_data_that_shaped_the_model_is_told(
    given: dict[str, object], validation: str | None, evaluation: str | None, codes: list[str]
) -> None:
    keys = {"model": "net.py:build", "train": "train.npz", "validation": validation}
    config, findings = with_training_data(config_of({**keys, **given}))
    assert [finding.code for finding in findings] == codes
    assert config.evaluation == evaluation
    assert config.calibration == given.get("calibration", "train.npz")


def test_without_training_data_nothing_changes() -> None:
    config = config_of({"model": "net.py:build", "evaluation": "test.npz"})
    assert with_training_data(config) == (config, ())
