"""The study's order of work, its results and its page; what it runs is stood in for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from edgeopt.bundle.generation_contents import WrittenExample
from edgeopt.case_studies import expresstext
from edgeopt.case_studies.entries import brief, config_of_entry, entries, key_of, tool_versions
from edgeopt.case_studies.expresstext import Order, run
from edgeopt.case_studies.outcome import Figure, Outcome, load_outcome, save_outcome
from edgeopt.case_studies.page import Code, Heading, Paragraph, Picture, Table, html_page, markdown
from edgeopt.case_studies.report import Study, goals, page_of
from edgeopt.compression.steps import Distil, Prune, Qat, Sparsify
from edgeopt.config import RunConfig, load_config
from edgeopt.errors import ConfigError, UsageError
from edgeopt.progress import Progress
from edgeopt.types import Bundle, Report

RECIPE = Path(expresstext.__file__).parent / "recipe" / "edgeopt.toml"


@pytest.fixture
def recipe() -> RunConfig:
    return load_config(RECIPE, {})


def entry(name: str) -> expresstext.Entry:
    return next(one for one in entries() if one.name == name)


def outcome_of(name: str, key: str = "0" * 16, bleu: float = 0.33, size: int = 4_000_000) -> Outcome:
    return Outcome(
        entry=name,
        key=key,
        target="android-int8-dynamic",
        runtime="litert",
        passed=True,
        files={"encoder/model.tflite": "a" * 64},
        size_bytes=size,
        packed_bytes=size // 2,
        shipped={
            "bleu": Figure(bleu, "fraction"),
            "latency_ms": Figure(10.0, "ms", (9.0, 12.0)),
            "speedup": Figure(4.5, "x", (4.0, 5.0)),
        },
        teacher={"bleu": Figure(0.34, "fraction"), "latency_ms": Figure(45.0, "ms", (44.0, 46.0))},
        instructions={"encoder": 20_000_000, "decoder": 3_000_000},
        not_counted=None,
        examples=(WrittenExample("A dog | runs.", "Ein Hund läuft.", "Ein Hund rennt.", "Ein Hund <b>."),),
    )


def study_of(*outcomes: Outcome) -> Study:
    return Study(
        task="translation",
        title="captions",
        outcomes={one.entry: one for one in outcomes},
        data={"train.en.gz": "b" * 64},
        teacher={"model.safetensors": "c" * 64},
        checkpoint_bytes=40_000_000,
        settings={"seed": "0"},
        tools={"torch": "2"},
        commands="edgeopt case-study expresstext",
    )


# --- the recipe and its parts -----------------------------------------------------------------------------------------


def test_the_recipe_has_all_kinds_of_steps(recipe: RunConfig) -> None:
    assert list(dict.fromkeys(type(step) for step in recipe.step)) == [Distil, Prune, Sparsify, Qat]
    assert [(step.to, step.schedule) for step in recipe.step if isinstance(step, Sparsify)] == [(0.4, "cubic")]


def test_the_example_is_the_recipe() -> None:
    example = Path(__file__).parents[2] / "examples" / "expresstext"
    for name in ("edgeopt.toml", "student.py"):
        assert (example / name).read_text() == (RECIPE.parent / name).read_text()


def test_entries_have_names_of_their_own() -> None:
    names = [one.name for one in entries()]
    assert len(set(names)) == len(names)
    assert names[0] == "float"
    assert {"sparsity-20-one-shot", "sparsity-80-cubic"} <= set(names)


def test_an_entry_is_the_recipe_with_steps_left_out(recipe: RunConfig) -> None:
    alone = config_of_entry(recipe, entry("structured"))
    assert [type(step) for step in alone.step] == [Prune]
    assert alone.target == ("android-fp32",)
    assert alone.gates_off, "a part of the recipe has no limits to keep"
    whole = config_of_entry(recipe, entry("all"))
    assert (whole.step, whole.min_speedup, whole.gates_off) == (recipe.step, 4.0, recipe.gates_off)
    assert config_of_entry(recipe, entry("float")).step == ()


def test_points_of_the_curves(recipe: RunConfig) -> None:
    at_once = config_of_entry(recipe, entry("sparsity-60-one-shot"))
    assert at_once.train is None, "magnitude alone, without training"
    trained = config_of_entry(recipe, entry("sparsity-60-cubic"))
    assert trained.train == recipe.train
    assert [step.to for step in (*at_once.step, *trained.step) if isinstance(step, Sparsify)] == [0.6, 0.6]


def test_a_recipe_without_the_step_is_told(recipe: RunConfig) -> None:
    with pytest.raises(ConfigError, match="has no step 'prune', which 'structured' is about"):
        config_of_entry(replace(recipe, step=recipe.step[-1:]), entry("structured"))


def test_the_key_changes_with_what_decides_the_result(recipe: RunConfig) -> None:
    config = config_of_entry(recipe, entry("sparsity"))
    key = key_of(config, "x")
    assert key == key_of(replace(config, output_dir=Path("elsewhere")), "x")
    assert key == key_of(config_of_entry(recipe, entry("sparsity-40-cubic")), "x"), "the same run, twice in the page"
    others = [
        key_of(config, "y"),
        key_of(replace(config, seed=1), "x"),
        key_of(config_of_entry(recipe, entry("sparsity-40-one-shot")), "x"),
        key_of(config_of_entry(recipe, entry("sparsity-20-cubic")), "x"),
    ]
    assert len({key, *others}) == 5


def test_where_the_study_lies_makes_no_difference(tmp_path: Path) -> None:
    keys = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "edgeopt.toml"
        path.write_text(RECIPE.read_text("utf-8"), "utf-8")
        keys.add(key_of(config_of_entry(load_config(path, {}), entry("all")), "x"))
    assert len(keys) == 1, "the student's code is named by the recipe, and lies beside it"


def test_a_brief_recipe_has_every_step_once(recipe: RunConfig) -> None:
    short = brief(recipe)
    assert [type(step) for step in short.step] == [type(step) for step in recipe.step]
    assert {step.training.epochs for step in short.step} == {1}
    assert short.gates_off >= {"min_speedup", "min_accuracy_kept"}


# --- a run ------------------------------------------------------------------------------------------------------------


class Runs:
    """Stands for teacher, export and bundle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.exported: list[str] = []
        self.taught = 0
        monkeypatch.setattr(expresstext, "train_teacher", self._teach)
        monkeypatch.setattr(expresstext, "open_generation_bundle", lambda path: path)
        monkeypatch.setattr(expresstext, "read_outcome", lambda name, key, *_: outcome_of(name, key))

    def _teach(self, pairs: object, config: object, directory: Path, progress: Progress) -> None:
        del pairs, config, progress
        self.taught += 1
        write_teacher(directory)

    def export(self, config: RunConfig, progress: Progress) -> Sequence[Bundle]:
        del progress
        self.exported.append(config.output_dir.name)
        report = Report("passed", "m", config.target[0], "litert", (), (), (), (), (), {})
        return (Bundle(config.output_dir, config.target[0], True, report),)


def write_teacher(directory: Path, content: str = "weights") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (directory / name).write_text(content)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


SMOKE = Order(scale="smoke", only=("float", "all"))


def test_a_run_leaves_everything_that_an_export_needs(runs: Runs, tmp_path: Path) -> None:
    result = run(SMOKE, tmp_path, exporter=runs.export)
    assert runs.exported == ["float", "all"]
    config = load_config(tmp_path / "edgeopt.toml", {})
    assert config.model == f"hf:{tmp_path / 'teacher'}"
    assert config.train == str(tmp_path / "data" / "train.jsonl")
    assert len((tmp_path / "data" / "train.jsonl").read_text().splitlines()) == 300
    assert result.page.read_text("utf-8").startswith("# ExpressText")
    assert result.html.read_text("utf-8").startswith("<!doctype html>")


def test_a_second_run_does_nothing_again(runs: Runs, tmp_path: Path) -> None:
    run(SMOKE, tmp_path, exporter=runs.export)
    page = (tmp_path / "expresstext.md").read_bytes()
    run(SMOKE, tmp_path, exporter=runs.export)
    assert (runs.taught, len(runs.exported)) == (1, 2)
    assert (tmp_path / "expresstext.md").read_bytes() == page


def test_a_changed_recipe_is_run_again(runs: Runs, tmp_path: Path) -> None:
    run(SMOKE, tmp_path, exporter=runs.export)
    recipe = tmp_path / "edgeopt.toml"
    recipe.write_text(recipe.read_text().replace('sparsity = "40%"', 'sparsity = "30%"'))
    run(SMOKE, tmp_path, exporter=runs.export)
    assert runs.exported == ["float", "all", "all"], "what does not sparsify is as it was"


def test_a_changed_student_is_run_again(runs: Runs, tmp_path: Path) -> None:
    run(SMOKE, tmp_path, exporter=runs.export)
    (tmp_path / "student.py").write_text("# another\n")
    run(SMOKE, tmp_path, exporter=runs.export)
    assert len(runs.exported) == 4


def test_code_beside_the_student_counts(runs: Runs, tmp_path: Path) -> None:
    run(SMOKE, tmp_path, exporter=runs.export)
    (tmp_path / "losses.py").write_text("# what student.py imports, or a loss\n")
    run(SMOKE, tmp_path, exporter=runs.export)
    assert len(runs.exported) == 4


def test_weights_that_were_half_written_are_trained_again(runs: Runs, tmp_path: Path) -> None:
    write_teacher(tmp_path / "teacher", "hal")
    state = tmp_path / "teacher" / "unfinished.pt"
    state.write_text("epoch 20")
    run(SMOKE, tmp_path, exporter=runs.export)
    assert runs.taught == 1


def test_an_interrupted_run_goes_on(runs: Runs, tmp_path: Path) -> None:
    def breaks(config: RunConfig, progress: Progress) -> Sequence[Bundle]:
        if config.output_dir.name == "all":
            raise KeyboardInterrupt
        return runs.export(config, progress)

    with pytest.raises(KeyboardInterrupt):
        run(SMOKE, tmp_path, exporter=breaks)
    run(SMOKE, tmp_path, exporter=runs.export)
    assert runs.exported == ["float", "all"]


def test_the_page_keeps_what_earlier_runs_found(runs: Runs, tmp_path: Path) -> None:
    run(SMOKE, tmp_path, exporter=runs.export)
    result = run(replace(SMOKE, only=("sparsity",)), tmp_path, exporter=runs.export)
    assert runs.exported == ["float", "all", "sparsity"]
    assert {"float", "all", "sparsity"} <= set(result.study.outcomes)


def test_a_folder_belongs_to_one_study(runs: Runs, tmp_path: Path) -> None:
    """Or the teacher of a smoke run would pass for the real one."""
    run(SMOKE, tmp_path, exporter=runs.export)
    with pytest.raises(UsageError, match="holds the study of another task or scale; give another --output-dir"):
        run(replace(SMOKE, task="summarization"), tmp_path, exporter=runs.export)


def test_a_given_teacher_is_taken(runs: Runs, tmp_path: Path) -> None:
    write_teacher(tmp_path / "mine")
    run(replace(SMOKE, teacher=tmp_path / "mine"), tmp_path / "out", exporter=runs.export)
    assert runs.taught == 0
    assert (tmp_path / "out" / "teacher" / "model.safetensors").read_text() == "weights"
    write_teacher(tmp_path / "mine", "others")
    with pytest.raises(UsageError, match="teacher: holds another teacher already"):
        run(replace(SMOKE, teacher=tmp_path / "mine"), tmp_path / "out", exporter=runs.export)


def test_a_folder_without_a_network_is_no_teacher(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json; give a folder as Hugging Face's"):
        run(replace(SMOKE, teacher=tmp_path), tmp_path / "out", exporter=runs.export)


def test_an_unknown_entry_is_told(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--only quantisation: there is no such entry; did you mean 'quantization'"):
        run(replace(SMOKE, only=("quantisation",)), tmp_path, exporter=runs.export)
    assert not list(tmp_path.iterdir())


# --- results and the page ---------------------------------------------------------------------------------------------


def test_an_outcome_survives_its_file(tmp_path: Path) -> None:
    outcome = outcome_of("all", "k" * 16)
    save_outcome(outcome, tmp_path)
    assert load_outcome("k" * 16, tmp_path) == outcome
    assert load_outcome("other", tmp_path) is None
    (tmp_path / f"{'k' * 16}.json").write_text(json.dumps({"entry": "all"}))
    assert load_outcome("k" * 16, tmp_path) is None, "a file of another form counts for nothing"


def test_goals_of_the_study() -> None:
    found = {goal.name: goal for goal in goals(study_of(outcome_of("float"), outcome_of("all")))}
    assert found["smaller"].measured == 10
    assert found["smaller"].is_met
    assert found["faster"].is_met
    assert found["kept"].measured == pytest.approx(0.33 / 0.34)
    assert not found["kept"].is_met
    assert found["teacher's BLEU"].measured == pytest.approx(33.0)


def test_goals_without_the_entry_are_not_known() -> None:
    assert {goal.measured for goal in goals(study_of())} == {None}


def test_the_page_tells_what_was_run_and_what_was_not() -> None:
    study = study_of(outcome_of("float"), outcome_of("all"), outcome_of("sparsity-40-cubic", bleu=0.32))
    text = markdown(page_of(study))
    assert "| All: distillation, both prunings, QAT | android-int8-dynamic | 3.81 MiB | 10.00x | 33.0 |" in text
    assert "10.00 (9.00-12.00)" in text
    assert "| cubic schedule, trained | 33.0 | - | 32.0 | - | - |" in text
    assert "at once, untrained |" not in text, "a curve without a point is not drawn"
    assert "Not run: quantization alone; " in text
    assert "A dog &#124; runs." in text
    assert "b" * 64 in text
    page = html_page("ExpressText", page_of(study))
    assert "Ein Hund &lt;b&gt;." in page
    assert page.count("<svg") == 1


def test_a_page_of_nothing_is_a_page() -> None:
    assert "Not run: teacher, float; " in markdown(page_of(study_of()))


def test_instructions_that_are_missing_are_explained() -> None:
    outcome = replace(outcome_of("all"), instructions={}, not_counted="the emulator is not set up")
    assert "could not be counted: the emulator is not set up." in markdown(page_of(study_of(outcome)))


def test_what_zeros_buy_is_told_by_runtime() -> None:
    sparse = replace(outcome_of("sparsity"), packed_bytes=1_000_000)
    text = markdown(page_of(study_of(outcome_of("float"), sparse)))
    assert "| litert | 1.00 | 0.50 | 4.50x | 1.00 | 1.00 |" in text


def test_blocks_in_both_forms() -> None:
    blocks = [
        Heading("A & B", 3), Paragraph("x < y"), Table(("n", "v"), (("a\nb", "1"),)), Code("run\n"),
        Picture("p.svg", "a line", '<?xml version="1.0"?>\n<svg width="1"></svg>'),
    ]  # fmt: skip
    assert markdown(blocks) == (
        "### A & B\n\nx < y\n\n| n | v |\n| --- | --: |\n| a b | 1 |\n\n```\nrun\n```\n\n![a line](p.svg)\n"
    )
    page = html_page("t", blocks)
    assert "<h3>A &amp; B</h3>" in page
    assert "<td class=right>1</td>" in page
    assert "<?xml" not in page
    assert '<svg width="1"></svg>' in page


def test_versions_of_the_tools_that_are_there() -> None:
    assert {"edgeopt", "torch"} <= set(tool_versions())
