"""Mixed precision under a budget: which layers to keep at more than eight bits, judged on exported files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeopt.exporter import load_exporter
from edgeopt.progress import Progress
from edgeopt.tuning.bench import FLOAT, INT16, OWN, Bench
from edgeopt.tuning.budget import Budget
from edgeopt.tuning.effort import effort_for
from edgeopt.tuning.frontier import Frontier
from edgeopt.tuning.layers import Layers
from edgeopt.tuning.prediction import Assignment, Predictor
from edgeopt.tuning.sensitivity import LayerSensitivity, Sensitivity
from edgeopt.tuning.trial import Trials
from edgeopt.types import Array, Artifact, LayerRules

#: Cost of what can't be had.
_NEVER = 1e6


def search(
    trials: Trials, layers: Layers, sensitivity: Sensitivity, budget: Budget, baseline: Artifact, progress: Progress
) -> Frontier:
    """Find the assignment that the budget wants, of the scheme's own precision, 16-bit activations and float.

    The naive choices (first, last, both, all layers in float) are measured too, so the result is never worse than
    they are on the tuning samples. Slow formats get fewer trials, see `Effort`.

    Args:
        baseline: the plain quantized file that latencies are held against.
    """
    progress.step("Preparing the search")
    effort = effort_for(trials.terms.format)
    bench = Bench(trials, layers, _precisions(trials), baseline, progress)
    bench.measure(_naive(bench))
    predictor = _predictor(bench, sensitivity, budget)
    for _ in range(effort.searches):
        predictor.fit(bench.extra_costs())
        _bisect(bench, predictor.frontier(), budget)
    for _ in range(effort.refinements):
        predictor.fit(bench.extra_costs())
        before = bench.best(budget)
        bench.measure(dict.fromkeys(_moves(bench, predictor, budget)[: effort.moves], "refined"))
        if bench.best(budget) == before:
            break
    return bench.verdict(budget)


def _precisions(trials: Trials) -> tuple[str, ...]:
    """The scheme's own first, float last; 16-bit activations where the exporter can make them."""
    npu = trials.terms.scheme.npu
    exporter = load_exporter(trials.terms.format, npu.kind if npu is not None else None)
    can_int16 = exporter.unsupported(trials.terms.scheme, LayerRules(int16_activations=("*",))) is None
    return (OWN, INT16, FLOAT) if can_int16 else (OWN, FLOAT)


def _naive(bench: Bench) -> dict[Assignment, str]:
    """What anybody would try first."""
    plain, float_, last = bench.uniform(OWN), bench.precisions.index(FLOAT), bench.count - 1
    wanted = {
        plain: "plain",
        plain.with_layer(0, float_): "first layer float",
        plain.with_layer(last, float_): "last layer float",
        plain.with_layer(0, float_).with_layer(last, float_): "first and last layer float",
        bench.uniform(FLOAT): "all layers float",
    }
    if INT16 in bench.precisions:
        wanted[bench.uniform(INT16)] = "all layers with 16-bit activations"
    return wanted


# --- what to expect ------------------------------------------------------------------------------------------------


def _predictor(bench: Bench, sensitivity: Sensitivity, budget: Budget) -> Predictor:
    """Noise and cost by precision and layer, from the sensitivities."""
    entries = {entry.layer: entry for entry in sensitivity.layers}
    ordered = [entries[layer.path] for layer in bench.layers.layers]
    by_size = budget.limits_size_only
    own_noise = np.array([entry.noise for entry in ordered])
    rows = {
        OWN: (own_noise, np.zeros(bench.count)),
        FLOAT: (np.zeros(bench.count), _extra_bytes(ordered, sensitivity) if by_size else _extra_time(ordered)),
    }
    if INT16 in bench.precisions:
        rows[INT16] = _int16(bench, ordered, own_noise, by_size)
    noise, cost = (np.stack([rows[precision][k] for precision in bench.precisions]) for k in (0, 1))
    return Predictor(noise, cost, conversions_cost=not by_size)


def _extra_bytes(entries: Sequence[LayerSensitivity], sensitivity: Sensitivity) -> Array:
    """What each layer's float weights add, by the plain file's size."""
    bits = sensitivity.weight_bits
    own = [e.float_bytes * bits / 32 if e.int8_bytes is None else e.int8_bytes for e in entries]
    added = [max(entry.float_bytes - size, 0) for entry, size in zip(entries, own, strict=True)]
    return np.array(added, dtype=np.float64) / sensitivity.plain.size_bytes


def _extra_time(entries: Sequence[LayerSensitivity]) -> Array:
    """By how much each layer is slower in float, by the plain file's whole time; the average where it is not known."""
    known = [e.float_ms - e.int8_ms if e.float_ms is not None and e.int8_ms is not None else np.nan for e in entries]
    extra = np.array(known, dtype=np.float64)
    whole = sum(entry.int8_ms or 0.0 for entry in entries)
    if whole <= 0 or np.isnan(extra).all():
        return np.full(len(entries), 1 / len(entries))
    extra = np.where(np.isnan(extra), np.nanmean(extra), extra)
    return np.maximum(extra, 0) / whole


def _int16(bench: Bench, entries: Sequence[LayerSensitivity], noise: Array, by_size: bool) -> tuple[Array, Array]:
    """Noise and cost with 16-bit activations: every layer has the share that the file with nothing else shows."""
    wide, plain = bench.point(bench.uniform(INT16)), bench.point(bench.uniform(OWN))
    if wide is None or plain is None:
        return noise, np.full(len(entries), _NEVER)
    times = np.array([entry.int8_ms or 0.0 for entry in entries])
    weights = times / times.sum() if times.sum() > 0 else np.full(len(entries), 1 / len(entries))
    extra = wide.cost.size_bytes / plain.cost.size_bytes - 1 if by_size else wide.cost.ratio - 1
    return noise * min(wide.score.noise / max(plain.score.noise, 1e-20), 1.0), weights * max(extra, 0.0)


# --- what to measure -----------------------------------------------------------------------------------------------


def _bisect(bench: Bench, frontier: Sequence[Assignment], budget: Budget) -> None:
    """Close in on where the predicted frontier, cheapest first, crosses the budget."""
    low, high = -1, len(frontier)
    while high - low > 1:
        middle = (low + high) // 2
        bench.measure({frontier[middle]: "predicted"})
        point = bench.point(frontier[middle])
        if budget.wants_cheapest:
            goes_up = point is not None and not budget.is_accurate(point.score, with_margin=True)
        else:
            goes_up = point is not None and budget.is_affordable(point.cost, bench.float_ratio)
        low, high = (middle, high) if goes_up else (low, middle)


def _moves(bench: Bench, predictor: Predictor, budget: Budget) -> list[Assignment]:
    """Changes of one layer of the best assignment so far, the most promising first, by prediction."""
    current = bench.assignment_of(bench.best(budget))
    precisions = range(len(bench.precisions))
    changed = [
        current.with_layer(index, state)
        for index in range(bench.count)
        for state in precisions
        if state != current.states[index]
    ]
    fresh = [move for move in changed if bench.point(move) is None]
    if budget.wants_cheapest:
        useful = [move for move in fresh if predictor.cost(move) < predictor.cost(current)]
    else:
        limit = bench.extra_limit(budget)
        useful = [
            move for move in fresh if predictor.noise(move) < predictor.noise(current) and predictor.cost(move) <= limit
        ]
    return sorted(useful, key=predictor.noise)
