"""Which layers lose accuracy to quantization, measured on exported files.

A layer's damage is what the file gives when that layer alone is quantized. The opposite (all layers but one) hides a
small effect behind the noise of all others. Noise powers of layers add up nearly, since their rounding errors are
nearly independent; so a group of layers whose common damage is small needs no look inside. Groups follow the borders
of modules, and the noisiest group is always split next (group testing after Dorfman, 1943, on real-valued results).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgeopt.progress import Progress
from edgeopt.tuning.layers import Layer, Layers, int8_bytes, split
from edgeopt.tuning.profile import layer_times
from edgeopt.tuning.trial import Score, Trials
from edgeopt.types import Format, LayerRules

#: Few samples tell noise powers apart; the worst layers get all of them.
SCREENING_SAMPLES = 64
MOST_SENSITIVE = 5
#: Trials: a flat charge, and so many per layer.
_FLAT_TRIALS = 8
_TRIALS_PER_LAYER = 0.5


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """What quantizing one layer does, and what it is worth.

    Attributes:
        layer: path of the source layer. type: operator that holds most of its weights.
        noise: noise power over signal power at the worst output. Where only a group was measured, its equal share.
        share: `noise` by that of all layers together.
        sqnr_db, agreement, drop: measured; of the whole group where that has several members.
        group: the layers that were quantized together in this measurement, this one included.
        int8_ms, float_ms, int8_bytes, float_bytes: time and weights in the quantized and in the float file; None
            where the file does not tell.
    """

    layer: str
    type: str
    noise: float
    share: float
    sqnr_db: float | None
    agreement: float | None
    drop: float | None
    group: tuple[str, ...]
    int8_ms: float | None
    float_ms: float | None
    int8_bytes: int | None
    float_bytes: int


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """`layers` are ranked, the most harmful first; `plain` is the file with all of them quantized.

    Attributes:
        trials: how many files were converted and run. times: how the layers' times were obtained.
    """

    model: str
    format: Format
    runtime: str
    precision: str
    weight_bits: int
    plain: Score
    layers: tuple[LayerSensitivity, ...]
    trials: int
    times: str


def analyse(trials: Trials, layers: Layers, progress: Progress, max_trials: int | None = None) -> Sensitivity:
    """Rank the layers of a model by the damage that quantizing them does.

    Args:
        max_trials: conversions at most; by default 8 and one for every two layers.
    """
    plain = trials.score(trials.rules)
    limit = max_trials or _FLAT_TRIALS + round(_TRIALS_PER_LAYER * len(layers.layers))
    search = _Search(layers.layers, limit)
    on_disk: list[Group] = []
    for group in progress.track(search.groups(), "Measuring layers", search.limit):
        search.tell(group, trials.score(_only(trials, layers, group), SCREENING_SAMPLES))
        on_disk = _discard_harmless([*on_disk, group], search.measured, trials, layers)
    _discard_harmless(on_disk, search.measured, trials, layers)
    measured = _with_all_samples(search.measured, trials, layers, progress)
    sizes = _sizes(trials, layers, progress)
    ranked = sorted(_entries(measured, sizes), key=lambda entry: -entry.noise)
    return Sensitivity(
        model=trials.workbench.model.name,
        format=trials.terms.format,
        runtime=trials.terms.runtime,
        precision=trials.terms.scheme.precision,
        weight_bits=trials.terms.scheme.weight_bits,
        plain=plain,
        layers=tuple(ranked),
        trials=trials.made,
        times="shared out by multiply-accumulates" if trials.terms.format == "executorch" else "profiled",
    )


Group = tuple[Layer, ...]


class _Search:
    """Splits the noisiest group next, until all that matters is alone or the trials are used up.

    `measured` always covers every layer once, as soon as the first groups are done.
    """

    def __init__(self, layers: Sequence[Layer], limit: int) -> None:
        self._first = split(layers)
        self.limit = max(limit, len(self._first))
        self._count = len(layers)
        self._scores: dict[Group, Score] = {}

    @property
    def measured(self) -> dict[Group, Score]:
        return self._scores

    def tell(self, group: Group, score: Score) -> None:
        self._scores[group] = score

    def groups(self) -> Iterator[Group]:
        """The groups to measure; each must be told before the next is asked for."""
        yield from self._first
        left = self.limit - len(self._first)
        waiting = [(-self._scores[group].noise, order, group) for order, group in enumerate(self._first)]
        heapq.heapify(waiting)
        order = len(waiting)
        average = sum(score.noise for score in self._scores.values()) / self._count
        while waiting:
            noise, _, group = heapq.heappop(waiting)
            parts = split(group)
            # A group that does no more damage than one average layer holds no layer worth knowing.
            if len(group) == 1 or len(parts) > left or -noise <= average:
                continue
            left -= len(parts)
            yield from parts
            del self._scores[group]
            for part in parts:
                heapq.heappush(waiting, (-self._scores[part].noise, order, part))
                order += 1


def _only(trials: Trials, layers: Layers, group: Group) -> LayerRules:
    return trials.rules_with(layers.sparing([layer.path for layer in group]))


def _discard_harmless(
    on_disk: Sequence[Group], measured: Mapping[Group, Score], trials: Trials, layers: Layers
) -> list[Group]:
    """Delete the files that won't run on all samples later; the groups whose files stay."""
    worst = _worst(measured)
    for group in on_disk:
        if group not in worst:
            trials.discard(_only(trials, layers, group))
    return [group for group in on_disk if group in worst]


def _with_all_samples(
    measured: Mapping[Group, Score], trials: Trials, layers: Layers, progress: Progress
) -> dict[Group, Score]:
    """The scores, those of the most harmful groups on all samples: agreement and metric need many."""
    worst = _worst(measured)
    scores = dict(measured)
    for group in progress.track(worst, "Running the worst layers on all samples", len(worst)):
        rules = _only(trials, layers, group)
        scores[group] = trials.score(rules)
        trials.discard(rules)
    return scores


def _worst(measured: Mapping[Group, Score]) -> list[Group]:
    return sorted(measured, key=lambda group: -measured[group].noise / len(group))[:MOST_SENSITIVE]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Time and bytes by layer path."""

    int8_ms: Mapping[str, float]
    float_ms: Mapping[str, float]
    int8_bytes: Mapping[str, int]


def _sizes(trials: Trials, layers: Layers, progress: Progress) -> _Sizes:
    progress.step("Profiling")
    terms = trials.terms
    plain, twin = trials.plain(), trials.workbench.float_artifact(terms.format)
    sample = terms.recording.first()
    times = [layer_times(a, terms.runtime, sample, layers.layers, terms.threads) for a in (plain, twin)]
    return _Sizes(times[0], times[1], int8_bytes(plain.path, terms.format))


def _entries(measured: Mapping[Group, Score], sizes: _Sizes) -> Iterator[LayerSensitivity]:
    total = sum(score.noise for score in measured.values())
    for group, score in measured.items():
        for layer in group:
            yield LayerSensitivity(
                layer=layer.path,
                type=layer.type,
                noise=score.noise / len(group),
                share=score.noise / len(group) / total if total else 0.0,
                sqnr_db=score.sqnr_db,
                agreement=score.agreement,
                drop=score.drop,
                group=tuple(member.path for member in group),
                int8_ms=sizes.int8_ms.get(layer.path),
                float_ms=sizes.float_ms.get(layer.path),
                int8_bytes=sizes.int8_bytes.get(layer.path),
                float_bytes=layer.float_bytes,
            )
