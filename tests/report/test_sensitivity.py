"""The sensitivities as a person and as a program reads them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from edgeopt.json_data import dumps
from edgeopt.report.sensitivity import render_sensitivity, save_sensitivity_plot, sensitivity_document
from edgeopt.tuning.sensitivity import LayerSensitivity, Sensitivity
from edgeopt.tuning.trial import Score

ALONE = LayerSensitivity("features.0", "Conv", 0.01, 0.8, 20.0, 0.95, 0.02, ("features.0",), 0.123, 0.456, 1024, 4096)
GROUPED = replace(
    ALONE, layer="odd[red]name", share=0.1, drop=None, group=("odd[red]name", "head"), int8_ms=None, int8_bytes=None
)
FOUND = Sensitivity(
    "net", "onnx", "onnxruntime", "w8a8", 8, Score(64, 19.5, (19.5,) * 4, 0.98, 0.01, 9000),
    (ALONE, GROUPED, replace(GROUPED, layer="head")), 7, "profiled",
)  # fmt: skip


def _printed(found: Sensitivity) -> str:
    stream = io.StringIO()
    render_sensitivity(found, Console(file=stream, width=120))
    return stream.getvalue()


def test_the_table_is_ranked_and_says_what_was_measured_together() -> None:
    text = _printed(FOUND)
    assert text.index("features.0") < text.index("odd[red]name *")
    assert "All layers quantized: SQNR 19.5 dB, agreement 98.00 %, accuracy drop 1.00 %, on 64 samples" in text
    assert "0.123 / 0.456" in text
    assert "- / 0.456" in text
    assert "measured with its neighbours only" in text


def test_without_labels_there_is_no_drop() -> None:
    unlabelled = replace(FOUND, plain=replace(FOUND.plain, drop=None))
    assert "drop" not in _printed(unlabelled)


def test_long_lists_are_cut_on_the_terminal_only() -> None:
    many = replace(FOUND, layers=tuple(replace(ALONE, layer=f"layer{k}") for k in range(40)))
    assert "and 15 more" in _printed(many)
    assert len(json.loads(dumps(sensitivity_document(many)))["sensitivity"]["layers"]) == 40


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_picture_is_the_same_for_the_same_figures(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        save_sensitivity_plot(FOUND, path)
    assert paths[0].read_bytes() == paths[1].read_bytes() != b""
