"""Students made of a real network, taught by it, and judged by their exported files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt.compression.steps import Distil, Goal
from edgeopt.config import config_of
from edgeopt.datasets import open_dataset, select
from edgeopt.datasets.base import Dataset
from edgeopt.plan import Job, plan_jobs
from edgeopt.progress import Silent
from edgeopt.runtimes import load_runtime
from edgeopt.sources import SourceOptions, load_model
from edgeopt.training.config import Teaching, TrainingConfig
from edgeopt.tuning.context import StepContext
from edgeopt.tuning.distil import distil
from edgeopt.tuning.student_search import CostOf
from edgeopt.types import Artifact, LayerRules, Model, Sample
from edgeopt.workbench import Workbench

pytestmark = pytest.mark.e2e

DIGITS = "edgeopt.examples.digits"
CONFIG = TrainingConfig(epochs=3, batch_size=64, learning_rate=5e-3)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(f"{DIGITS}:model", SourceOptions())


def opened(model: Model, name: str) -> Dataset:
    return open_dataset(f"{DIGITS}:{name}", model.inputs, model.preprocessing)


def context_of(model: Model, folder: Path, target: str) -> StepContext:
    (job,) = plan_jobs(config_of({"example": "digits", "target": target, "calibration": "unused.npz"}))
    training = select(opened(model, "training_set"), 640, 0)
    calibration = select(training, 32, 0)
    folder.mkdir()
    bench = Workbench(model, calibration, LayerRules(), 0, folder, Silent())

    def samples() -> Iterator[Sample]:
        return iter(calibration)

    inputs = replace(bench.pass_inputs(job.scheme, job.estimator), samples=samples, count=len(calibration))
    validation = select(opened(model, "held_out_set"), 120, 0)
    return StepContext(job, model, training, validation, inputs, bench.variant, folder / "state", 1)


def exported(model: Model, context: StepContext) -> Artifact:
    job: Job = context.job
    return context.bench(model).quantized_artifact(job.target.format, job.scheme, job.estimator)[0]


def accuracy(artifact: Artifact, context: StepContext) -> float:
    assert context.validation is not None
    with load_runtime(context.job.target.runtimes[0]).open(artifact.path, artifact.signature) as session:
        found = [session.run(sample.inputs)["logits"].argmax() == sample.label for sample in context.validation]
    return float(np.mean(found))


@pytest.mark.parametrize("target", ["android-onnx-int8", "android-int8"])
def test_a_derived_student_is_small_and_good_in_its_file(model: Model, target: str, tmp_path: Path) -> None:
    context = context_of(model, tmp_path / "run", target)
    teaching = Teaching(loss="distillation", features=("3=3", "4"))
    student = distil(model, Distil(student="derived", width=0.5, training=CONFIG, teaching=teaching), context)
    files = [exported(some, context) for some in (model, student)]
    scores = [accuracy(file, context) for file in files]
    print(f"{target}: bytes {[file.size_bytes for file in files]}, accuracy {scores}")
    assert files[1].size_bytes < 0.5 * files[0].size_bytes
    assert scores[1] > scores[0] - 0.05
    assert [step.step for step in files[1].history][:3] == ["load", "prune", "distil"]


def test_a_search_is_by_the_exported_file(model: Model, tmp_path: Path) -> None:
    context = context_of(model, tmp_path / "run", "android-onnx-int8")
    goal = Goal("latency", 0.6, is_share=True)
    student = distil(model, Distil(student="search", to=goal, training=replace(CONFIG, epochs=1)), context)
    made = student.history[-2]
    print(made.config["tried"])
    assert made.step == "prune"
    assert float(str(made.config["tried"]).rpartition("cost ")[2]) <= 0.6
    assert not any((tmp_path / "run").glob("variant-*/*"))


def test_a_size_is_that_of_the_file(model: Model, tmp_path: Path) -> None:
    context = context_of(model, tmp_path / "run", "android-onnx-int8")
    with CostOf(model, Goal("size", 1.0), context) as cost_of:
        assert cost_of(model) == exported(model, context).size_bytes
