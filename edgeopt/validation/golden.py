"""Golden vectors: does the shipped file still give what it gave when it was made?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle

import numpy as np

from edgeopt.runtimes.base import Session
from edgeopt.types import Array, Check, Signature

NativeOutputs = Mapping[str, Array]


def golden_check(session: Session, pairs: Iterable[tuple[NativeOutputs, NativeOutputs]], tolerance: float) -> Check:
    """Run every golden input and hold the outputs against the stored ones.

    Args:
        session: the shipped file, opened.
        pairs: (inputs, outputs) in the file's terms.
        tolerance: largest difference that passes, as a fraction of the stored output's range (max - min); other
            hardware's kernels round differently.
    """
    worst = 0.0
    for inputs, expected in pairs:
        found = session.run_native(inputs)
        worst = max(worst, *(_difference(expected[name], found[name]) for name in expected))
    return Check("golden_vectors", worst, tolerance, "<=", "fraction of range", worst <= tolerance)


def _difference(expected: Array, found: Array) -> float:
    """Largest difference as a fraction of the expected range; infinite where shapes, NaNs or infinities differ. The
    bundle's own scripts compute the same."""
    if expected.shape != found.shape:
        return float("inf")
    wanted, got = expected.astype(np.float64), found.astype(np.float64)
    same = (wanted == got) | (np.isnan(wanted) & np.isnan(got))  # equal infinities included
    if same.all():
        return 0.0
    finite = wanted[np.isfinite(wanted)]
    span = float(finite.max() - finite.min()) if finite.size > 1 else 0.0
    span = span or float(np.abs(finite).max(initial=0.0)) or 1.0
    largest = float(np.abs(wanted[~same] - got[~same]).max()) / span
    return largest if np.isfinite(largest) else float("inf")


class Replay(Session):
    """Gives recorded outputs, one set per run, in order and over again: stands in for a model that is not at hand."""

    def __init__(self, signature: Signature, outputs: Sequence[Mapping[str, Array]]) -> None:
        super().__init__(signature)
        self._outputs: Iterator[Mapping[str, Array]] = cycle(outputs)

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        del inputs
        return dict(next(self._outputs))

    def encode(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(inputs)

    def decode(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(outputs)

    def close(self) -> None:
        """Nothing to free."""
