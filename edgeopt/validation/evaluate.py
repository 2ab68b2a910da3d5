"""Two models side by side over a data set: the task metric of each, and how far one strays from the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from edgeopt.errors import DataError
from edgeopt.runtimes.base import Session
from edgeopt.types import Array, Sample
from edgeopt.validation.fidelity import Fidelity, OutputFidelity
from edgeopt.validation.metrics import Metric


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the comparison found.

    Attributes:
        samples: how many were run through both.
        metric: its name; None (with both values) when the data has no labels.
        higher_is_better: for the metric.
        reference_metric, candidate_metric: its value for each model.
        outputs: fidelity per output.
        agreement, sqnr_db: those of the worst output that has one; None when none has.
    """

    samples: int
    metric: str | None
    higher_is_better: bool
    reference_metric: float | None
    candidate_metric: float | None
    outputs: tuple[OutputFidelity, ...]
    agreement: float | None
    sqnr_db: float | None


def evaluate(
    reference: Session, candidate: Session, samples: Iterable[Sample], metric: Callable[[], Metric] | None
) -> Evaluation:
    """Run every sample through both sessions once; keeps no sample and no output.

    Args:
        reference: the float model.
        candidate: the exported file.
        samples: streamed.
        metric: makes the metric, see `load_metric`; None when there are no labels.

    Raises:
        DataError: when there are no samples, a sample holds NaN or does not fit the model or the metric, or the
            reference itself answers NaN: nothing can be proven by comparing with that.
        ConversionError: when the candidate's outputs don't have the reference's names and shapes.
    """
    fidelity = Fidelity()
    metrics = (metric(), metric()) if metric is not None else None
    count = 0
    for sample in samples:
        _refuse_nan(sample.inputs, f"sample {sample.name!r}, input", "mend or remove that sample")
        expected = reference.run(sample.inputs)
        _refuse_nan(
            expected,
            f"what the float model makes of sample {sample.name!r}, output",
            "its weights or its arithmetic are broken",
        )
        found = candidate.run(sample.inputs)
        fidelity.update(expected, found)
        if metrics is not None:
            metrics[0].update(expected, sample)
            metrics[1].update(found, sample)
        count += 1
    if count == 0:
        raise DataError("holds no samples", where="evaluation data")
    outputs = fidelity.results()
    return Evaluation(
        samples=count,
        metric=metrics[0].name if metrics else None,
        higher_is_better=metrics[0].higher_is_better if metrics else True,
        reference_metric=metrics[0].value() if metrics else None,
        candidate_metric=metrics[1].value() if metrics else None,
        outputs=outputs,
        agreement=min((o.agreement for o in outputs if o.agreement is not None), default=None),
        sqnr_db=min((o.sqnr_db for o in outputs if o.sqnr_db is not None), default=None),
    )


def _refuse_nan(arrays: Mapping[str, Array], where: str, fix: str) -> None:
    for name, values in arrays.items():
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise DataError("holds NaN", where=f"{where} {name!r}", fix=fix)
