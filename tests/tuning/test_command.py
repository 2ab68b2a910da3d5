"""`edgeopt sensitivity`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from edgeopt.cli.sensitivity import sensitivity
from edgeopt.config import RunConfig
from edgeopt.errors import UsageError
from edgeopt.tuning import analysis
from edgeopt.tuning.sensitivity import LayerSensitivity, Sensitivity
from edgeopt.tuning.trial import Score

FOUND = Sensitivity(
    "net", "onnx", "onnxruntime", "w8a8", 8, Score(64, 19.5, (19.5,) * 4, 0.98, None, 9000),
    (LayerSensitivity("stem", "Conv", 0.01, 1.0, 20.0, 0.95, None, ("stem",), 0.1, 0.2, 10, 40),), 3, "profiled",
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, Path | None]]:
    calls: list[tuple[RunConfig, Path | None]] = []

    def analysed(config: RunConfig, state: Path | None, progress: object) -> Sensitivity:
        del progress
        calls.append((config, state))
        return FOUND

    monkeypatch.setattr(analysis, "sensitivity_of", analysed)
    return calls


def _run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(sensitivity)
    return CliRunner().invoke(app, list(arguments))


def test_flags_reach_the_analysis_and_the_table_is_printed(asked: list[tuple[RunConfig, Path | None]]) -> None:
    result = _run("--example", "digits", "--target", "android-onnx-int8", "--keep-float", "head", "--resume", "state")
    assert result.exit_code == 0
    assert "stem" in result.stdout
    config, state = asked[0]
    assert (config.target, config.keep_float, state) == (("android-onnx-int8",), ("head",), Path("state"))


def test_figures_go_to_files(tmp_path: Path, asked: list[tuple[RunConfig, Path | None]]) -> None:
    output, plot = tmp_path / "figures.json", tmp_path / "layers.svg"
    result = _run("--example", "digits", "--output", str(output), "--plot", str(plot), "--json")
    assert len(asked) == 1
    assert json.loads(result.stdout) == json.loads(output.read_text())
    assert json.loads(output.read_text())["sensitivity"]["layers"][0]["layer"] == "stem"
    assert "<svg" in plot.read_text()


def test_an_output_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, asked: list[tuple[RunConfig, Path | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "figures.json"
    output.write_text("before")

    def fill_the_disk(self: Path, text: str, encoding: str) -> None:
        del text, encoding
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    result = _run("--example", "digits", "--output", str(output))
    assert isinstance(result.exception, UsageError)
    assert "No space left" in result.exception.line()
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert output.read_text() == "before"
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ((), "nothing to look at"),
        (("--example", "digits", "--output", "no/such/folder/x.json"), "--output"),
        (("--example", "digits", "--plot", "layers.bmp"), "layers.bmp"),
    ],
)
def test_mistakes_are_refused_before_any_work(
    arguments: tuple[str, ...], where: str, asked: list[tuple[RunConfig, Path | None]]
) -> None:
    result = _run(*arguments)
    assert isinstance(result.exception, UsageError)
    assert where in result.exception.line()
    assert asked == []
