"""`edgeopt debug`: what it hands on and what it prints. The comparison itself is replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from edgeopt.cli.console import Settings
from edgeopt.cli.debug import debug
from edgeopt.debugging import Debugging, Divergence, LayerError
from edgeopt.errors import UsageError
from edgeopt.validation.fidelity import OutputFidelity

LAYERS = (
    LayerError("[stem].conv", 0, "CONV_2D", "Conv", 31.2, 0.5, 0.01, (0, 6), (0, 5.9), None, None, (), 1.0),
    LayerError("block", 0, "ADD", "Add", 8.4, 12.0, -0.2, (-3, 3), (-2, 2), 31.2, 22.8, (0,), 0.995),
    LayerError("block", 1, "FULLY_CONNECTED", "Gemm", 200.0, 0.0, 0.0, (0, 1), (0, 1), 8.4, -191.6, (1,), 0.0),
)
RESULT = Debugging(
    a="a.tflite",
    b="b.onnx",
    runtime_a="litert",
    runtime_b="onnxruntime",
    layers=LAYERS,
    first_divergence=Divergence(1, "low"),
    threshold_db=10.0,
    max_drop_db=10.0,
    outputs=(OutputFidelity("logits", 1.0, 19.5, 0.5, 0.1),),
    matched_by="layer",
    unmatched_a=(),
    unmatched_b=("extra",),
    instrumented_db_a=200.0,
    instrumented_db_b=129.0,
    samples=4,
)

Run = Callable[..., Result]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    made: list[dict[str, object]] = []

    def fake(a: Path, b: Path | None, **rest: object) -> Debugging:
        made.append({"a": a, "b": b, **rest})
        return RESULT

    monkeypatch.setattr("edgeopt.debugging.debug", fake)
    return made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: str, width: int = 160) -> Result:
        monkeypatch.setenv("COLUMNS", str(width))
        app = typer.Typer()
        app.command()(debug)
        return CliRunner().invoke(app, list(arguments), obj=Settings(debug=True))

    return call


def test_table(run: Run, calls: list[dict[str, object]]) -> None:
    result = run("a.tflite", "b.onnx", "--data", "d.npz", "--num-samples", "4", "--threshold", "9")
    assert result.exit_code == 0
    given = {k: v for k, v in calls[0].items() if k != "progress"}
    assert given == {
        "a": Path("a.tflite"),
        "b": Path("b.onnx"),
        "data": "d.npz",
        "num_samples": 4,
        "threshold_db": 9.0,
        "max_drop_db": 10.0,
        "threads": 1,
    }
    rows = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "[stem].conv CONV_2D Conv 31.2 dB 100 % 0.5 +0.01 0 .. 6 0 .. 5.9" in rows
    assert "block:1 FULLY_CONNECTED Gemm exact 8.4 dB 0 % 0 +0 0 .. 1 0 .. 1" in rows
    verdict = "First divergence: block (Add), 8.4 dB, below 10 dB; its input has 31.2 dB, 100 % of the error is new"
    assert verdict in rows
    assert "Output logits: 19.5 dB" in rows
    assert "Only in B: extra." in rows
    assert any(row.startswith("Looking inside B ") for row in rows)
    assert not any(row.startswith("Looking inside A ") for row in rows)


def test_narrow_terminals_get_the_figures(run: Run, calls: list[dict[str, object]]) -> None:
    lines = run("a.tflite", "b.onnx", width=80).output.splitlines()
    table = lines[3 : lines.index("", 3)]
    assert max(map(len, table)) <= 80
    assert "31.2 dB" in table[2]
    assert len(calls) == 1


def test_nothing_diverges(run: Run, calls: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = replace(RESULT, first_divergence=None, matched_by="order")
    monkeypatch.setattr("edgeopt.debugging.debug", lambda *_, **__: quiet)
    output = run("a.tflite", "b.onnx").output
    assert "No layer diverges: none below 10 dB, none loses more than 10 dB at once" in output
    assert "matched by order" in output
    assert calls == []


def test_json(run: Run, calls: list[dict[str, object]]) -> None:
    document = json.loads(run("bundle", "--json").output)["debug"]
    assert calls[0]["b"] is None
    assert document["first_divergence"] == {"index": 1, "reason": "low"}
    assert document["layers"][1]["layer"] == "block"
    assert document["layers"][0]["input_sqnr_db"] is None


@pytest.mark.parametrize(("name", "head"), [("p.svg", b"<?xml"), ("p.png", b"\x89PNG")])
def test_plot(run: Run, calls: list[dict[str, object]], tmp_path: Path, name: str, head: bytes) -> None:
    path = tmp_path / name
    assert run("a.tflite", "b.onnx", "--plot", str(path)).exit_code == 0
    first = path.read_bytes()
    assert first.startswith(head)
    assert name.endswith(".png") or b"[stem].conv" in first
    run("a.tflite", "b.onnx", "--plot", str(path))
    assert path.read_bytes() == first
    assert len(calls) == 2


def test_a_plot_that_can_not_be_written_is_refused_before_any_work(
    run: Run, calls: list[dict[str, object]], tmp_path: Path
) -> None:
    for path, line in ((tmp_path / "p.doc", "take .svg or .png"), (tmp_path / "no" / "p.svg", "no such directory")):
        failure = run("a.tflite", "b.onnx", "--plot", str(path)).exception
        assert isinstance(failure, UsageError)
        assert line in failure.line()
    assert calls == []
