"""What is claimed about a file for an accelerator, which this machine can only emulate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt.progress import Silent
from edgeopt.runtimes.base import Session
from edgeopt.types import (
    Array,
    Artifact,
    Check,
    Format,
    Gates,
    Measurement,
    OpPlacement,
    Placement,
    Report,
    Sample,
    Signature,
    SignatureTensor,
)
from edgeopt.validation import prove as module
from edgeopt.validation.prove import Subject, Terms, Told, emulated_by, prove

SIGNATURE = Signature(
    (SignatureTensor("x", "x", (1, 4), "float32", "float32"),),
    (SignatureTensor("y", "y", (1, 4), "float32", "float32"),),
)
PLACEMENT = Placement(
    "Ethos-U55-128",
    "vela 5.1.0",
    predicted=False,
    ops=(
        OpPlacement("a", "CONV_2D", "accelerator", ms=0.3),
        OpPlacement("b", "CONV_2D", "accelerator", ms=0.2),
        OpPlacement("c", "ERF", "cpu", reason="not supported", fix="take the tanh form"),
    ),
)


class Passing(Session):
    """Gives the input back; where it opened a quantized file, with an error."""

    def __init__(self, error: float) -> None:
        super().__init__(SIGNATURE)
        self.error = error

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"y": inputs["x"] + np.float32(self.error)}

    def close(self) -> None:
        pass


class Engine:
    """Remembers what it opened."""

    formats: tuple[Format, ...] = ("litert",)

    def __init__(self, name: str, emulates: str | None) -> None:
        self.name = name
        self.emulates = emulates
        self.opened: list[str] = []

    def unavailable(self) -> str | None:
        return None

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        del signature, threads
        self.opened.append(path.name)
        return Passing(0.0 if "fp32" in path.name else 0.001)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Engine]:
    known = {"tosa": Engine("tosa", "integer arithmetic of the Ethos-U"), "litert": Engine("litert", None)}
    monkeypatch.setattr(module, "load_runtime", known.__getitem__)
    return known


def artifact(tmp_path: Path, name: str) -> Artifact:
    path = tmp_path / name
    path.write_bytes(b"x" * 100)
    return Artifact(path, "litert", "w8a8", SIGNATURE, 100, "0" * 64, (), {}, ())


def subject(tmp_path: Path, checks: tuple[Check, ...] = ()) -> Subject:
    shipped = replace(artifact(tmp_path, "model_vela.tflite"), emulation=artifact(tmp_path, "model.tflite").path)
    latency = Measurement("latency_ms", "quantized", 0.7, "ms", "estimated", "vela 5.1.0")
    sram = Measurement("sram_bytes", "quantized", 9000.0, "bytes", "estimated", "vela 5.1.0")
    return Subject(shipped, artifact(tmp_path, "model_fp32.tflite"), None, Told(PLACEMENT, (latency, sram), checks))


def terms(gates: Gates = Gates(), runtimes: tuple[str, ...] = ("tosa",)) -> Terms:  # noqa: B008 (frozen)
    samples = [Sample({"x": np.full((1, 4), k, np.float32)}, None, str(k)) for k in range(1, 5)]
    return Terms(
        "net", "ethosu55-int8", runtimes, lambda: iter(samples), 4, "evaluation set", None, gates, frozenset(), {}, 1
    )


def proven(tmp_path: Path, gates: Gates, checks: tuple[Check, ...] = ()) -> Report:
    return prove(subject(tmp_path, checks), terms(gates), (), Silent())


def test_the_emulation_runs_in_the_emulator_and_the_twin_on_the_host(
    engines: dict[str, Engine], tmp_path: Path
) -> None:
    report = proven(tmp_path, Gates())
    assert engines["tosa"].opened == ["model.tflite"]
    assert engines["litert"].opened == ["model_fp32.tflite"]
    assert report.evaluation["emulates"] == "integer arithmetic of the Ethos-U"
    assert report.placement == PLACEMENT


@pytest.mark.usefixtures("engines")
def test_an_emulator_is_never_timed(tmp_path: Path) -> None:
    report = proven(tmp_path, Gates(max_latency_ms=1.0, min_speedup=1.0))
    found = {(m.name, m.subject): m for m in report.measurements}
    assert found["latency_ms", "quantized"].provenance == "estimated"
    assert ("latency_ms", "float") not in found
    assert not {"speedup", "peak_memory_bytes"} & {m.name for m in report.measurements}
    assert found["sqnr_db", "quantized"].provenance == "emulated"
    assert report.op_timings == ()
    latency = next(check for check in report.checks if check.name == "latency_ms")
    assert (latency.measured, latency.passed) == (0.7, True)


@pytest.mark.parametrize(
    ("gates", "missed"),
    [
        (Gates(max_cpu_operators=0), ["cpu_operators"]),
        (Gates(max_cpu_operators=1, min_accelerated=0.6), []),
        (Gates(min_accelerated=0.9), ["accelerated"]),
        (Gates(max_latency_ms=0.5), ["latency_ms"]),
        (Gates(min_sqnr_db=90.0), ["sqnr_db"]),
    ],
)
@pytest.mark.usefixtures("engines")
def test_gates_judge_placement_estimates_and_emulated_numbers(tmp_path: Path, gates: Gates, missed: list[str]) -> None:
    report = proven(tmp_path, gates)
    assert [check.name for check in report.checks if not check.passed] == missed
    assert report.status == ("failed" if missed else "passed")


@pytest.mark.usefixtures("engines")
def test_a_budget_of_the_device_that_is_exceeded_fails_the_run(tmp_path: Path) -> None:
    over = Check("sram_bytes", 9000, 8000, "<=", "bytes", passed=False, advice="prune")
    report = proven(tmp_path, Gates(), (over,))
    assert report.status == "failed"
    assert over in report.checks


@pytest.mark.usefixtures("engines")
def test_a_file_that_stands_in_for_another_is_emulated_in_any_runtime(tmp_path: Path) -> None:
    plain = artifact(tmp_path, "model.tflite")
    assert emulated_by(plain, "litert") is None
    phrase = emulated_by(replace(plain, emulation=plain.path), "litert")
    assert phrase == "not executed on its accelerator: the same program in litert"
