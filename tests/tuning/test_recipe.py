"""What `--recipe auto` keeps: made-up passes with known effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from edgeopt.compression.base import PassInputs
from edgeopt.errors import ConversionError
from edgeopt.progress import Silent
from edgeopt.tuning import recipe
from edgeopt.tuning.budget import Budget
from edgeopt.tuning.findings import findings
from edgeopt.tuning.recipe import Tuned, apply_passes, tune
from edgeopt.tuning.timing import Timed
from edgeopt.tuning.trial import Score
from edgeopt.types import EstimatorSpec, LayerRules, Scheme

MSE, MIN_MAX = EstimatorSpec("mse"), EstimatorSpec("min-max")
PLAIN_DB = 15.0


class FakePass:
    needs = "nothing"

    def __init__(self, name: str, keeps_function: bool = True, reason: str | None = None) -> None:
        self.name = name
        self.keeps_function = keeps_function
        self._reason = reason

    def not_applicable(self, model: object, scheme: object) -> str | None:
        del model, scheme
        return self._reason


class Lab:
    """Scores by (passes applied, estimator); what is not listed gets the plain file's."""

    inputs: PassInputs | None = None

    def __init__(self) -> None:
        self.db: dict[tuple[tuple[str, ...], str], float] = {}
        self.folds: dict[tuple[str, ...], tuple[float, ...]] = {}
        self.ratios: dict[tuple[str, ...], float] = {}
        self.passes: dict[str, FakePass] = {}
        self.failing: set[str] = set()
        #: Whose files were deleted: passes applied, and which estimator's.
        self.deleted: list[tuple[tuple[str, ...], str]] = []

    def add(self, name: str, **options: Any) -> None:
        self.passes[name] = FakePass(name, **options)

    def run_pass(self, pass_: FakePass, model: Any, inputs: object) -> Any:
        del inputs
        if pass_.name in self.failing:
            raise ConversionError("can't follow the graph", where="layer 'x'")
        return SimpleNamespace(history=(*model.history, pass_.name), module=object())

    def bench(self, model: Any) -> Any:
        return SimpleNamespace(
            model=model,
            torch_model=lambda: model,
            rules=LayerRules(),
            variant=self.bench,
            pass_inputs=lambda *_: self.inputs,
            clear=lambda: self.deleted.append((model.history, "all")),
            discard=lambda _format, _scheme, estimator, _rules: self.deleted.append((model.history, estimator.name)),
        )

    def tune(self, budget: Budget, names: list[str], estimators: tuple[EstimatorSpec, ...] = ()) -> Tuned:
        terms: Any = SimpleNamespace(
            format="onnx",
            scheme=Scheme("w8a8", "static"),
            runtime="onnxruntime",
            threads=1,
            recording=SimpleNamespace(first=lambda: None),
        )
        start = self.bench(SimpleNamespace(history=()))
        return tune(start, terms, MSE, budget, Silent(), estimators=estimators, passes=names)


class FakeTrials:
    lab: Lab

    def __init__(self, workbench: Any, estimator: EstimatorSpec, terms: Any) -> None:
        self.workbench, self.estimator, self.terms = workbench, estimator, terms
        self.rules = LayerRules()

    def plain(self) -> Any:
        history = self.workbench.model.history
        return SimpleNamespace(history=history, size_bytes=100, estimator=self.estimator)

    def score(self, rules: LayerRules) -> Score:
        del rules
        applied = self.workbench.model.history
        db = self.lab.db.get((applied, self.estimator.name), PLAIN_DB)
        return Score(100, db, self.lab.folds.get(applied, (db,) * 4), 1 - 10 ** (-db / 10), None, 100)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    made = Lab()

    class Bound(FakeTrials):
        lab = made

    def no_layers(*_: object) -> None:
        raise ConversionError("no layer with weights is quantized")

    def together(files: list[Any], *_: object) -> tuple[Timed, ...]:
        return tuple(Timed(1.0, made.ratios.get(file.history, 1.0), (1.0, 1.0)) for file in files)

    monkeypatch.setattr(recipe, "Trials", Bound)
    monkeypatch.setattr(recipe, "load_pass", lambda name: made.passes[name])
    monkeypatch.setattr(recipe, "run_pass", made.run_pass)
    monkeypatch.setattr(recipe, "find_layers", no_layers)
    monkeypatch.setattr(recipe, "time_together", together)
    return made


def _outcomes(tuned: Tuned) -> Mapping[str, str]:
    return {step.name: step.outcome for step in tuned.steps}


MOST = Budget(max_latency_ratio=1.1)


def test_what_helps_is_kept_and_what_harms_is_not(lab: Lab) -> None:
    lab.add("good")
    lab.add("bad")
    lab.db = {(("good",), "mse"): 18.0, (("good", "bad"), "mse"): 16.0}
    tuned = lab.tune(MOST, ["good", "bad"])
    assert _outcomes(tuned) == {"good": "kept", "bad": "not kept", "mixed precision": "not applicable"}
    assert tuned.workbench.model.history == ("good",)
    assert (tuned.before.sqnr_db, tuned.after.sqnr_db) == (15.0, 18.0)


def test_a_gain_in_some_samples_only_is_chance(lab: Lab) -> None:
    lab.add("lucky", keeps_function=False)
    lab.db = {(("lucky",), "mse"): 15.4}
    lab.folds = {("lucky",): (16.5, 15.5, 15.2, 14.9)}
    assert lab.tune(MOST, ["lucky"]).workbench.model.history == ()


def test_groundwork_stays_only_if_a_later_pass_needs_it(lab: Lab) -> None:
    for name in ("fold", "round", "useless"):
        lab.add(name)
    lab.db = {(("fold", "round"), "mse"): 19.0}
    tuned = lab.tune(MOST, ["fold", "round", "useless"])
    assert _outcomes(tuned)["fold"] == "groundwork"
    assert tuned.workbench.model.history == ("fold", "round")
    assert lab.tune(MOST, ["fold"]).workbench.model.history == ()


def test_a_pass_that_changes_the_function_is_no_groundwork(lab: Lab) -> None:
    lab.add("shift", keeps_function=False)
    lab.add("good")
    lab.db = {(("good",), "mse"): 18.0}
    assert lab.tune(MOST, ["shift", "good"]).workbench.model.history == ("good",)


def test_a_pass_that_slows_the_file_must_gain_a_lot(lab: Lab) -> None:
    lab.add("slow")
    lab.ratios = {("slow",): 1.08}
    lab.db = {(("slow",), "mse"): 16.0}
    assert lab.tune(MOST, ["slow"]).workbench.model.history == ()
    lab.db = {(("slow",), "mse"): 19.0}
    assert lab.tune(MOST, ["slow"]).workbench.model.history == ("slow",)
    lab.ratios = {("slow",): 1.3}
    assert lab.tune(MOST, ["slow"]).workbench.model.history == ()


def test_the_better_estimator_is_found_again_after_passes(lab: Lab) -> None:
    lab.add("equalize")
    lab.db = {(("equalize",), "mse"): 18.0, (("equalize",), "min-max"): 18.5}
    tuned = lab.tune(MOST, ["equalize"], (MSE, MIN_MAX))
    assert tuned.estimator == MIN_MAX
    assert tuned.after.sqnr_db == 18.5


def test_a_pass_that_fails_or_does_not_apply_is_noted_and_the_rest_goes_on(lab: Lab) -> None:
    lab.add("broken")
    lab.add("other", reason="there are no convolutions")
    lab.add("good")
    lab.failing = {"broken"}
    lab.db = {(("good",), "mse"): 18.0}
    tuned = lab.tune(MOST, ["broken", "other", "good"])
    assert _outcomes(tuned) | {"mixed precision": ""} == {
        "broken": "failed", "other": "not applicable", "good": "kept", "mixed precision": "",
    }  # fmt: skip
    assert "layer 'x'" in tuned.steps[0].note


def test_an_accuracy_budget_that_the_plain_file_keeps_needs_no_work(lab: Lab) -> None:
    lab.add("good")
    lab.db = {(("good",), "mse"): 30.0}
    tuned = lab.tune(Budget(min_sqnr_db=14.0), ["good"], (MSE, MIN_MAX))
    assert tuned.met
    assert tuned.steps == ()


def test_the_search_ends_when_the_budget_is_kept(lab: Lab) -> None:
    lab.add("good")
    lab.add("better")
    lab.db = {(("good",), "mse"): 18.0, (("good", "better"), "mse"): 20.0}
    tuned = lab.tune(Budget(min_sqnr_db=17.0), ["good", "better"])
    assert tuned.workbench.model.history == ("good",)
    assert tuned.met


def test_only_files_of_the_best_and_of_the_plain_one_stay(lab: Lab) -> None:
    for name in ("good", "bad", "better"):
        lab.add(name)
    lab.db = {(("good",), "mse"): 18.0, (("good", "better"), "mse"): 20.0, (("good", "better"), "min-max"): 21.0}
    lab.tune(MOST, ["good", "bad", "better"], (MSE, MIN_MAX))
    assert lab.deleted == [
        ((), "min-max"),  # not kept; the plain file's estimator stays, and with it what latencies are held against
        (("good", "bad"), "all"),
        (("good",), "all"),
        (("good", "better"), "mse"),
    ]


def test_a_shortened_search_says_so(lab: Lab) -> None:
    tuned = lab.tune(MOST, [])
    for format_, codes in (("executorch", ["search-shortened"]), ("onnx", [])):
        analysed: Any = SimpleNamespace(format=format_)
        found = findings(replace(tuned, sensitivity=analysed, steps=()))
        assert [finding.code for finding in found] == codes


def test_every_step_becomes_a_finding_and_a_missed_budget_one_more(lab: Lab) -> None:
    lab.add("good")
    lab.db = {(("good",), "mse"): 18.0}
    found = findings(lab.tune(Budget(min_sqnr_db=40.0), ["good"]))
    assert [finding.code for finding in found] == ["recipe-step", "recipe-step", "budget-not-met"]
    assert found[0].where == "good"
    assert found[0].message.startswith("kept: SQNR 18.00 dB, agreement 98.42 %")
    assert "18.00 dB" in found[-1].message


def test_named_passes_run_in_order_and_all_of_them(lab: Lab) -> None:
    lab.add("one")
    lab.add("two")
    bench = lab.bench(SimpleNamespace(history=()))
    scheme = Scheme("w8a8", "static")
    assert apply_passes(bench, ["two", "one"], scheme, MSE, Silent()).model.history == ("two", "one")
    assert apply_passes(bench, [], scheme, MSE, Silent()) is bench


@pytest.mark.parametrize(("db", "kept"), [(26.0, True), (19.0, False)])
def test_passes_that_fit_weights_run_again_for_the_chosen_assignment(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, db: float, kept: bool
) -> None:
    rules = LayerRules(("stem",))
    point = SimpleNamespace(
        float_layers=("stem",), int16_layers=(), rules=rules, score=Score(100, 25.0, (25.0,) * 4, 0.9, None, 100)
    )
    frontier = SimpleNamespace(chosen=point, met=True, efficient=())
    monkeypatch.setattr(recipe, "find_layers", lambda *_: None)
    monkeypatch.setattr(recipe, "analyse", lambda *_: None)
    monkeypatch.setattr(recipe, "search", lambda *_: frontier)
    given: list[LayerRules] = []

    def run_pass(pass_: FakePass, model: Any, inputs: Any) -> Any:
        given.append(inputs.rules)
        again = "again" if inputs.rules == rules else pass_.name
        return SimpleNamespace(history=(*model.history, again), module=object())

    monkeypatch.setattr(recipe, "run_pass", run_pass)
    monkeypatch.setattr(Lab, "inputs", PassInputs(Scheme("w8a8", "static"), None, 0, 0, Silent(), MSE, LayerRules()))
    lab.add("fold")
    lab.add("round", keeps_function=False)
    lab.db = {(("fold", "round"), "mse"): 20.0, (("fold", "again"), "mse"): db}
    tuned = lab.tune(MOST, ["fold", "round"])
    assert given == [LayerRules(), LayerRules(), rules]  # folding needs no second run
    assert tuned.workbench.model.history == ("fold", "again" if kept else "round")
    assert tuned.after.sqnr_db == (db if kept else 20.0)
    assert tuned.rules == (rules if kept else LayerRules())
