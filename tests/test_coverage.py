"""Coverage: what runs where, told for every target, with fakes for exporters and accelerators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import edgeopt.coverage as coverage_module
from edgeopt import coverage_placing
from edgeopt.accelerators.base import Compiled
from edgeopt.compression.rewrites.base import Applied, Suggestion
from edgeopt.config import RunConfig
from edgeopt.coverage import coverage
from edgeopt.coverage_rows import fallbacks, layer_kinds, rows_by_kind, rows_by_layer
from edgeopt.coverage_values import Cell, CoverageReport, Outcome, TargetCoverage
from edgeopt.errors import ConversionError, MissingError, UsageError
from edgeopt.json_data import dumps
from edgeopt.progress import Silent
from edgeopt.report.coverage import coverage_document, render_coverage
from edgeopt.sources import ModelSpec
from edgeopt.targets import load_target
from edgeopt.types import (
    Artifact,
    Check,
    EstimatorSpec,
    LayerRules,
    Measurement,
    Npu,
    OpPlacement,
    Placement,
    Scheme,
    Signature,
    TensorSpec,
    UnquantizedOp,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU())
        self.memory = nn.GRU(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.memory(self.body(x) + x)[0]
        return result


def op(name: str, type_: str, layer: str | None, on_cpu: str | None = None, fix: str | None = None) -> OpPlacement:
    return OpPlacement(name, type_, "accelerator" if on_cpu is None else "cpu", layer, on_cpu, fix)


def covered(name: str, *ops: OpPlacement, **more: object) -> TargetCoverage:
    placement = Placement("Chip", "its compiler 1.0", predicted=False, ops=ops)
    return replace(TargetCoverage(name, "litert", "edge-tpu", "board", placement), **more)


KINDS = {"body.0": "Linear", "body.1": "GELU", "body.2": "Linear", "body.3": "GELU", "memory": "GRU"}


def test_layers_are_what_has_no_layers_inside() -> None:
    assert layer_kinds(Net()) == KINDS
    assert layer_kinds(None) == {}


def test_rows_count_whole_layers() -> None:
    one = covered(
        "one",
        op("a", "FULLY_CONNECTED", "body.0"),
        op("b", "GELU", "body.1", "no such operator"),
        op("c", "FULLY_CONNECTED", "body.2"),
        op("d", "TANH", "body.3"),
        op("e", "MUL", "body.3", "too wide"),
        op("f", "ADD", ""),
        op("g", "TANH", "memory.cell"),  # inside the layer
    )
    other = covered("other", op("a", "Gemm", "body.0"), op("b", "Add", None, "slow"), op("c", "QuantizeLinear", None))
    rows = {row.name: row for row in rows_by_kind([one, other], KINDS)}
    assert list(rows) == ["Linear", "GELU", "GRU", "(add)", "(quantize_linear)"]
    assert rows["Linear"].count == 2
    assert rows["Linear"].cells == {"one": Cell(2, 2), "other": Cell(1, 1)}
    assert rows["GELU"].cells == {"one": Cell(0, 2)}
    assert rows["(add)"].cells == {"one": Cell(1, 1), "other": Cell(0, 1)}
    by_layer = {row.name: row.cells for row in rows_by_layer([one], KINDS)}
    assert by_layer["body.3 GELU"] == {"one": Cell(0, 1)}
    assert by_layer["memory GRU"] == {"one": Cell(1, 1)}


def test_fallbacks_are_joined_whatever_tensors_are_called() -> None:
    one = covered("one", *(op(str(i), "ADD", None, f"reads 't{i}'", "a fix") for i in range(3)))
    other = covered("other", op("x", "ADD", None, "reads 'u'"), op("y", "MUL", None, "another"))
    found = fallbacks([one, other, TargetCoverage("none", "onnx", None, "board", None, "can't convert: x")])
    assert [(f.type, f.fix, f.counts) for f in found] == [
        ("ADD", "a fix", {"one": 3, "other": 1}),
        ("MUL", None, {"other": 1}),
    ]


# --- one target ------------------------------------------------------------------------------------------------------


class FakeBench:
    """Stands for a workbench: hands out one file, or fails."""

    def __init__(self, artifact: Artifact | None = None) -> None:
        self.artifact = artifact
        self.asked: list[str] = []
        self.schemes: list[Scheme] = []

    def quantized_artifact(self, format_: str, scheme: Scheme, estimator: EstimatorSpec) -> tuple[Artifact, tuple[()]]:
        self.asked.append(f"{scheme.precision} {format_} {estimator.name}")
        self.schemes.append(scheme)
        if self.artifact is None:
            raise ConversionError("has an operator from another world", where="layer 'body.0'")
        return self.artifact, ()


class FakeAccelerator:
    missing: str | None = None

    def unavailable(self) -> str | None:
        return self.missing

    def compile(self, artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
        assert directory.is_dir()
        placement = Placement(npu.kind, "a fake", predicted=True, ops=(op("a", "ADD", None),))
        latency = Measurement("latency_ms", "quantized", 2.5, "ms", "estimated", "fake")
        check = Check("sram_bytes", 400.0, 300.0, "<=", "bytes", passed=False)
        return Compiled(artifact, placement, (latency,), (check,))


def artifact_of(path: Path, unquantized: tuple[UnquantizedOp, ...] = ()) -> Artifact:
    return Artifact(path, "litert", "w8a8", Signature((), ()), 1, "", (), {}, unquantized)


def covered_by(bench: FakeBench, target: str, folder: Path, device: str | None = None) -> TargetCoverage:
    return coverage_placing.cover(target, RunConfig(device=device), bench, folder)  # type: ignore[arg-type]


def test_accelerator_is_asked_about_the_exported_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_placing, "load_accelerator", lambda *_: FakeAccelerator())
    bench = FakeBench(artifact_of(tmp_path / "model.tflite"))
    found = covered_by(bench, "ethosu55-int8", tmp_path)
    assert found.problem is None
    assert found.placement is not None
    assert (found.placement.accelerator, found.on_cpu, found.latency_ms) == ("ethos-u55", 0, 2.5)
    assert found.warnings == ("SRAM 400 B, and the device has 300 B",)
    assert bench.asked[0].startswith("w8a8 litert")


def test_missing_tool_and_refused_model_are_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeAccelerator()
    monkeypatch.setattr(coverage_placing, "load_accelerator", lambda *_: fake)
    bench = FakeBench()
    found = covered_by(bench, "ethosu55-int8", tmp_path)
    assert found.problem == "can't convert: layer 'body.0': has an operator from another world"
    fake.missing = "vela is not installed; pip install 'edgeopt[ethos-u]'"
    found = covered_by(bench, "ethosu55-int8", tmp_path)
    assert found.problem == f"needs more on this machine: {fake.missing}"
    found = covered_by(bench, "ethosu55-int8", tmp_path, "pixel-8")
    assert found.problem == "device 'pixel-8' has no ethos-u55"
    with pytest.raises(UsageError, match="no-such-target"):
        covered_by(bench, "no-such-target", tmp_path)


def test_ethos_us_share_one_litert_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_placing, "load_accelerator", lambda *_: FakeAccelerator())
    bench = FakeBench(artifact_of(tmp_path / "model.tflite"))
    for name in ("ethosu55-int8", "ethosu65-int8", "ethosu85-int8", "edgetpu-int8", "ethosu55-executorch-int8"):
        covered_by(bench, name, tmp_path)
    assert len(set(bench.schemes[:3])) == 1
    assert len(set(bench.schemes)) == 3


def test_default_targets_are_one_per_accelerator_and_cpu_runtime() -> None:
    targets = [load_target(name) for name in coverage_placing.default_targets()]
    accelerators = [target.accelerator for target in targets if target.accelerator is not None]
    assert len(set(accelerators)) == len(accelerators)
    assert {"ethos-u55", "edge-tpu", "openvino"} <= set(accelerators)
    assert [target.format for target in targets if target.accelerator is None] == ["litert", "onnx", "executorch"]
    assert "ethosu55-int8" in {target.name for target in targets}


def test_files_go_to_the_accelerators_that_take_their_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_placing, "load_accelerator", lambda *_: FakeAccelerator())
    artifact = artifact_of(tmp_path / "model.tflite")
    assert "ethosu55-int8" in coverage_placing.targets_for("litert")
    assert "android-int8" not in coverage_placing.targets_for("litert")
    assert coverage_placing.cover_file("edgetpu-int8", None, artifact, tmp_path).on_cpu == 0
    other = coverage_placing.cover_file("openvino-int8", None, artifact, tmp_path)
    assert other.problem == "can't convert: takes onnx files, and this is litert"
    # Regression: an absent file was called no model source.
    with pytest.raises(UsageError, match=r"absent\.tflite: no such file"):
        coverage_placing.exported_file(tmp_path / "absent.tflite")
    assert coverage_placing.exported_file(Path("net.py:build")) is None


# --- the whole -------------------------------------------------------------------------------------------------------


def model() -> ModelSpec:
    torch.manual_seed(0)
    spec = TensorSpec("x", (1, 3, 8), "float32")
    return ModelSpec(module=Net().eval(), inputs=(spec,), example_inputs={"x": np.ones((1, 3, 8), np.float32)})


def fake_cover(before: Sequence[TargetCoverage], after: Sequence[TargetCoverage]) -> object:
    """The first workbench gives what was before, all later ones what is after."""
    benches: list[object] = []

    def cover(name: str, config: RunConfig, made: object, directory: Path) -> TargetCoverage:
        del config, directory
        if made not in benches:
            benches.append(made)
        return next(one for one in (before if made is benches[0] else after) if one.target == name)

    return cover


GELUS = (op("b", "GELU", "body.1", "no"), op("d", "GELU", "body.3", "no"))
REST = (op("a", "FULLY_CONNECTED", "body.0"), op("g", "ADD", ""))
CONFIG = RunConfig(model=model(), target=("tpu",))


def test_suggestions_are_those_that_concern_what_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_module, "cover", fake_cover([covered("tpu", *REST, *GELUS)], []))
    report = coverage(CONFIG, Silent())
    # The GRU could be unrolled and the linear operators be convolutions, but they run where they should.
    assert [one.name for one in report.suggestions] == ["gelu-tanh"]
    assert report.outcomes == ()
    assert "example input" in report.calibration
    monkeypatch.setattr(coverage_module, "cover", fake_cover([covered("tpu", *REST)], []))
    assert coverage(CONFIG, Silent()).suggestions == ()


def test_only_rewrites_that_helped_are_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = op("a", "FULLY_CONNECTED", "body.0", "more than one row")
    before, after = covered("tpu", slow, *GELUS), covered("tpu", slow, op("b", "MUL", "body.1"))
    monkeypatch.setattr(coverage_module, "cover", fake_cover([before], [after]))
    report = coverage(CONFIG, Silent(), rewrite=True)
    assert [(one.applied.suggestion.name, one.helped) for one in report.outcomes] == [
        ("gelu-tanh", ("tpu",)),
        ("linear-as-conv", ()),
    ]
    assert report.recommended == ("gelu-tanh",)
    assert report.after is not None
    assert report.after.targets[0].on_cpu == 1


def test_target_without_result_fails_alone_only_where_another_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, target=("tpu", "none"))
    none = TargetCoverage("none", "litert", "edge-tpu", "board", None, "needs more on this machine: a tool")
    monkeypatch.setattr(coverage_module, "cover", fake_cover([covered("tpu", *REST), none], []))
    assert coverage(config, Silent()).targets[1].problem is not None
    monkeypatch.setattr(coverage_module, "cover", fake_cover([none], []))
    with pytest.raises(MissingError, match="no target gave a result; needs more on this machine: a tool"):
        coverage(replace(CONFIG, target=("none",)), Silent())
    broken = replace(none, problem="can't convert: layer 'body.0'")
    monkeypatch.setattr(coverage_module, "cover", fake_cover([broken], []))
    with pytest.raises(ConversionError, match=r"--apply-rewrites may help: .*gelu-tanh"):
        coverage(replace(CONFIG, target=("none",)), Silent())


def test_exported_file_is_not_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = artifact_of(tmp_path / "model.tflite")
    monkeypatch.setattr(coverage_module, "exported_file", lambda _: artifact)
    with pytest.raises(UsageError, match="exported already"):
        coverage(RunConfig(model="model.tflite"), Silent(), rewrite=True)


# --- what a person sees ----------------------------------------------------------------------------------------------


def shown(report: CoverageReport, width: int, *, by_layer: bool = False) -> str:
    console = Console(width=width, file=StringIO())
    render_coverage(report, console, by_layer=by_layer)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def report_of(count: int) -> CoverageReport:
    targets = [covered(f"target-number-{i}-int8", *REST, *GELUS) for i in range(count)]
    suggestion = Suggestion("gelu-tanh", "GELU by its tanh form", ("body.1", "body.3"), ("edge-tpu",))
    return CoverageReport(
        "net",
        "the example",
        tuple(targets),
        rows_by_kind(targets, KINDS),
        rows_by_layer(targets, KINDS),
        fallbacks(targets),
        (suggestion,),
    )


def test_fourteen_targets_fit_into_a_hundred_columns() -> None:
    text = shown(report_of(14), 100)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    gelu = next(line for line in text.splitlines() if line.startswith("GELU"))
    assert gelu.split() == ["GELU", "2", *["0/2"] * 14]
    assert "gelu-tanh: GELU by its tanh form; for edge-tpu; in body.1, body.3" in text


def test_more_targets_than_fit_go_below() -> None:
    text = shown(report_of(14), 50)
    assert sum(line.startswith("Linear") for line in text.splitlines()) > 1
    assert "body.1 GELU" in shown(report_of(2), 100, by_layer=True)


def test_before_and_after_are_told() -> None:
    report = report_of(2)
    after = replace(report, targets=(covered("target-number-0-int8", *REST), report.targets[1]), fallbacks=())
    good = Outcome(Applied(report.suggestions[0], 61.2, 40.0), ("target-number-0-int8",))
    bad = Outcome(Applied(replace(report.suggestions[0], name="bad"), 12.0, 80.0, "keeps 12.0 dB"), ())
    text = shown(replace(report, outcomes=(good, bad), after=after), 200)
    assert "1 target-number-0-int8: 2 -> 0 operators on the CPU" in text
    assert "proven equivalent, 61.2 dB (at least 40 dB); helps 1" in text
    assert "refused: keeps 12.0 dB" in text
    assert "Recommended: gelu-tanh (1)" in text
    document = coverage_document(replace(report, outcomes=(good, bad), after=after))
    assert '"recommended": [\n      "gelu-tanh"\n    ]' in dumps(document)


def test_rules_of_the_run_are_checked() -> None:
    with pytest.raises(UsageError, match="matches no layer"):
        coverage(replace(CONFIG, target=("android-int8",), keep_float=("nowhere",)), Silent())
    assert LayerRules().keep_float == ()
