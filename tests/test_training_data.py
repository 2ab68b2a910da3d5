"""What the data of a training run prove."""

from __future__ import annotations

import pytest

from edgeopt.config import config_of
from edgeopt.errors import UsageError
from edgeopt.plan import plan_jobs
from edgeopt.progress import Silent
from edgeopt.tuning.qat import QatConfig, train, with_training_data
from edgeopt.types import LayerRules, Model


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
    config, findings = with_training_data(
        config_of({"model": "net.py:build", **given}), QatConfig("train.npz", validation)
    )
    assert [finding.code for finding in findings] == codes
    assert config.evaluation == evaluation
    assert config.calibration == given.get("calibration", "train.npz")


def test_a_recipe_that_would_undo_the_training_is_refused() -> None:
    keys = {"model": "net.py:build", "target": "android-int8", "calibration": "cal.npz", "recipe": ["equalize"]}
    (job,) = plan_jobs(config_of(keys))
    model = Model("net", None, None, (), (), {}, None, (), (), "0" * 64)
    with pytest.raises(UsageError, match=r"passes \(equalize\) would undo"):
        train(model, job, None, QatConfig("train.npz"), LayerRules(), 8, 0, Silent())
