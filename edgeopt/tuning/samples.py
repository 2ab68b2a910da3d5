"""What trials are scored on: samples that neither set the ranges nor decide the final verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.datasets import Subset, match_labels, open_dataset, select
from edgeopt.datasets.indexed import digest_arrays
from edgeopt.errors import DataError
from edgeopt.plan import Data, ExampleInput
from edgeopt.runtimes.base import Session
from edgeopt.types import Array, Finding, Model, Sample

if TYPE_CHECKING:
    from edgeopt.config import RunConfig
    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress

#: As many as tell half a point of agreement apart, and cost a trial seconds.
TUNING_SAMPLES = 256
#: With fewer to spare, the calibration samples themselves say more.
MIN_SPARE = 32

_TUNED_ON_EVALUATION_DATA = Finding(
    "tuned-on-evaluation-data",
    "evaluation",
    "the search chose by samples that the final figures rest on too, which flatters them; give --evaluation DATA that "
    "shares none with --calibration, or more calibration data",
)


def tuning_samples(
    config: RunConfig, model: Model, data: Data, progress: Progress
) -> tuple[Dataset, tuple[Finding, ...]]:
    """What calibration and evaluation left over of the calibration source, a seeded choice of it; the calibration
    samples where too little is left, and the example input where there is no such source.

    Samples that the final verdict rests on would make it worthless, so they are passed over: by index where both
    purposes draw from one source, else by content, which takes one pass over the evaluation samples. Where that
    leaves too few, the calibration samples are taken all the same, and the finding "tuned-on-evaluation-data" says so.
    """
    if config.calibration is None:
        findings = (_TUNED_ON_EVALUATION_DATA,) if data.origin == "example input" else ()
        return ExampleInput(model), findings
    source = match_labels(open_dataset(config.calibration, model.inputs, model.preprocessing), model.labels)
    calibration = select(source, config.num_calibration_samples, config.seed)
    taken = frozenset(calibration.indices)
    if _is_one_source(config, data) and isinstance(data.evaluation, Subset):
        evaluated = frozenset(data.evaluation.indices)
        taken |= evaluated
        is_evaluated: Callable[[int], bool] = evaluated.__contains__
    else:
        is_evaluated = _by_content(source, data.evaluation, progress)
    spare = _spare(source, taken, is_evaluated, config.seed)
    if spare is not None:
        return spare, ()
    fresh = [index for index in calibration.indices if not is_evaluated(index)]
    if len(fresh) == len(calibration):
        return calibration, ()
    if len(fresh) >= MIN_SPARE:
        return Subset(source, fresh), ()
    return calibration, (_TUNED_ON_EVALUATION_DATA,)


def _is_one_source(config: RunConfig, data: Data) -> bool:
    """Whether an index means the same sample in the evaluation set and in the calibration source."""
    one, other = config.calibration, config.evaluation
    return data.origin != "evaluation set" or one is other or (isinstance(one, str) and one == other)


def _by_content(source: Dataset, evaluation: Dataset, progress: Progress) -> Callable[[int], bool]:
    """Tells which samples of `source` are in `evaluation`, under whatever name; keeps a hash of each, no sample."""
    samples = progress.track(evaluation, "Comparing with the evaluation data", len(evaluation))
    evaluated = {digest_arrays(sample.inputs, None) for sample in samples}
    known: dict[int, bool] = {}

    def is_evaluated(index: int) -> bool:
        if index not in known:
            known[index] = digest_arrays(source[index].inputs, None) in evaluated
        return known[index]

    return is_evaluated


def _spare(source: Dataset, taken: frozenset[int], is_evaluated: Callable[[int], bool], seed: int) -> Subset | None:
    """A choice of what is neither taken nor evaluated; None where that is too little."""
    while len(source) - len(taken) >= MIN_SPARE:
        chosen = select(source, TUNING_SAMPLES, seed, exclude=taken)
        evaluated = frozenset(filter(is_evaluated, chosen.indices))
        if not evaluated:
            return chosen
        taken |= evaluated
    return None


class Recording:
    """Samples beside what the float model makes of them, kept on disk: every trial replays both.

    Decoding a picture takes longer than running a small network, and the float model's outputs never change.

    Attributes:
        fingerprint: SHA-256 over inputs, expected outputs and labels.
    """

    def __init__(self, samples: Iterable[Sample], reference: Session, directory: Path) -> None:
        """Run the float model once over the samples; `directory` must exist.

        Raises DataError when there are no samples, or a sample or what the float model makes of it holds NaN.
        """
        self._directory = directory
        self._labels: list[tuple[int | Array | None, str]] = []
        digest = hashlib.sha256()
        for index, sample in enumerate(samples):
            expected = reference.run(sample.inputs)
            arrays = {f"in:{name}": values for name, values in sample.inputs.items()}
            arrays |= {f"out:{name}": values for name, values in expected.items()}
            for name, values in arrays.items():
                if values.dtype.kind == "f" and np.isnan(values).any():
                    raise DataError("holds NaN", where=f"sample {sample.name!r}, {name.partition(':')[2]!r}")
            np.savez(self._file(index), **arrays)
            self._labels.append((sample.label, sample.name))
            digest.update(digest_arrays(arrays, sample.label))
            digest.update(b"labelled" if sample.label is not None else b"without label")
        if not self._labels:
            raise DataError("holds no samples", where="tuning data")
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def __iter__(self) -> Iterator[tuple[Sample, dict[str, Array]]]:
        """Each sample with the float model's outputs."""
        return (self._load(index) for index in range(len(self)))

    def first(self) -> Sample:
        return self._load(0)[0]

    def _load(self, index: int) -> tuple[Sample, dict[str, Array]]:
        label, name = self._labels[index]
        with np.load(self._file(index), allow_pickle=False) as stored:
            inputs = {key[3:]: stored[key] for key in stored.files if key.startswith("in:")}
            expected = {key[4:]: stored[key] for key in stored.files if key.startswith("out:")}
        return Sample(inputs, label, name), expected

    def _file(self, index: int) -> Path:
        return self._directory / f"{index}.npz"
