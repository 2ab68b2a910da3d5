"""One trial: convert with some layers exempt, run the file in the target's runtime, see how close it stays."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.json_data import dumps
from edgeopt.runtimes import load_runtime
from edgeopt.tuning.journal import Journal
from edgeopt.types import Array, Artifact, EstimatorSpec, Format, LayerRules, Sample, Scheme
from edgeopt.validation.fidelity import SQNR_CAP_DB, Fidelity

if TYPE_CHECKING:
    from edgeopt.runtimes.base import Session
    from edgeopt.tuning.samples import Recording
    from edgeopt.validation.metrics import Metric
    from edgeopt.workbench import Workbench

#: Parts of the samples that are scored apart, to tell a gain from chance.
FOLDS = 4
#: A smaller gain in dB is of no use to anybody, however certain.
MIN_GAIN_DB = 0.05
#: With fewer samples the folds say nothing, and only a clear gain counts.
MIN_SAMPLES = 2 * FOLDS
CLEAR_GAIN_DB = 1.0


@dataclass(frozen=True, slots=True)
class Score:
    """How a file does on the tuning samples.

    Attributes:
        samples: how many it ran on.
        sqnr_db: of the worst output against the float file; None where no output is real.
        folds_db: the same for each of `FOLDS` disjoint parts of the samples.
        agreement: of the worst output; None where no output is a decision.
        drop: by how much the metric is below the float file's; None without labels.
        size_bytes: of the file.
    """

    samples: int
    sqnr_db: float | None
    folds_db: tuple[float, ...]
    agreement: float | None
    drop: float | None
    size_bytes: int

    @property
    def noise(self) -> float:
        """Noise power over signal power, which adds up over layers; the share of wrong answers without real outputs."""
        if self.sqnr_db is not None:
            return float(10 ** (-self.sqnr_db / 10))
        return 1 - self.agreement if self.agreement is not None else 0.0

    def gain_db(self, other: Score) -> float:
        """By how many dB this is better than `other`, from both noise powers."""
        floor = 10 ** (-SQNR_CAP_DB / 10)
        return float(10 * np.log10(max(other.noise, floor) / max(self.noise, floor)))

    def beats(self, other: Score) -> bool:
        """Whether the gain is more than chance.

        It must be there in every fold; where no output is real, the difference in agreement must exceed its standard
        error. With fewer than `MIN_SAMPLES` samples it must be at least `CLEAR_GAIN_DB` as well.
        """
        gain = self.gain_db(other)
        if gain <= MIN_GAIN_DB or (self.samples < MIN_SAMPLES and gain < CLEAR_GAIN_DB):
            return False
        if self.sqnr_db is not None:
            return all(mine > theirs for mine, theirs in zip(self.folds_db, other.folds_db, strict=True))
        if self.agreement is None or other.agreement is None:
            return False
        return _differs(self.agreement, other.agreement, self.samples)


@dataclass(frozen=True, slots=True)
class Terms:
    """What the trials of a search have in common.

    Attributes:
        runtime: a name in `edgeopt.runtimes.RUNTIMES`.
        recording: the samples with what the float file makes of them.
        metric: makes the task's metric; None without labels. metric_source: hash of the user's code for it, see
            `edgeopt.tuning.analysis.metric_source`.
        state: folder for finished trials, to resume from; None keeps none.
    """

    format: Format
    scheme: Scheme
    runtime: str
    recording: Recording
    metric: Callable[[], Metric] | None
    threads: int
    state: Path | None
    metric_source: str = ""


class Trials:
    """Makes and scores files of one model that differ in their layer rules.

    A file stays until `discard`; the plain one always stays.
    """

    def __init__(self, workbench: Workbench, estimator: EstimatorSpec, terms: Terms) -> None:
        self.workbench = workbench
        self.estimator = estimator
        self.terms = terms
        self.made = 0
        self._scores: dict[str, Score] = {}
        self._journal = self._open_journal() if terms.state is not None else None

    @property
    def rules(self) -> LayerRules:
        """What the user exempted."""
        return self.workbench.rules

    def rules_with(self, keep_float: Iterable[str] = (), int16: Iterable[str] = ()) -> LayerRules:
        """The user's rules and these."""
        mine = self.rules
        return LayerRules(
            tuple(dict.fromkeys((*mine.keep_float, *keep_float))),
            tuple(dict.fromkeys((*mine.int16_activations, *int16))),
        )

    def artifact(self, rules: LayerRules) -> Artifact:
        return self.workbench.quantized_artifact(self.terms.format, self.terms.scheme, self.estimator, rules)[0]

    def plain(self) -> Artifact:
        return self.artifact(self.rules)

    def discard(self, rules: LayerRules) -> None:
        """Delete the file; the next `artifact` makes the same again."""
        if rules != self.rules:
            self.workbench.discard(self.terms.format, self.terms.scheme, self.estimator, rules)

    def score(self, rules: LayerRules, samples: int | None = None) -> Score:
        """Convert and run on the first `samples` of the recording, all by default; each trial is done once."""
        count = min(samples or len(self.terms.recording), len(self.terms.recording))
        name = f"{count} {dumps(rules)}"
        if self._journal is not None and (known := self._journal.get(name)) is not None:
            return known
        if name not in self._scores:
            self.made += 1
            artifact = self.artifact(rules)
            runtime = load_runtime(self.terms.runtime)
            with runtime.open(artifact.runnable, artifact.signature, self.terms.threads) as session:
                pairs = islice(self.terms.recording, count)
                self._scores[name] = score(session, pairs, self.terms.metric, artifact.size_bytes)
            if self._journal is not None:
                self._journal.add(name, self._scores[name])
        return self._scores[name]

    def _open_journal(self) -> Journal[Score]:
        """Named after all that decides the scores; the plain file stands for model, calibration data and scheme."""
        terms = self.terms
        if terms.state is None:
            raise ValueError("no folder for finished trials")
        plain = self.plain()
        metric = terms.metric().name if terms.metric is not None else ""
        tools = (f"{name} {number}" for name, number in sorted({**plain.tools, "edgeopt": version("edgeopt")}.items()))
        parts = (plain.sha256, terms.recording.fingerprint, terms.runtime, metric, terms.metric_source, *tools)
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return Journal(terms.state / f"trials-{key[:16]}.jsonl", Score)


def score(
    candidate: Session,
    pairs: Iterable[tuple[Sample, dict[str, Array]]],
    metric: Callable[[], Metric] | None,
    size_bytes: int,
) -> Score:
    """Run a file over recorded samples; keeps none of them.

    Raises ConversionError when its outputs don't have the float file's names and shapes.
    """
    total, folds = Fidelity(), [Fidelity() for _ in range(FOLDS)]
    metrics = (metric(), metric()) if metric is not None else None
    count = 0
    for sample, expected in pairs:
        found = candidate.run(sample.inputs)
        total.update(expected, found)
        folds[count % FOLDS].update(expected, found)
        if metrics is not None:
            metrics[0].update(expected, sample)
            metrics[1].update(found, sample)
        count += 1
    drop = None
    if metrics is not None:
        drop = metrics[0].value() - metrics[1].value()
        drop = drop if metrics[0].higher_is_better else -drop
    agreements = [o.agreement for o in total.results() if o.agreement is not None]
    parts = (_worst_db(fold) for fold in folds)
    return Score(
        samples=count,
        sqnr_db=_worst_db(total),
        folds_db=tuple(part for part in parts if part is not None),
        agreement=min(agreements, default=None),
        drop=drop,
        size_bytes=size_bytes,
    )


def _differs(share: float, smaller: float, samples: int) -> bool:
    """Whether two shares differ by more than one standard error of their difference.

    Decisions within a sample depend on each other, so samples count. One success and one failure are added to each
    (Agresti and Caffo, 2000): a share of 0 or 1 in a few samples is not certain. The shares are of the same samples,
    which makes the true error smaller than this one.
    """
    one, other = ((s * samples + 1) / (samples + 2) for s in (share, smaller))
    variance = (one * (1 - one) + other * (1 - other)) / (samples + 2)
    return one - other > math.sqrt(variance)


def _worst_db(fidelity: Fidelity) -> float | None:
    return min((o.sqnr_db for o in fidelity.results() if o.sqnr_db is not None), default=None)
