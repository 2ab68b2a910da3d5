"""The searches, on made-up networks where the right answer is known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeopt.errors import ConversionError
from edgeopt.layer_names import layer_is_exempt
from edgeopt.progress import Silent
from edgeopt.tuning import assignment, bench, sensitivity
from edgeopt.tuning.assignment import search
from edgeopt.tuning.budget import Budget, Cost
from edgeopt.tuning.effort import effort_for
from edgeopt.tuning.frontier import Frontier
from edgeopt.tuning.layers import Layer, Layers
from edgeopt.tuning.prediction import Assignment, Predictor
from edgeopt.tuning.sensitivity import Sensitivity, analyse
from edgeopt.tuning.timing import Timed
from edgeopt.tuning.trial import Score
from edgeopt.types import Artifact, EstimatorSpec, LayerRules, Scheme, Signature

CONVERSION_MS = 0.05


class World:
    """A network whose noise, time and bytes per layer are given; stands in for exporter, runtime and clock."""

    def __init__(self, noise: Sequence[float], int8_ms: Sequence[float], float_ms: Sequence[float]) -> None:
        self.names = [f"blocks.{k // 3}.{k % 3}" for k in range(len(noise))]
        self.noise = dict(zip(self.names, noise, strict=True))
        self.ms = {n: (a, b) for n, a, b in zip(self.names, int8_ms, float_ms, strict=True)}
        self.layers = Layers(tuple(Layer(name, "Conv", 4000) for name in self.names))
        self.estimator = EstimatorSpec()
        self.rules = LayerRules()
        self.made = 0
        #: Files on disk beside the plain one, and the most there ever were.
        self.files: set[LayerRules] = set()
        self.most_files = 0
        self.converted: list[LayerRules] = []
        self.unconvertible: tuple[str, ...] | None = None
        self.terms = SimpleNamespace(
            format="onnx",
            scheme=Scheme("w8a8", "static"),
            runtime="onnxruntime",
            threads=1,
            recording=SimpleNamespace(first=lambda: None),
        )
        self.workbench = SimpleNamespace(
            model=SimpleNamespace(name="net"), float_artifact=lambda _: self._describe(LayerRules(("*",)))
        )

    def rules_with(self, keep_float: Sequence[str] = (), int16: Sequence[str] = ()) -> LayerRules:
        return LayerRules(tuple(keep_float), tuple(int16))

    def plain(self) -> Artifact:
        return self.artifact(self.rules)

    def artifact(self, rules: LayerRules) -> Artifact:
        if rules.keep_float == self.unconvertible:
            raise ConversionError("no kernel")
        if rules != self.rules:
            if rules not in self.files:
                self.converted.append(rules)
            self.files.add(rules)
            self.most_files = max(self.most_files, len(self.files))
        return self._describe(rules)

    def _describe(self, rules: LayerRules) -> Artifact:
        size = sum(4000 if self._is_float(name, rules) else 1000 for name in self.names)
        name = "|".join(rules.keep_float)
        return Artifact(Path(name or "plain"), "onnx", "w8a8", Signature((), ()), size, name, (), {}, ())

    def discard(self, rules: LayerRules) -> None:
        self.files.discard(rules)

    def score(self, rules: LayerRules, samples: int | None = None) -> Score:
        self.made += 1
        noise = sum(self.noise[name] for name in self.names if not self._is_float(name, rules)) + 1e-12
        db = float(-10 * np.log10(noise))
        agreement = 1 - min(noise, 1.0)
        size = self.artifact(rules).size_bytes
        return Score(samples or 10_000, db, (db, db, db, db), agreement, None, size)

    def time(self, rules: LayerRules) -> float:
        flags = [self._is_float(name, rules) for name in self.names]
        changes = sum(a != b for a, b in itertools.pairwise(flags))
        return sum(self.ms[n][f] for n, f in zip(self.names, flags, strict=True)) + CONVERSION_MS * changes

    def _is_float(self, name: str, rules: LayerRules) -> bool:
        return layer_is_exempt(name, rules.keep_float)

    def together(self, files: Sequence[Artifact], *_: object) -> tuple[Timed, ...]:
        assert {file.sha256 for file in files} <= {"", "*", *("|".join(rules.keep_float) for rules in self.files)}
        times = [self.time(LayerRules(tuple(filter(None, file.sha256.split("|"))))) for file in files]
        return tuple(Timed(ms, ms / times[0], (ms, ms)) for ms in times)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """24 layers; the first two and one in the middle make most of the noise."""
    random = np.random.default_rng(0)
    noise = random.uniform(1e-5, 3e-5, 24)
    noise[[0, 1, 13]] = 4e-3, 3e-3, 2e-3
    int8_ms = random.uniform(0.05, 0.15, 24)
    made = World(noise, int8_ms, int8_ms * random.uniform(1.5, 3.0, 24))
    _install(made, monkeypatch)
    return made


def _install(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(artifact: Artifact, *_: object) -> dict[str, float]:
        is_float = artifact.sha256 == "*"
        return {name: made.ms[name][is_float] for name in made.names}

    monkeypatch.setattr(sensitivity, "layer_times", times)
    monkeypatch.setattr(sensitivity, "int8_bytes", lambda *_: dict.fromkeys(made.names, 1000))
    monkeypatch.setattr(bench, "time_together", made.together)
    monkeypatch.setattr(
        assignment, "load_exporter", lambda *_: SimpleNamespace(unsupported=lambda *_: "no 16-bit kernels")
    )


def _analyse(world: Any) -> Sensitivity:
    return analyse(world, world.layers, Silent())


def _search(world: Any, budget: Budget) -> Frontier:
    return search(world, world.layers, _analyse(world), budget, world.plain(), Silent())


# --- sensitivity ------------------------------------------------------------------------------------------------------


def test_the_layers_that_make_the_noise_are_found_with_fewer_trials_than_layers(world: World) -> None:
    found = _analyse(world)
    assert [entry.layer for entry in found.layers[:3]] == [world.names[k] for k in (0, 1, 13)]
    assert all(len(entry.group) == 1 for entry in found.layers[:3])
    assert found.layers[0].noise == pytest.approx(4e-3)
    assert found.trials < len(world.names)


def test_every_layer_is_ranked_once_and_shares_add_up(world: World) -> None:
    found = _analyse(world)
    assert sorted(entry.layer for entry in found.layers) == sorted(world.names)
    assert sum(entry.share for entry in found.layers) == pytest.approx(1)
    assert [entry.noise for entry in found.layers] == sorted((entry.noise for entry in found.layers), reverse=True)


def test_time_and_bytes_stand_beside_the_damage(world: World) -> None:
    entry = _analyse(world).layers[0]
    assert (entry.int8_ms, entry.float_ms) == world.ms[entry.layer]
    assert (entry.int8_bytes, entry.float_bytes) == (1000, 4000)


# --- search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.05, 1.1, 1.3])
def test_most_accurate_beats_the_naive_choices_within_the_same_latency(world: World, ratio: float) -> None:
    found = _search(world, Budget(max_latency_ratio=ratio))
    assert found.met
    assert found.chosen.cost.ratio <= ratio
    naive = [p for p in found.points if p.origin not in ("predicted", "refined") and p.cost.ratio <= ratio]
    assert naive
    assert all(found.chosen.score.noise <= point.score.noise for point in naive)


def test_a_latency_budget_buys_the_noisy_layers_first(world: World) -> None:
    found = _search(world, Budget(max_latency_ratio=1.2))
    assert {world.names[k] for k in (0, 1, 13)} <= set(found.chosen.float_layers)


def test_an_accuracy_budget_gets_the_cheapest_that_keeps_it(world: World) -> None:
    found = _search(world, Budget(min_sqnr_db=26.0))  # noise 2.5e-3: the layers 0 and 1 must go
    assert found.met
    assert set(found.chosen.float_layers) == {world.names[0], world.names[1]}
    everything = next(point for point in found.points if point.origin == "all layers float")
    assert found.chosen.cost.ratio < everything.cost.ratio


def test_what_nothing_can_meet_is_said_with_the_frontier(world: World) -> None:
    found = _search(world, Budget(min_sqnr_db=60.0, max_latency_ratio=1.1))
    assert not found.met
    assert found.chosen.cost.ratio <= 1.1  # the most accurate of what is affordable
    assert len(found.efficient) >= 3
    noises = [point.score.noise for point in found.efficient]
    assert noises == sorted(noises, reverse=True)


def test_a_size_budget_is_kept(world: World) -> None:
    plain = world.plain().size_bytes
    found = _search(world, Budget(max_size_bytes=plain + 3 * 3000))
    assert found.met
    assert found.chosen.cost.size_bytes <= plain + 3 * 3000
    assert set(found.chosen.float_layers) == {world.names[k] for k in (0, 1, 13)}


def test_a_speedup_limit_bounds_the_latency(world: World) -> None:
    found = _search(world, Budget(min_speedup=1.5))
    assert found.met
    assert found.float_ratio / found.chosen.cost.ratio >= 1.5


def test_an_assignment_that_cannot_be_converted_is_passed_over(world: World) -> None:
    world.unconvertible = (world.names[0],)  # "first layer float"
    found = _search(world, Budget(max_latency_ratio=1.2))
    assert found.met
    assert all(point.rules.keep_float != (world.names[0],) for point in found.points)


def test_the_choice_is_timed_twice(world: World) -> None:
    assert _search(world, Budget(max_latency_ratio=1.1)).chosen.confirmed


def test_a_searchs_files_are_deleted_as_it_goes(world: World) -> None:
    # Regression: all of them stayed on disk until the end, layers times the size of the model.
    _analyse(world)
    assert world.files == set()
    assert world.most_files <= sensitivity.MOST_SENSITIVE + 1
    found = _search(world, Budget(max_latency_ratio=1.1))
    assert world.files == {found.chosen.rules}
    assert world.most_files <= max(sensitivity.MOST_SENSITIVE + 1, bench.TIMED_AT_ONCE)


def test_a_slow_format_gets_fewer_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    int8_ms = random.uniform(0.05, 0.15, 60)
    noise = random.uniform(1e-5, 3e-3, 60)
    converted = {}
    for format_ in ("onnx", "executorch"):
        made = World(noise, int8_ms, 2 * int8_ms)
        made.terms.format = format_
        _install(made, monkeypatch)
        found = analyse(made, made.layers, Silent(), effort_for(format_).layer_trials)  # type: ignore[arg-type]
        search(made, made.layers, found, Budget(max_latency_ratio=1.1), made.plain(), Silent())  # type: ignore[arg-type]
        converted[format_] = len(made.converted)
    assert converted["executorch"] <= 28 < converted["onnx"]


# --- prediction -------------------------------------------------------------------------------------------------------


def test_the_predicted_frontier_is_optimal_where_enumeration_can_tell() -> None:
    random = np.random.default_rng(1)
    noise = np.stack([random.uniform(0.1, 1, 8), np.zeros(8)])
    cost = np.stack([np.zeros(8), random.uniform(0.1, 1, 8)])
    predictor = Predictor(noise, cost, conversions_cost=True)
    every = [Assignment(states) for states in itertools.product((0, 1), repeat=8)]
    frontier = predictor.frontier()
    assert len(frontier) > 3
    for found in frontier:
        limit = predictor.cost(found)
        assert all(predictor.noise(a) >= predictor.noise(found) - 1e-9 for a in every if predictor.cost(a) <= limit)


def test_conversions_join_neighbours() -> None:
    """A cheap layer between two that must be float becomes float too."""
    noise = np.array([[1.0, 0.0, 1.0, 0.0, 0.0], [0.0] * 5])
    cost = np.array([[0.0] * 5, [0.1, 0.01, 0.1, 0.1, 0.1]])
    predictor = Predictor(noise, cost, conversions_cost=True)
    assert Assignment((1, 1, 1, 0, 0)) in predictor.frontier()


def test_the_fit_recovers_both_cost_factors() -> None:
    random = np.random.default_rng(2)
    cost = np.stack([np.zeros(6), random.uniform(0.05, 0.2, 6)])
    predictor = Predictor(np.stack([np.ones(6), np.zeros(6)]), cost, conversions_cost=True)
    some = [Assignment(tuple(random.integers(0, 2, 6).tolist())) for _ in range(8)]
    true = [1.7 * sum(cost[s][k] for k, s in enumerate(a.states)) + 0.03 * a.conversions for a in some]
    predictor.fit(list(zip(some, true, strict=True)))
    assert [predictor.cost(a) for a in some] == pytest.approx(true, rel=1e-6)


# --- budget -----------------------------------------------------------------------------------------------------------


def _score(agreement: float | None, drop: float | None = None, samples: int = 400) -> Score:
    return Score(samples, 20.0, (20.0,) * 4, agreement, drop, 1000)


def test_a_limit_is_kept_with_a_margin_for_other_samples() -> None:
    budget = Budget(min_agreement=0.99)
    assert budget.is_accurate(_score(0.9925))
    assert not budget.is_accurate(_score(0.9925), with_margin=True)
    assert budget.is_accurate(_score(0.9975), with_margin=True)
    assert budget.is_accurate(_score(1.0, samples=20), with_margin=True)


def test_without_labels_changed_answers_bound_the_drop() -> None:
    assert Budget(max_accuracy_drop=0.02).is_accurate(_score(0.985))
    assert not Budget(max_accuracy_drop=0.01).is_accurate(_score(0.985))


def test_a_limit_on_what_was_not_measured_is_not_kept() -> None:
    assert not Budget(min_agreement=0.5).is_accurate(_score(None))


def test_latency_limits_become_one_ratio() -> None:
    cost = Cost(ms=2.0, ratio=1.0, size_bytes=1)
    assert Budget(max_latency_ms=3.0, min_speedup=2.0).ratio_limit(cost, float_ratio=2.4) == pytest.approx(1.2)
    assert Budget(max_latency_ms=2.2, min_speedup=2.0).ratio_limit(cost, float_ratio=2.4) == pytest.approx(1.1)
