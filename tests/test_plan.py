"""What is decided or refused before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt.compression.steps import Prune, Qat
from edgeopt.config import config_of
from edgeopt.errors import ConfigError, MissingError, UsageError
from edgeopt.plan import Data, Job, load, metric_of, open_data, plan_jobs, with_example, with_preprocessing
from edgeopt.runtimes.onnxruntime import OnnxRuntime
from edgeopt.runtimes.openvino import OpenVinoRuntime
from edgeopt.types import ImagePreprocessing, Model, OpenVino, TensorSpec


def _model(**changes: object) -> Model:
    values: dict[str, object] = {
        "name": "net",
        "module": None,
        "native": None,
        "inputs": (TensorSpec("x", (1, 4), "float32"),),
        "outputs": (TensorSpec("y", (1, 3), "float32"),),
        "example_inputs": {"x": np.zeros((1, 4), np.float32)},
        "preprocessing": None,
        "labels": (),
        "history": (),
        "source_sha256": "0" * 64,
    }
    return Model(**(values | changes))  # type: ignore[arg-type]


def _rows(folder: Path, count: int, labelled: bool = True) -> str:
    arrays = {"x": np.arange(count * 4, dtype=np.float32).reshape(count, 4)}
    if labelled:
        arrays["y"] = np.arange(count) % 3
    np.savez(folder / "rows.npz", **arrays)
    return str(folder / "rows.npz")


def test_an_example_fills_in_model_and_data() -> None:
    config = with_example(config_of({"example": "digits"}))
    assert config.model == "edgeopt.examples.digits:model"
    assert config.evaluation == "edgeopt.examples.digits:held_out_set"
    assert with_example(config) == config


def test_own_calibration_data_replace_both_sets_of_an_example() -> None:
    config = with_example(config_of({"example": "digits", "calibration": "mine.npz"}))
    assert (config.calibration, config.evaluation) == ("mine.npz", None)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "no model given"),
        ({"example": "digit"}, "did you mean 'digits'"),
    ],
)
def test_unusable_requests_are_refused(given: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        with_example(config_of(given))


def test_a_static_target_needs_data() -> None:
    with pytest.raises(UsageError, match="needs sample data"):
        plan_jobs(config_of({"model": "a.onnx", "target": ["android-onnx-int8"]}))


def test_a_dynamic_target_needs_none() -> None:
    (job,) = plan_jobs(config_of({"model": "a.onnx", "target": ["android-onnx-int8-dynamic"]}))
    assert not job.scheme.needs_calibration


def test_the_same_target_twice_is_one_job() -> None:
    target = "android-onnx-fp32"
    assert len(plan_jobs(config_of({"model": "a.onnx", "target": [target, target]}))) == 1


def test_flags_win_over_the_target() -> None:
    options = {"model": "a.onnx", "target": ["android-onnx-int8"], "calibration": "c", "io": "int8"}
    (job,) = plan_jobs(config_of({**options, "estimator": "entropy", "min_speedup": "1.5", "device": "pixel-4"}))
    assert (job.scheme.io, job.estimator.name, job.gates.min_speedup) == ("int8", "entropy", 1.5)
    assert job.device.name == "pixel-4"
    assert job.gates.max_accuracy_drop == 0.01


def test_a_missing_runtime_is_found_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "unavailable", lambda _self: "not here; pip install onnxruntime")
    with pytest.raises(MissingError, match="pip install onnxruntime"):
        plan_jobs(config_of({"model": "a.onnx", "target": ["android-onnx-fp32"]}))


@pytest.mark.parametrize(("runtime", "text"), [("tflite", "unknown runtime 'tflite'"), ("litert", "does not run")])
def test_a_users_target_with_a_wrong_runtime_is_refused(tmp_path: Path, runtime: str, text: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "android-onnx-fp32"\nruntimes = ["{runtime}"]\n')
    with pytest.raises(ConfigError, match=text):
        plan_jobs(config_of({"model": "a.onnx", "target": [str(path)]}))


def test_two_targets_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "mine.toml", tmp_path / "sub" / "mine.toml"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text('extends = "android-onnx-fp32"\n')
    with pytest.raises(ConfigError, match="two targets are called 'mine'"):
        plan_jobs(config_of({"model": "a.onnx", "target": [str(path) for path in paths]}))


def _data(model: Model, **options: object) -> Data:
    config = config_of({"model": "a.onnx", "target": ["android-onnx-int8"], **options})
    return open_data(config, model, plan_jobs(config))


def test_what_calibration_leaves_is_held_out(tmp_path: Path) -> None:
    data = _data(_model(), calibration=_rows(tmp_path, 20), num_calibration_samples=12)
    assert data.calibration is not None
    assert (len(data.calibration), len(data.evaluation), data.origin) == (12, 8, "held out of the calibration set")
    used = {sample.name for sample in data.calibration}
    assert used.isdisjoint(sample.name for sample in data.evaluation)


def test_folders_are_matched_to_the_models_labels_by_name(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    model = _model(inputs=(TensorSpec("image", (1, 3, 8, 8), "float32", "NCHW"),), labels=("dog", "cat"))
    labels = {s.name: s.label for s in _data(model, calibration=str(tmp_path)).evaluation}
    assert labels == {"cat/a.png": 1, "dog/a.png": 0}


def test_the_seed_decides_which(tmp_path: Path) -> None:
    rows = _rows(tmp_path, 30)
    chosen = [
        [s.name for s in _data(_model(), calibration=rows, num_calibration_samples=6, seed=seed).evaluation]
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_evaluating_on_calibration_data_is_said(tmp_path: Path) -> None:
    data = _data(_model(), calibration=_rows(tmp_path, 5))
    assert data.origin == "calibration set"
    assert [f.code for f in data.findings] == ["evaluated-on-calibration-data"]


def test_without_data_the_example_input_stands_in() -> None:
    config = config_of({"model": "a.onnx", "target": ["android-onnx-fp32"]})
    data = open_data(config, _model(), plan_jobs(config))
    assert (data.calibration, len(data.evaluation), data.origin) == (None, 1, "example input")
    assert [f.code for f in data.findings] == ["evaluated-on-example-input"]
    assert data.evaluation.fingerprint() == data.evaluation.fingerprint()


def test_top1_is_the_default_for_classes_only(tmp_path: Path) -> None:
    config = config_of({"model": "a.onnx"})
    labelled = _data(_model(), calibration=_rows(tmp_path, 5)).evaluation
    assert metric_of(config, _model(), labelled) is not None
    regressor = _model(outputs=(TensorSpec("y", (1, 1), "float32"),))
    assert metric_of(config, regressor, labelled) is None
    unlabelled = _data(_model(), calibration=_rows(tmp_path, 5, labelled=False)).evaluation
    assert metric_of(config, _model(), unlabelled) is None


def test_a_limit_on_accuracy_needs_labels(tmp_path: Path) -> None:
    unlabelled = _data(_model(), calibration=_rows(tmp_path, 5, labelled=False)).evaluation
    with pytest.raises(UsageError, match=r"max-accuracy-drop: can't be measured.*--evaluation"):
        metric_of(config_of({"model": "a.onnx", "max_accuracy_drop": 0.01}), _model(), unlabelled)


def test_derived_preprocessing_travels_with_the_model(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    model = _model(inputs=(TensorSpec("image", (1, 3, 8, 8), "float32", "NCHW"),))
    config = config_of({"model": "a.onnx", "evaluation": str(tmp_path)})
    found = with_preprocessing(config, model).preprocessing
    assert isinstance(found, ImagePreprocessing)
    assert (found.height, found.width) == (8, 8)


def test_unreadable_labels_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"labels\.txt: can't be read"):
        load(config_of({"model": "a.onnx", "labels": tmp_path / "labels.txt"}))


def test_an_example_brings_its_training_data_where_a_step_can_use_them() -> None:
    digits = config_of({"example": "digits"})
    assert with_example(digits).train is None
    pruned = replace(digits, step=(Prune(),))
    assert with_example(pruned).train == "edgeopt.examples.digits:training_set"
    assert with_example(replace(pruned, train="t.npz")).train == "t.npz"
    assert with_example(replace(pruned, calibration="c.npz")).train is None


def test_a_target_demands_fidelity_of_quantization_but_not_of_smaller_networks() -> None:
    config = config_of({"model": "a.onnx", "target": "android-int8", "calibration": "c.npz"})
    assert plan_jobs(config)[0].gates.min_sqnr_db == 10
    assert plan_jobs(replace(config, step=(Qat(),)))[0].gates.min_sqnr_db == 10
    pruned = replace(config, step=(Prune(), Qat()))
    assert plan_jobs(pruned)[0].gates.min_sqnr_db is None
    assert plan_jobs(pruned)[0].gates.max_accuracy_drop == 0.01
    assert plan_jobs(replace(pruned, min_sqnr_db=5.0))[0].gates.min_sqnr_db == 5.0


class Vendor:
    """An accelerator whose tools are missing or not."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    def unavailable(self) -> str | None:
        return self.reason


def _npu_target(folder: Path, **keys: str) -> str:
    """An ONNX target for OpenVINO, which any device can have, proven on this machine's ONNX Runtime."""
    lines = {"extends": '"android-onnx-int8"', "accelerator": '"openvino"', **keys}
    path = folder / "mine.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    return str(path)


def _job_for(target: str, **options: object) -> Job:
    (job,) = plan_jobs(config_of({"model": "a.onnx", "target": [target], "calibration": "c", **options}))
    return job


def test_the_scheme_gets_the_devices_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeopt.plan.load_accelerator", lambda *_: Vendor(None))
    job = _job_for(_npu_target(tmp_path))
    assert job.scheme.npu == OpenVino(("CPU",))


def test_a_device_without_the_accelerator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"device 'pixel-6': has no ethos-u55, which target 'mine' is for"):
        _job_for(_npu_target(tmp_path, accelerator='"ethos-u55"'))


def test_missing_tools_of_an_accelerator_are_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeopt.plan.load_accelerator", lambda *_: Vendor("not here; pip install it"))
    with pytest.raises(MissingError, match=r"target 'mine': not here; pip install it"):
        _job_for(_npu_target(tmp_path))


def test_emulators_stand_in_for_a_runtime_of_another_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeopt.plan.load_accelerator", lambda *_: Vendor(None))
    target = _npu_target(tmp_path, runtimes='["openvino"]', emulators='["onnxruntime"]')
    monkeypatch.setattr(OpenVinoRuntime, "unavailable", lambda _self: "runs on Mars")
    assert _job_for(target).target.runtimes == ("onnxruntime",)
    monkeypatch.setattr(OnnxRuntime, "unavailable", lambda _self: "gone too")
    with pytest.raises(MissingError, match="runs on Mars; gone too"):
        _job_for(target)


def test_limits_on_the_placement_come_from_flags_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeopt.plan.load_accelerator", lambda *_: Vendor(None))
    job = _job_for(_npu_target(tmp_path), max_cpu_operators=3, min_accelerated="90%")
    assert (job.gates.max_cpu_operators, job.gates.min_accelerated) == (3, 0.9)
