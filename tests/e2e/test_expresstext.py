"""`edgeopt case-study expresstext --scale smoke`: teacher, student, both prunings, QAT, files that write, the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeopt.bundle.generation_reader import open_generation_bundle
from edgeopt.case_studies.expresstext import Order, Result, run

pytestmark = pytest.mark.e2e

_STEPS = ("distil", "prune", "sparsify", "quantization-aware-training")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("expresstext")


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return run(Order(scale="smoke"), folder)


def test_the_whole_recipe_ends_in_files_that_write(result: Result, folder: Path) -> None:
    whole = result.study.outcomes["all"]
    bundle = open_generation_bundle(next((folder / "bundles" / "all").iterdir()))
    assert set(bundle.parts) == {"encoder", "decoder"}
    done = dict.fromkeys(step.step for step in bundle.parts["decoder"].history)
    assert [step for step in done if step in _STEPS] == list(_STEPS)
    assert whole.size_bytes == bundle.size_bytes < result.study.outcomes["float"].size_bytes
    assert whole.examples
    assert {"bleu", "chrf", "latency_ms", "encoder_latency_ms", "decoder_step_ms", "speedup"} <= set(whole.shipped)


def test_the_page_shows_every_entry_that_was_run(result: Result) -> None:
    page = result.page.read_text(encoding="utf-8")
    for name in ("Teacher, float", "All: distillation, both prunings, QAT"):
        assert f"| {name} |" in page
    assert "at once, untrained" in page
    assert result.html.stat().st_size > len(page)


def test_a_second_run_makes_nothing_again(result: Result, folder: Path) -> None:
    def refuse(*_: object) -> list[object]:
        raise AssertionError("was done already")

    again = run(Order(scale="smoke"), folder, exporter=refuse)  # type: ignore[arg-type]
    assert again.study.outcomes == result.study.outcomes
