"""What a prediction says, how sure it is, and what it refuses to say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.device_profiles import list_devices, load_device
from edgeopt.errors import UsageError
from edgeopt.prediction import Prediction, calibrate, find_calibration, measurement, predict, survey
from edgeopt.prediction.estimate import estimate
from edgeopt.prediction.parameters import load
from edgeopt.prediction.work import FileWork, Kind, OpWork
from edgeopt.types import Format


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEOPT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def op(name: str, kind: Kind = "conv", macs: int = 10**8) -> OpWork:
    return OpWork(name, kind.upper(), kind, "int8", macs, 64, 10**5, 10**4, 2 * 10**5)


CONVOLUTIONAL = FileWork((op("small", macs=10**7), op("large"), op("add", "elementwise", 0)))


def told(
    work: FileWork = CONVOLUTIONAL, device: str = "pixel-4", format_: Format = "litert", threads: int = 4
) -> Prediction:
    return estimate(work, "m.tflite", format_, load_device(device), threads)


def codes(prediction: Prediction) -> list[str]:
    return [finding.code for finding in prediction.findings]


def test_a_device_with_figures() -> None:
    prediction = told()
    assert prediction.low < prediction.ms < prediction.high
    assert prediction.ms / prediction.low == pytest.approx(math.exp(load().widths["published"]))
    assert (prediction.coverage, prediction.figures, prediction.calibration) == (0.9, 15, 0)
    assert "15 of them of this one" in prediction.basis
    assert prediction.ms == pytest.approx(sum(one.ms for one in prediction.ops))
    assert sum(prediction.limits.values()) == pytest.approx(1)
    assert [one.name for one in prediction.slowest(2)] == ["large", "small"]
    assert codes(prediction) == ["cpu-only", "old-kernels"]
    assert prediction.macs == 11 * 10**7


def test_the_interval_is_wider_the_less_is_known() -> None:
    def width(prediction: Prediction) -> float:
        return prediction.high / prediction.low

    published, unseen, new_core = told(), told(device="galaxy-a54", threads=2), told(device="galaxy-s24", threads=1)
    assert width(published) < width(unseen) < width(new_core)
    assert codes(new_core)[:2] == ["no-figure-of-core", "no-figure-of-arithmetic"]
    assert "other-runtime" in codes(told(format_="onnx"))
    assert width(told(format_="onnx")) > width(published)
    transformer = FileWork((op("attention", "matmul"), op("softmax", "transcendental", 0)))
    assert "other-network" in codes(told(transformer))
    assert "mixed-cores" in codes(told(threads=6))
    assert "few-cores" in codes(told(device="raspberry-pi-5", threads=5))


def test_as_a_measurement() -> None:
    prediction = told()
    (figure,) = prediction.measurements("float")
    assert (figure.provenance, figure.subject, figure.unit, figure.threads) == ("estimated", "float", "ms", 4)
    assert (figure.value, figure.spread) == (prediction.ms, (prediction.low, prediction.high))


@pytest.mark.parametrize(
    ("work", "device", "line"),
    [
        (FileWork(()), "pixel-4", "holds too much that the latency model does not know (no operators)"),
        (FileWork((op("x", "unknown"),)), "pixel-4", "does not know (UNKNOWN)"),
        (FileWork((), unsupported="runs elsewhere"), "pixel-4", "m.tflite: runs elsewhere; measure on the device"),
        (CONVOLUTIONAL, "intel-n100", "knows nothing about the core gracemont"),
        (CONVOLUTIONAL, "corstone-300", "knows nothing about the core cortex-m55"),
    ],
)
def test_no_number_where_nothing_is_known(work: FileWork, device: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        told(work, device, threads=1)
    assert line in caught.value.line()


def test_a_format_that_the_device_does_not_take() -> None:
    with pytest.raises(UsageError, match="takes no executorch files"):
        estimate(CONVOLUTIONAL, "m.pte", "executorch", replace(load_device("pixel-4"), formats=("litert",)), 1)


def test_a_few_unknown_operators_and_chosen_sizes_are_told() -> None:
    many = tuple(op(f"c{i}") for i in range(20))
    prediction = told(FileWork((*many, replace(op("odd", "unknown"), macs=0)), assumed=("x: 1x8",)))
    assert {"unknown-operators", "dynamic-shape"} <= set(codes(prediction))


def model(path: Path) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="stem/Conv")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32, 56, 56])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64, 56, 56])],
        [numpy_helper.from_array(np.zeros((64, 32, 1, 1), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def test_all_devices_fastest_first(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx")
    calibrate(load_device("pixel-4"), [measurement(path, 100.0, 1)])
    found = survey(path, "onnx", list_devices(), 4)
    times = [prediction.ms for prediction in found.predictions]
    assert times == sorted(times)
    assert {p.device: p.calibration for p in found.predictions}["pixel-4"] == 1
    named = [name for names in found.skipped.values() for name in names]
    assert len(named) + len(times) == len(list_devices())
    with pytest.raises(UsageError, match="decides on the device"):
        survey(tmp_path / "m.mlpackage", "coreml", list_devices(), 1)


def test_a_calibrated_prediction_names_it(tmp_path: Path) -> None:
    path, device = model(tmp_path / "m.onnx"), load_device("raspberry-pi-5")
    before = predict(path, "onnx", device, 1)
    calibrate(device, [measurement(path, 2 * before.ms, 1)])
    after = predict(path, "onnx", device, 1, find_calibration(device))
    assert before.ms * 1.5 < after.ms < before.ms * 2
    assert after.high / after.low < before.high / before.low
    assert "calibrated with 1 figure of yours" in after.basis
    assert "other-runtime" not in codes(after)
    other = predict(path, "onnx", load_device("raspberry-pi-4"), 1, find_calibration(load_device("raspberry-pi-4")))
    assert other.calibration == 0


def test_a_file_that_takes_no_time() -> None:
    """Its float twin would be infinitely times as long."""
    with pytest.raises(UsageError, match="holds no operator that takes time"):
        told(FileWork((op("reshape", "free", 0),)))
