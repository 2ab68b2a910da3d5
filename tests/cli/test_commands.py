"""Every command: what it hands on, what it prints, how it ends. The pipeline itself is replaced."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import pytest

from edgeopt.cli import main
from edgeopt.config import RunConfig
from edgeopt.config_keys import KEYS
from edgeopt.errors import ConversionError, UsageError
from edgeopt.progress import Progress
from edgeopt.types import Bundle, Check, Measurement, Report

REPORT = Report(
    status="passed",
    model="net",
    target="android-int8",
    runtime="litert",
    checks=(Check("speedup", 2.0, 1.0, ">=", "x", True),),
    measurements=(),
    unquantized_ops=(),
    op_timings=(),
    findings=(),
    evaluation={},
)
FAILED = replace(
    REPORT,
    status="failed",
    target="android-onnx-int8",
    checks=(Check("speedup", 0.5, 1.0, ">=", "x", False, "try android-int8-dynamic"),),
)


@dataclass
class Pipeline:
    """Stands in for edgeopt.pipeline; `export` makes one bundle per report."""

    reports: tuple[Report, ...] = (REPORT,)
    failure: BaseException | None = None
    calls: list[tuple[object, ...]] = field(default_factory=list)

    def export(self, config: RunConfig, progress: Progress) -> tuple[Bundle, ...]:
        self.calls.append((config,))
        os.write(1, b"vendor noise\n")
        progress.step("Exporting")
        if self.failure is not None:
            raise self.failure
        bundles = []
        for report in self.reports:
            path = config.output_dir / f"net-{report.target}"
            path.mkdir(parents=True)
            (path / "manifest.json").write_text("{}")
            bundles.append(Bundle(path, report.target, report.status == "passed", report))
        return tuple(bundles)

    def validate(
        self,
        bundle: Path,
        *,
        evaluation: str | None,
        threads: int,
        verify_on: tuple[str, ...],
        progress: Progress,
    ) -> Report:
        progress.step("Evaluating")
        self.calls.append((bundle, evaluation, threads, verify_on))
        (bundle / "manifest.json").write_text("{}")
        return self.reports[0]

    def compare(self, a: Path, b: Path, *, data: str | None, threads: int, progress: Progress) -> object:
        from edgeopt.comparison import Comparison
        from edgeopt.validation.fidelity import OutputFidelity

        progress.step("Comparing")
        self.calls.append((a, b, data, threads))
        sizes = [Measurement("size_bytes", side, size, "bytes", "measured-host", "litert") for side, size in SIZES]
        latency = Measurement(
            "latency_ms", "a", 2.5, "ms", "measured-host", "litert", threads=1, repetitions=9, spread=(2.4, 2.75)
        )
        outputs = (OutputFidelity("logits", 0.975, 19.04, 0.5, 0.1), OutputFidelity("ids", None, None, 0.0, 0.0))
        return Comparison(str(a), str(b), (*sizes, latency), outputs, 8)


SIZES = (("a", 4096.0), ("b", 1024.0))


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    fake = Pipeline()
    module = ModuleType("edgeopt.pipeline")
    for name in ("export", "validate", "compare"):
        setattr(module, name, getattr(fake, name))
    monkeypatch.setitem(sys.modules, "edgeopt.pipeline", module)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return call


Run = Callable[..., tuple[int, str, str]]


def test_export_has_a_flag_for_every_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run("export", "--help")
    for key in KEYS:
        assert (f"--{key.spelling}" if key.name != "model" else "[MODEL]") in out


def test_the_help_names_every_example() -> None:
    from edgeopt.examples import EXAMPLES

    (key,) = (key for key in KEYS if key.name == "example")
    assert all(name in key.help for name in EXAMPLES)


def test_export_hands_on_all_flags(pipeline: Pipeline, run: Run) -> None:
    flags = """net.py:build --target android-int8 --target android-onnx-int8 --device pixel-6 --weights w.safetensors
        --name n --task t --input x=float32[1,3] --input y=int64[1] --labels l.txt --calibration c.npz
        --evaluation e.npz --num-calibration-samples 5 --num-evaluation-samples 6 --metric top5 --seed 3
        --percentile 99.9 --keep-float head --io int8 --max-accuracy-drop 0.5% --min-agreement 0.97 --min-sqnr-db 18.5
        --min-speedup off
        --max-latency-ms 5 --max-size-mb 6 --max-peak-memory-mb 7 --threads 2 --output-dir out --no-float-twin"""
    code, _, err = run("export", *flags.split())
    assert (code, err) == (0, "")
    assert pipeline.calls == [
        (
            RunConfig(
                model="net.py:build",
                weights=Path("w.safetensors"),
                name="n",
                task="t",
                input=("x=float32[1,3]", "y=int64[1]"),
                labels=Path("l.txt"),
                target=("android-int8", "android-onnx-int8"),
                device="pixel-6",
                calibration="c.npz",
                num_calibration_samples=5,
                evaluation="e.npz",
                num_evaluation_samples=6,
                metric="top5",
                seed=3,
                estimator="percentile",
                percentile=99.9,
                keep_float=("head",),
                io="int8",
                max_accuracy_drop=0.005,
                min_agreement=0.97,
                min_sqnr_db=18.5,
                max_latency_ms=5.0,
                max_size_mb=6.0,
                max_peak_memory_mb=7.0,
                threads=2,
                output_dir=Path("out"),
                float_twin=False,
                gates_off=frozenset({"min_speedup"}),
            ),
        )
    ]


def test_export_reads_the_file_of_the_folder_or_the_one_named(pipeline: Pipeline, run: Run, tmp_path: Path) -> None:
    (tmp_path / "edgeopt.toml").write_text('model = "a.onnx"\noutput-dir = "one"\n')
    (tmp_path / "other.toml").write_text('example = "digits"\noutput-dir = "two"\n')
    assert run("export")[0] == 0
    assert run("export", "--config", "other.toml")[0] == 0
    models = [(config.model, config.example) for (config,) in pipeline.calls if isinstance(config, RunConfig)]
    assert models == [("a.onnx", None), (None, "digits")]


@pytest.mark.usefixtures("pipeline")
def test_export_prints_the_report_the_bundle_and_what_to_do_next(run: Run) -> None:
    code, out, err = run("export", "net.onnx")
    assert (code, err) == (0, "")
    assert out.startswith("PASSED  net for android-int8")
    assert out.endswith("Bundle: dist/net-android-int8\nNext:   edgeopt inspect dist/net-android-int8\n")
    assert "vendor noise" not in out


def test_export_of_several_sums_up_and_shows_what_failed(pipeline: Pipeline, run: Run) -> None:
    pipeline.reports = (REPORT, FAILED)
    code, out, err = run("export", "net.onnx")
    assert code == 1
    assert "PASSED" not in out
    assert "FAILED  net for android-onnx-int8" in out
    assert "try android-int8-dynamic" in out
    assert out.splitlines()[-2:] == ["Bundle: dist/net-android-int8", "Bundle: dist/net-android-onnx-int8  (failed)"]
    assert err == ("error: dist/net-android-onnx-int8: missed speedup; what was made is written, and marked failed\n")


def test_export_prints_nothing_but_json_when_asked(pipeline: Pipeline, run: Run) -> None:
    pipeline.reports = (REPORT, FAILED)
    code, out, _ = run("export", "net.onnx", "--json")
    bundles = json.loads(out)["bundles"]
    assert code == 1
    assert [(b["path"], b["target"], b["status"]) for b in bundles] == [
        ("dist/net-android-int8", "android-int8", "passed"),
        ("dist/net-android-onnx-int8", "android-onnx-int8", "failed"),
    ]
    assert bundles[1]["report"]["checks"][0]["name"] == "speedup"
    assert len(bundles[0]["report"]["manifest_sha256"]) == 64


@pytest.mark.parametrize(
    ("failure", "code", "lines"),
    [
        (UsageError("is wrong", where="x"), 2, ["error: x: is wrong"]),
        (
            ConversionError("no FOO", where="layer 'a'"),
            4,
            ["error: layer 'a': no FOO", "  library output: ", "  | vendor"],
        ),
        (ZeroDivisionError("x"), 1, ["internal error: ZeroDivisionError: x", "  traceback", "  this is a bug"]),
        (KeyboardInterrupt(), 130, ["error: interrupted"]),
    ],
)
def test_a_failure_inside_the_pipeline_is_explained(
    failure: BaseException,
    code: int,
    lines: list[str],
    pipeline: Pipeline,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pipeline.failure = failure
    found, out, err = run("export", "net.onnx")
    assert (found, out) == (code, "")
    assert len(err.splitlines()) == len(lines)
    for line, start in zip(err.splitlines(), lines, strict=True):
        assert line.startswith(start)


def test_debug_shows_everything(pipeline: Pipeline, run: Run) -> None:
    pipeline.failure = ZeroDivisionError("x")
    code, out, err = run("--debug", "export", "net.onnx")
    assert (code, out) == (1, "vendor noise\n")
    assert err.startswith("Traceback")
    assert err.endswith("internal error: ZeroDivisionError: x\n")


def test_validate(pipeline: Pipeline, run: Run, tmp_path: Path) -> None:
    code, out, _ = run(
        "validate", str(tmp_path), "--evaluation", "e.npz", "--threads", "2", "--verify-on", "phone:cortex-a76"
    )
    assert (code, pipeline.calls) == (0, [(tmp_path, "e.npz", 2, ("phone:cortex-a76",))])
    assert out.startswith("PASSED")
    pipeline.reports = (FAILED,)
    code, out, err = run("validate", str(tmp_path), "--json")
    assert (code, err) == (1, f"error: {tmp_path}: missed speedup\n")
    assert json.loads(out)["status"] == "failed"


def test_compare(pipeline: Pipeline, run: Run) -> None:
    code, out, _ = run("compare", "a.tflite", "b.tflite", "--data", "d.npz")
    assert (code, pipeline.calls) == (0, [(Path("a.tflite"), Path("b.tflite"), "d.npz", 1)])
    rows = [line.split() for line in out.splitlines()]
    assert ["size", "4.0", "KiB", "1.0", "KiB", "0.25"] in rows
    assert ["latency", "2.50", "ms", "[2.40-2.75]", "-"] in rows
    assert ["logits", "97.50", "%", "19.0", "dB", "0.5"] in rows
    assert ["ids", "-", "-", "0"] in rows
    assert out.endswith("On 8 samples.\n")
    _, out, _ = run("compare", "a.tflite", "b.tflite", "--json")
    assert json.loads(out)["comparison"]["outputs"][0]["agreement"] == 0.975


@pytest.mark.parametrize("command", ["targets", "devices"])
def test_lists_fit_80_columns_and_have_no_colour(command: str, run: Run) -> None:
    code, out, err = run(command)
    assert (code, err) == (0, "")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "\x1b" not in out


def test_every_target_is_one_line_and_shows_all_about_itself(run: Run) -> None:
    _, out, _ = run("targets", "--json")
    listed = json.loads(out)["targets"]
    lines = run("targets")[1].splitlines()
    for target in listed:
        assert any(line.startswith(f"{target['name']} ") for line in lines)
    _, out, _ = run("targets", "android-int8")
    assert "--max-latency-ms      off" in out
    assert "per-channel" in out
    _, out, _ = run("targets", "android-int8", "--json")
    assert json.loads(out)["target"]["scheme"]["precision"] == "w8a8"


def test_every_device_shows_its_cores_and_sources(run: Run) -> None:
    _, out, _ = run("devices", "--json")
    for device in json.loads(out)["devices"]:
        code, shown, _ = run("devices", device["name"])
        assert code == 0
        assert all(source in shown.splitlines() for source in device["sources"])
        assert all(f"{cluster['count']} x {cluster['core']}" in shown for cluster in device["clusters"])


def test_init_writes_a_file_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init")[0] == 0
    assert (tmp_path / "edgeopt.toml").read_text().startswith("# edgeopt.toml")
    (tmp_path / "edgeopt.toml").write_text("seed = 1")
    code, _, err = run("init")
    assert (code, err) == (2, "error: edgeopt.toml: is there already; add --force to replace it\n")
    assert run("init", "--force")[0] == 0
    assert "seed = 0" in (tmp_path / "edgeopt.toml").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "edgeopt.toml"]
    code, _, err = run("init", "absent/edgeopt.toml")
    assert (code, err) == (2, "error: absent/edgeopt.toml: can't be written: No such file or directory\n")


def test_no_command_shows_the_help_and_fails(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (2, "")
    assert "Usage: edgeopt" in out
