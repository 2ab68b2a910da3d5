"""What the workbench keeps from one conversion for the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeopt.calibration.ranges import Range
from edgeopt.errors import ConversionError
from edgeopt.exporter.base import QuantizationRequest
from edgeopt.progress import Silent
from edgeopt.types import (
    Artifact,
    EstimatorSpec,
    Finding,
    LayerRules,
    Model,
    Sample,
    Scheme,
    Signature,
)
from edgeopt.workbench import Workbench

W8A8 = Scheme("w8a8", "static")


class Samples:
    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Sample]:
        yield Sample({"x": np.zeros(1, np.float32)}, None, "0")

    def fingerprint(self) -> str:
        return "0" * 64


class Exporter:
    """Finds the activation of every layer that isn't exempt odd, once, as real exporters do."""

    def __init__(self) -> None:
        self.runs = 0
        self.float_conversions = 0
        self.fails_at: str | None = None

    def export_float(self, model: Model, directory: Path) -> Artifact:
        self.float_conversions += 1
        (directory / "f").touch()
        if self.fails_at == "float":
            raise ConversionError("has an operator from another world", where="layer 'a'")
        return Artifact(directory / "f", "onnx", "fp32", Signature((), ()), 1, "0", model.history, {}, ())

    def export_quantized(self, model: Model, _: Artifact, request: QuantizationRequest, directory: Path) -> Artifact:
        run = request.calibration
        missing = [x for x in ("a", "b") if x not in request.rules.keep_float]
        if run is not None and any(name not in run.known for name in missing):
            self.runs += len(list(run.samples()))
            for name in missing:
                run.known[name] = Range(0.0, 1.0)
                run.on_finding(Finding("constant-activation", name, "never changes"))
        (directory / "q").touch()
        if self.fails_at == "quantized":
            raise ConversionError("has no int8 kernel", where="layer 'b'")
        return Artifact(directory / "q", "onnx", "w8a8", Signature((), ()), 1, "0", model.history, {}, ())


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    made = Exporter()
    monkeypatch.setattr("edgeopt.workbench.load_exporter", lambda *_: made)
    return made


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    model = Model("net", None, None, (), (), {}, None, (), (), "0" * 64)
    return Workbench(model, Samples(), LayerRules(), 0, tmp_path, Silent())  # type: ignore[arg-type]


def found(bench: Workbench, scheme: Scheme, *keep_float: str) -> list[str]:
    return [f.where for f in bench.quantized_artifact("onnx", scheme, EstimatorSpec(), LayerRules(keep_float))[1]]


def test_a_conversion_from_known_ranges_has_their_findings_too(exporter: Exporter, bench: Workbench) -> None:
    # Regression: only the conversion that had run the samples reported them.
    assert found(bench, W8A8) == ["a", "b"]
    assert found(bench, W8A8, "b") == ["a", "b"]
    assert exporter.runs == 1


def test_a_later_run_adds_what_it_finds_once(exporter: Exporter, bench: Workbench) -> None:
    assert found(bench, W8A8, "b") == ["a"]
    assert found(bench, W8A8) == ["a", "b"]
    assert found(bench, W8A8, "b") == ["a"]  # made before, as it was
    assert exporter.runs == 2


def test_findings_of_other_schemes_and_estimators_stay_apart(exporter: Exporter, bench: Workbench) -> None:
    assert found(bench, W8A8, "b") == ["a"]
    assert found(bench, Scheme("w8a16", "static"), "a") == ["b"]
    other = bench.quantized_artifact("onnx", W8A8, EstimatorSpec("mse"), LayerRules(("a",)))
    assert [finding.where for finding in other[1]] == ["b"]
    assert found(bench, Scheme("w8a8", "dynamic")) == []
    assert exporter.runs == 3


def _files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def test_a_discarded_file_is_gone_until_it_is_asked_for_again(
    exporter: Exporter, bench: Workbench, tmp_path: Path
) -> None:
    first, second = LayerRules(("a",)), LayerRules(("b",))
    for rules in (first, second):
        bench.quantized_artifact("onnx", W8A8, EstimatorSpec(), rules)
    assert _files(tmp_path) == 3
    bench.discard("onnx", W8A8, EstimatorSpec(), first)
    bench.discard("onnx", W8A8, EstimatorSpec(), first)
    assert _files(tmp_path) == 2
    again, findings = bench.quantized_artifact("onnx", W8A8, EstimatorSpec(), first)
    assert again.path.exists()
    assert [finding.where for finding in findings] == ["b", "a"]
    assert exporter.runs == 2  # the ranges stay


def test_clearing_spares_the_files_of_variants(exporter: Exporter, bench: Workbench, tmp_path: Path) -> None:
    variant = bench.variant(bench.model)
    for one in (bench, variant):
        one.quantized_artifact("onnx", W8A8, EstimatorSpec())
    bench.clear()
    assert _files(tmp_path) == 2
    assert variant.quantized_artifact("onnx", W8A8, EstimatorSpec())[0].path.exists()
    assert bench.quantized_artifact("onnx", W8A8, EstimatorSpec())[0].path.exists()
    assert exporter.runs == 2


def test_a_refused_model_is_converted_once_and_refused_alike(
    exporter: Exporter, bench: Workbench, tmp_path: Path
) -> None:
    # Regression: the second ask stumbled over the first one's folder.
    exporter.fails_at = "float"
    for ask in (bench.float_artifact, lambda format_: bench.quantized_artifact(format_, W8A8, EstimatorSpec())):
        with pytest.raises(ConversionError, match="layer 'a': has an operator from another world"):
            ask("onnx")
    assert exporter.float_conversions == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failed_conversion_leaves_nothing_and_can_be_tried_again(
    exporter: Exporter, bench: Workbench, tmp_path: Path
) -> None:
    exporter.fails_at = "quantized"
    for _ in range(2):
        with pytest.raises(ConversionError, match="layer 'b': has no int8 kernel"):
            bench.quantized_artifact("onnx", W8A8, EstimatorSpec())
    assert _files(tmp_path) == 1  # the float one
    exporter.fails_at = None
    assert bench.quantized_artifact("onnx", W8A8, EstimatorSpec())[0].path.exists()
