"""`edgeopt case-study`: what it asks for, what it prints, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from edgeopt.case_studies import expresstext
from edgeopt.case_studies.expresstext import Order, Result
from edgeopt.case_studies.report import Goal, Study
from edgeopt.cli.case_study import case_study
from edgeopt.cli.console import Settings
from edgeopt.cli.failures import report_failure

Run = Callable[..., tuple[int, str, str]]
STUDY = Study("translation", "captions", {}, {}, {}, 1, {}, {}, "")
MET = (Goal("smaller", 8.0, 9.5, "x"), Goal("kept", 0.99, 0.992, "fraction"))


@pytest.fixture
def result(tmp_path: Path) -> Result:
    return Result(tmp_path / "expresstext.md", tmp_path / "expresstext.html", STUDY, MET)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "160")
    app = typer.Typer()
    app.add_typer(case_study)

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            command = get_command(app)
            words = ["case-study", *map(str, arguments)]
            code = command.main(words, "edgeopt", standalone_mode=False, obj=Settings())
        except Exception as error:
            code = report_failure(error, debug=False)
        captured = capsys.readouterr()
        return int(code or 0), captured.out, captured.err

    return call


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch, result: Result) -> list[tuple[Order, Path]]:
    """What was asked for; the study itself is not run."""
    asked: list[tuple[Order, Path]] = []

    def stand_in(order: Order, directory: Path, *_: object) -> Result:
        asked.append((order, directory))
        return result

    monkeypatch.setattr(expresstext, "run", stand_in)
    return asked


def test_every_flag_arrives(run: Run, orders: list[tuple[Order, Path]], tmp_path: Path) -> None:
    flags = ("--task", "summarization", "--scale", "smoke", "--data", tmp_path, "--teacher", tmp_path / "t")
    code, _, err = run("expresstext", *flags, "--only", "float", "--only", "all", "--output-dir", tmp_path / "out")
    assert (code, err) == (0, "")
    assert orders == [(Order("summarization", "smoke", tmp_path, tmp_path / "t", ("float", "all")), tmp_path / "out")]


def test_the_goals_are_printed(run: Run, orders: list[tuple[Order, Path]], result: Result) -> None:
    code, out, _ = run("expresstext")
    assert orders == [(Order(), Path("expresstext"))]
    assert code == 0
    assert "9.50x" in out
    assert "99.20 %" in out
    assert str(result.page) in out


@pytest.mark.usefixtures("orders")
def test_json_is_one_document(run: Run, result: Result) -> None:
    code, out, _ = run("expresstext", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["page"] == str(result.page)
    assert document["goals"][0]["measured"] == 9.5


@pytest.mark.parametrize(("scale", "code"), [("full", 1), ("smoke", 0)])
def test_a_missed_goal_fails_at_full_scale_only(
    run: Run, monkeypatch: pytest.MonkeyPatch, result: Result, scale: str, code: int
) -> None:
    missed = replace(result, goals=(MET[0], Goal("faster", 4.0, 3.5, "x")))
    monkeypatch.setattr(expresstext, "run", lambda *_: missed)
    found, _, err = run("expresstext", "--scale", scale)
    assert found == code
    assert ("missed: faster" in err) is bool(code)


def test_goals_that_were_not_measured_are_not_missed(run: Run, monkeypatch: pytest.MonkeyPatch, result: Result) -> None:
    """With --only the whole recipe may not be among what was run."""
    monkeypatch.setattr(expresstext, "run", lambda *_: replace(result, goals=(Goal("faster", 4.0, None, "x"),)))
    code, out, _ = run("expresstext", "--only", "float")
    assert code == 0
    assert "not measured" in out


def test_another_word_is_told(run: Run) -> None:
    code, _, err = run("expresstext", "--scale", "medium")
    assert code == 2
    assert "medium" in err
