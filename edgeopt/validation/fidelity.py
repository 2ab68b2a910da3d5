"""How close one file's outputs stay to another's, over a stream of samples, with a few numbers per output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeopt.errors import ConversionError
from edgeopt.types import Array

#: SQNR of identical outputs, and of worthless ones (NaN, or a signal that is zero throughout); keeps reports finite.
SQNR_CAP_DB = 200.0

#: Magnitude from which a value means "masked out" (minus infinity in attention masks and masked logits): it is no
#: signal, and its square would drown all others.
_MASKED = 1e9


@dataclass(frozen=True, slots=True)
class OutputFidelity:
    """One output of the candidate beside the reference's.

    Attributes:
        name: of the output.
        agreement: share of equal decisions: argmax over the last axis where a float output has the form
            (batch, classes) or (batch, positions, classes) with at least two classes, counted per row; for integer
            outputs the share of equal elements; None for other float outputs.
        sqnr_db: 10 log10(sum ref^2 / sum (ref - x)^2) over all elements of all samples, within +-SQNR_CAP_DB; None
            for integer outputs and where the reference holds no finite value.
        max_abs_error, mean_abs_error: over finite elements; 0 where there are none.
    """

    name: str
    agreement: float | None
    sqnr_db: float | None
    max_abs_error: float
    mean_abs_error: float


@dataclass(slots=True)
class _Sums:
    is_integer: bool
    decisions: int = 0
    agreed: int = 0
    elements: int = 0
    signal: float = 0.0
    noise: float = 0.0
    absolute: float = 0.0
    largest: float = 0.0
    broken: bool = False


class Fidelity:
    """Accumulates the comparison of two models' outputs, sample by sample, in float64."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Sums] = {}

    def update(self, reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> None:
        """Compare one sample's outputs.

        Raises:
            ConversionError: when the candidate lacks an output or gives it another shape.
        """
        for name, expected in reference.items():
            if name not in candidate:
                raise ConversionError("is missing in the exported file", where=f"output {name!r}")
            found = candidate[name]
            if found.shape != expected.shape:
                raise ConversionError(
                    f"has shape {list(found.shape)} in the exported file, {list(expected.shape)} in the reference",
                    where=f"output {name!r}",
                )
            sums = self._outputs.setdefault(name, _Sums(is_integer=expected.dtype.kind in "iub"))
            if expected.size:
                _compare(sums, expected, found)

    def results(self) -> tuple[OutputFidelity, ...]:
        """One entry per output, in the reference's order."""
        return tuple(
            OutputFidelity(
                name=name,
                agreement=sums.agreed / sums.decisions if sums.decisions else None,
                sqnr_db=_sqnr_db(sums),
                max_abs_error=sums.largest,
                mean_abs_error=sums.absolute / sums.elements if sums.elements else 0.0,
            )
            for name, sums in self._outputs.items()
        )


def _compare(sums: _Sums, expected: Array, found: Array) -> None:
    if sums.is_integer:
        sums.decisions += expected.size
        sums.agreed += int(np.count_nonzero(expected == found))
    elif expected.ndim in (2, 3) and expected.shape[-1] >= 2:
        same = expected.argmax(axis=-1) == found.argmax(axis=-1)
        # argmax finds NaN "highest", which is no decision.
        same &= ~np.isnan(found).any(axis=-1)
        sums.decisions += same.size
        sums.agreed += int(np.count_nonzero(same))
    wanted, given = expected.astype(np.float64), found.astype(np.float64)
    # NaN compares false, so it counts as no signal too.
    signal = sums.is_integer | (np.abs(wanted) < _MASKED)
    wanted, given = wanted[signal], given[signal]
    finite = np.isfinite(given)
    sums.broken |= not finite.all()
    wanted = wanted[finite]
    error = np.abs(wanted - given[finite])
    sums.elements += error.size
    sums.signal += float(np.dot(wanted, wanted))
    sums.noise += float(np.dot(error, error))
    sums.absolute += float(error.sum())
    sums.largest = max(sums.largest, float(error.max(initial=0.0)))


def _sqnr_db(sums: _Sums) -> float | None:
    if sums.is_integer or not (sums.elements or sums.broken):
        return None
    if sums.broken or (sums.noise > 0.0 and sums.signal == 0.0):
        return -SQNR_CAP_DB
    if sums.noise == 0.0:
        return SQNR_CAP_DB
    ratio = 10.0 * (math.log10(sums.signal) - math.log10(sums.noise))
    return min(max(ratio, -SQNR_CAP_DB), SQNR_CAP_DB)
