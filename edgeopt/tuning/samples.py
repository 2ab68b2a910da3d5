"""What trials are scored on: samples that neither set the ranges nor decide the final verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.datasets import Subset, match_labels, open_dataset, select
from edgeopt.errors import DataError
from edgeopt.plan import Data, ExampleInput
from edgeopt.runtimes.base import Session
from edgeopt.types import Array, Model, Sample

if TYPE_CHECKING:
    from edgeopt.config import RunConfig
    from edgeopt.datasets.base import Dataset

#: As many as tell half a point of agreement apart, and cost a trial seconds.
TUNING_SAMPLES = 256
#: With fewer to spare, the calibration samples themselves say more.
MIN_SPARE = 32


def tuning_samples(config: RunConfig, model: Model, data: Data) -> Dataset:
    """What calibration and evaluation left over of the calibration source, a seeded choice of it; the calibration
    samples where too little is left, and the example input where there is no such source.

    Samples that the final verdict rests on are never chosen: tuning on them would make it worthless.
    """
    if config.calibration is None:
        return ExampleInput(model)
    source = match_labels(open_dataset(config.calibration, model.inputs, model.preprocessing), model.labels)
    calibration = select(source, config.num_calibration_samples, config.seed)
    taken = frozenset(calibration.indices)
    if data.origin == "held out of the calibration set" and isinstance(data.evaluation, Subset):
        taken |= frozenset(data.evaluation.indices)
    if len(source) - len(taken) < MIN_SPARE:
        return calibration
    return select(source, TUNING_SAMPLES, config.seed, exclude=taken)


class Recording:
    """Samples beside what the float model makes of them, kept on disk: every trial replays both.

    Decoding a picture takes longer than running a small network, and the float model's outputs never change.

    Attributes:
        fingerprint: SHA-256 over inputs and expected outputs.
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
                digest.update(np.ascontiguousarray(values).tobytes())
            np.savez(self._file(index), **arrays)
            self._labels.append((sample.label, sample.name))
            digest.update(repr(sample.label).encode())
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
