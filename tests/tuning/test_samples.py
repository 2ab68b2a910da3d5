"""What a search is scored on, and what it must not be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeopt.config import config_of
from edgeopt.plan import open_data, plan_jobs
from edgeopt.progress import Silent
from edgeopt.tuning.samples import tuning_samples
from edgeopt.types import Model, TensorSpec

MODEL = Model(
    "net", None, None, (TensorSpec("x", (1, 4), "float32"),), (TensorSpec("y", (1, 3), "float32"),),
    {"x": np.zeros((1, 4), np.float32)}, None, (), (), "0" * 64,
)  # fmt: skip


def _rows(folder: Path, name: str, start: int, stop: int) -> str:
    np.savez(folder / name, x=np.arange(start * 4, stop * 4, dtype=np.float32).reshape(-1, 4))
    return str(folder / name)


def _chosen(**values: str) -> tuple[set[float], set[float], list[str]]:
    """First values of the tuning samples and of the evaluation samples, and the findings."""
    config = config_of({"model": "net.onnx", "target": ["android-onnx-int8"], **values})
    data = open_data(config, MODEL, plan_jobs(config))
    samples, findings = tuning_samples(config, MODEL, data, Silent())
    mine, evaluated = ({float(s.inputs["x"].flat[0]) for s in each} for each in (samples, data.evaluation))
    return mine, evaluated, [finding.code for finding in findings]


@pytest.mark.parametrize("evaluation", [None, "same", "copy"])
def test_tuning_samples_are_no_evaluation_samples(tmp_path: Path, evaluation: str | None) -> None:
    # Regression: with the evaluation set given, nothing kept its samples out, the same file or not.
    calibration = _rows(tmp_path, "a.npz", 0, 200)
    values = {"calibration": calibration, "num_calibration_samples": "50", "num_evaluation_samples": "80"}
    if evaluation is not None:
        values["evaluation"] = calibration if evaluation == "same" else _rows(tmp_path, "b.npz", 0, 200)
    mine, evaluated, findings = _chosen(**values)
    assert len(evaluated) == 80
    assert len(mine) >= 32
    assert not mine & evaluated
    assert findings == []


def test_where_all_samples_are_evaluated_the_search_says_so(tmp_path: Path) -> None:
    calibration = _rows(tmp_path, "a.npz", 0, 200)
    for evaluation in (calibration, _rows(tmp_path, "b.npz", 0, 200)):
        mine, evaluated, findings = _chosen(
            calibration=calibration, evaluation=evaluation, num_calibration_samples="50"
        )
        assert len(mine) == 50
        assert mine <= evaluated
        assert findings == ["tuned-on-evaluation-data"]


def test_calibration_samples_that_are_not_evaluated_are_next_best(tmp_path: Path) -> None:
    calibration = _rows(tmp_path, "a.npz", 0, 60)
    evaluation = _rows(tmp_path, "b.npz", 50, 100)
    mine, evaluated, findings = _chosen(calibration=calibration, evaluation=evaluation, num_calibration_samples="60")
    assert len(mine) == 50
    assert not mine & evaluated
    assert findings == []


def test_the_example_input_is_tuned_and_proven_on(tmp_path: Path) -> None:
    target = ["android-onnx-int8-dynamic"]
    assert _chosen(target=target)[2] == ["tuned-on-evaluation-data"]  # type: ignore[arg-type]
    evaluation = _rows(tmp_path, "b.npz", 1, 50)
    assert _chosen(target=target, evaluation=evaluation)[2] == []  # type: ignore[arg-type]
