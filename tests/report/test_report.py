"""The terminal report and report.json."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from edgeopt.errors import UsageError
from edgeopt.report import from_json, render, render_summary, to_json
from edgeopt.report.units import quantity
from edgeopt.types import Check, Finding, Measurement, OpPlacement, OpTiming, Placement, Report, UnquantizedOp


def latency(subject: str, value: float, spread: tuple[float, float]) -> Measurement:
    return Measurement("latency_ms", subject, value, "ms", "measured-host", "litert", 1, 50, spread)


REPORT = Report(
    status="failed",
    model="net",
    target="linux-arm64-onnx-int8-dynamic",
    runtime="litert",
    checks=(
        Check("accuracy_drop", 0.0038, 0.01, "<=", "fraction", passed=True),
        Check("sqnr_db", 18.62, 10.0, ">=", "dB", passed=True),
        Check("speedup", 0.82, 1.0, ">=", "x", passed=False, advice="try something else"),
        Check("size_bytes", 5_100_000, 6 << 20, "<=", "bytes", passed=True),
    ),
    measurements=(
        Measurement("top1", "float", 0.8323, "fraction", "measured-host", "litert"),
        Measurement("top1", "quantized", 0.8285, "fraction", "measured-host", "litert"),
        latency("float", 5.93, (5.9, 6.02)),
        latency("quantized", 2.31, (2.3, 2.35)),
    ),
    unquantized_ops=tuple(UnquantizedOp(f"norm.{i}", "LayerNorm", "no int8 kernel") for i in range(8)),
    op_timings=(OpTiming("conv[0]", "CONV_2D", 0.5),),
    findings=(Finding("saturated", "input 'image'", "38 % at the bound"),),
    evaluation={"samples": 200, "origin": "evaluation set", "machine": "x86_64"},
)


def plain_console(width: int) -> Console:
    return Console(width=width, no_color=True, record=True, file=io.StringIO())


def shown(report: Report, width: int = 80) -> str:
    console = plain_console(width)
    render(report, console)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_render_fits_and_says_everything_in_words(width: int) -> None:
    text = shown(REPORT, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert text.startswith("FAILED  net for linux-arm64-onnx-int8-dynamic (proven in litert)")
    pieces = [
        "missed: speed-up",
        "Evaluated on 200 samples (evaluation set)",
        "0.38 %",
        "<= 1.00 %",
        "18.6 dB",
        "4.86 MiB",
        "5.93 ms [5.90-6.02]",
        "2.57x faster",
        "-0.38 points",
        "host x86-64",
        "8 x LayerNorm: no int8 kernel",
        "and 6 more",
        "conv[0]",
        "[saturated]",
        "speed-up: try something else",
    ]
    for piece in pieces:
        assert piece in " ".join(text.split())


def test_render_of_a_float_file_has_no_empty_columns() -> None:
    text = shown(replace(REPORT, measurements=REPORT.measurements[::2]))
    assert "shipped" not in text
    assert "83.23 %" in text


def test_render_of_a_float_file_stands_beside_its_source() -> None:
    source = Measurement("top1", "source", 0.84, "fraction", "measured-host", "litert")
    text = shown(replace(REPORT, measurements=(source, *REPORT.measurements[::2])))
    assert "source" in text
    assert "-0.77 points" in text


def test_render_of_nothing_measured_is_just_the_verdict() -> None:
    bare = Report("passed", "net", "t", "litert", (), (), (), (), (), {})
    assert shown(bare).strip() == "PASSED  net for t (proven in litert)"


@pytest.mark.parametrize("width", [80, 120])
def test_summary_keeps_targets_and_verdicts_whole(width: int) -> None:
    console = plain_console(width)
    render_summary([REPORT, replace(REPORT, status="passed", target="android-int8")], console)
    lines = console.export_text().splitlines()
    assert any(line.startswith("linux-arm64-onnx-int8-dynamic  FAILED") and "0.82x" in line for line in lines)
    assert any(line.startswith("android-int8") and "passed" in line and "2.31 ms" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "ms", "not measured"),
        (math.nan, "dB", "not measured"),
        (math.inf, "dB", "exact"),
        (0.0123456, "ms", "0.0123 ms"),
        (12.34, "ms", "12.3 ms"),
        (1234.5, "ms", "1234 ms"),
        (0.0, "ms", "0 ms"),
        (512, "bytes", "512 B"),
        (5 << 20, "bytes", "5.00 MiB"),
        (0.005, "fraction", "0.50 %"),
        (1.0, "x", "1.00x"),
        (3.0, "", "3"),
    ],
)
def test_quantities(value: float | None, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_json_round_trip_with_the_keys_that_tools_rely_on() -> None:
    text = to_json(REPORT, "abc")
    assert from_json(text) == REPORT
    plain = json.loads(text)
    assert plain["manifest_sha256"] == "abc"
    assert plain["status"] == "failed"
    assert plain["checks"][2].items() >= {"name": "speedup", "measured": 0.82, "limit": 1.0, "passed": False}.items()
    assert plain["unquantized_ops"][0] == {"name": "norm.0", "type": "LayerNorm", "reason": "no int8 kernel"}
    assert to_json(REPORT, "abc") == text


def test_an_infinite_sqnr_survives_as_a_json_number() -> None:
    exact = replace(REPORT, checks=(Check("sqnr_db", math.inf, 60.0, ">=", "dB", passed=True),))
    text = to_json(exact, "")
    assert "Infinity" not in text
    assert from_json(text) == exact


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a report"),
        ('{"schema_version": 9}', "schema version 9"),
        ('{"schema_version": 1, "status": "fine"}', "report.json: status"),
    ],
)
def test_a_malformed_report_is_one_line(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        from_json(text)


def test_what_a_recipe_tried_is_shown_whole_and_apart_from_warnings() -> None:
    steps = tuple(Finding("recipe-step", f"step {i}", "not kept") for i in range(12))
    text = shown(replace(REPORT, findings=(Finding("odd-input", "image", "is constant"), *steps)))
    tried, warnings = text.split("What the recipe tried")[1].split("Findings")
    assert all(f"step {i}: not kept" in tried for i in range(12))
    assert "recipe-step" not in text
    assert "image: is constant [odd-input]" in warnings


PLACED = replace(
    REPORT,
    placement=Placement(
        "Ethos-U55-128",
        "vela 5.1.0",
        predicted=False,
        ops=(
            OpPlacement("conv;1", "CONV_2D", "accelerator", layer="stem.conv", ms=0.2),
            OpPlacement(
                "erf;1", "ERF", "cpu", layer="block.0.act", reason="not supported", fix="take GELU's tanh form"
            ),
            OpPlacement(
                "erf;2", "ERF", "cpu", layer="block.1.act", reason="not supported", fix="take GELU's tanh form"
            ),
        ),
    ),
    evaluation={**REPORT.evaluation, "emulates": "integer arithmetic of the Ethos-U"},
)


def test_a_placement_names_what_falls_back_and_why() -> None:
    text = " ".join(shown(PLACED, 120).split())
    assert "(proven in litert)" in text
    assert "In place of the device: integer arithmetic of the Ethos-U" in text
    assert "On Ethos-U55-128: 1 of 3 operators (says vela 5.1.0)" in text
    assert "2 x ERF on the CPU: not supported (block.0.act, block.1.act); take GELU's tanh form" in text
    assert "0.200 ms (100%) CONV_2D stem.conv" in text


def test_a_full_placement_says_so_and_comes_back_from_json() -> None:
    assert PLACED.placement is not None
    full = replace(PLACED, placement=replace(PLACED.placement, predicted=True, ops=PLACED.placement.ops[:1]))
    text = " ".join(shown(full, 120).split())
    assert "1 of 1 operators (predicted by vela 5.1.0) none on the CPU" in text
    assert from_json(to_json(full, "")) == full
