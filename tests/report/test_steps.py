"""What each step of a recipe did, as a table and as a chart."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from edgeopt.report import render
from edgeopt.report.steps import count, draw_steps
from edgeopt.report_file import from_json, to_json
from edgeopt.types import Report, StepFigures


def figures(step: str, share: float, score: float | None = 0.93) -> StepFigures:
    macs, size = round(26e6 * share), round(7e5 * share)
    return StepFigures(step, 1000, score, 0.98, 30.0, macs, size, size, 0.3 * share, (0.29 * share, 0.31 * share))


def a_report(*steps: StepFigures) -> Report:
    return Report("passed", "net", "android-int8", "litert", (), (), (), (), (), {}, steps)


def shown(report: Report) -> str:
    buffer = io.StringIO()
    render(report, Console(file=buffer, width=80))
    return buffer.getvalue()


def test_every_step_has_a_row() -> None:
    text = shown(a_report(figures("start", 1.0), figures("prune", 0.5, 0.925), figures("qat", 0.5)))
    assert "What each step did" in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(("start", "prune", "qat"))]
    assert [row[0] for row in rows] == ["start", "prune", "qat"]
    assert rows[1][1] == "0.925"
    assert "13.0 M" in text
    assert "…" not in text


def test_without_labels_agreement_is_shown() -> None:
    text = shown(a_report(figures("start", 1.0, None), figures("prune", 0.5, None)))
    assert "agreement" in text
    assert "98.00 %" in text


def test_without_steps_nothing_is_shown() -> None:
    assert "What each step did" not in shown(a_report())


def test_the_chart_is_the_same_for_the_same_figures() -> None:
    report = a_report(figures("start", 1.0), figures("prune", 0.5))
    assert draw_steps(report) == draw_steps(report)
    assert b"<svg" in draw_steps(report)


def test_a_model_that_torch_can_not_count_has_a_chart_too() -> None:
    start = StepFigures("start", 10, None, None, None, None, None, 10, 1.0, (1.0, 1.0))
    assert b"<svg" in draw_steps(a_report(start, start))


def test_the_report_file_keeps_the_steps_and_old_ones_have_none() -> None:
    report = a_report(figures("start", 1.0), figures("prune", 0.5))
    assert from_json(to_json(report, "")) == report
    old = to_json(a_report(), "").replace('  "steps": [],\n', "")
    assert '"steps"' not in old
    assert from_json(old).steps == ()


@pytest.mark.parametrize(
    ("number", "text"), [(None, "-"), (999, "999"), (1536, "1.54 k"), (26_510_592, "26.5 M"), (3_200_000_000, "3.20 G")]
)
def test_counts(number: int | None, text: str) -> None:
    assert count(number) == text
