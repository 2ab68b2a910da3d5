"""`edgeopt llm`: what it asks for and what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from edgeopt.cli.console import Settings
from edgeopt.cli.failures import report_failure
from edgeopt.cli.llm import llm
from edgeopt.llm_layouts import Layout, LayoutFile, LayoutProof

Run = Callable[..., tuple[int, str, str]]
PROOF = LayoutProof(0.9375, 21.5, 2, 16, "evaluation set", "onnxruntime")
FILES = (LayoutFile("model.onnx", 2048, 8192), LayoutFile("tokenizer.json", 1024, 1024))
LAYOUT = Layout(Path("dist/net-w4-llm"), "w4", "onnxruntime-genai", "w4", FILES, PROOF, has_tokenizer=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command()(llm)
    command = get_command(app)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            code = command.main(["llm", *arguments], standalone_mode=False, obj=Settings()) or 0
        except Exception as error:
            code = report_failure(error, debug=False)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The configurations that it was called with."""
    seen: list[object] = []

    def stand_in(config: object, _: object) -> tuple[Layout, ...]:
        seen.append(config)
        return (LAYOUT,)

    monkeypatch.setattr("edgeopt.llm_layouts.write_layouts", stand_in)
    return seen


def test_table(run: Run, written: list[object]) -> None:
    code, out, _ = run("hf:dir", "--target", "w4", "--max-target-length", "64", "--seed", "3")
    assert code == 0
    assert "w4 for onnxruntime-genai" in out
    row = next(line for line in out.splitlines() if line.startswith("model.onnx"))
    assert row.split() == ["model.onnx", "2.0", "KiB", "8.0", "KiB"]
    assert "93.75 %" in out
    assert "21.5 dB" in out
    assert "was not run" in " ".join(out.split())
    assert "the app must bring its own" in out
    assert "Folder: dist/net-w4-llm" in out
    (config,) = written
    assert (config.model, config.target, config.max_target_length, config.seed) == ("hf:dir", ("w4",), 64, 3)


@pytest.mark.usefixtures("written")
def test_json(run: Run) -> None:
    code, out, _ = run("hf:dir", "--target", "w4", "--json")
    assert code == 0
    (layout,) = json.loads(out)["layouts"]
    assert layout["path"] == "dist/net-w4-llm"
    assert layout["provenance"] == "measured-host"
    assert layout["proof"]["agreement"] == 0.9375
    assert layout["files"][0] == {"name": "model.onnx", "size_bytes": 2048, "float_bytes": 8192}


def test_no_model(run: Run) -> None:
    code, _, err = run("--target", "android-onnx-w4")
    assert code == 2
    assert "no model to write" in err
