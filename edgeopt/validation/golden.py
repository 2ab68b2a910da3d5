"""Golden vectors: does the shipped file still give what it gave when it was made?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

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
    if expected.shape != found.shape or expected.size == 0:
        return 0.0 if expected.shape == found.shape else float("inf")
    wanted, got = expected.astype(np.float64), found.astype(np.float64)
    if not np.array_equal(np.isfinite(wanted), np.isfinite(got)):
        return float("inf")
    wanted, got = np.nan_to_num(wanted), np.nan_to_num(got)
    worst = float(np.abs(wanted - got).max())
    span = float(wanted.max() - wanted.min()) or max(abs(float(wanted.max())), 1.0)
    return worst / span


class Replay(Session):
    """Gives recorded outputs, one set per run, in order: stands in for a model that is not at hand."""

    def __init__(self, signature: Signature, outputs: Sequence[Mapping[str, Array]]) -> None:
        super().__init__(signature)
        self._outputs: Iterator[Mapping[str, Array]] = iter(outputs)

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        del inputs
        return dict(next(self._outputs))

    def encode(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(inputs)

    def decode(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(outputs)

    def close(self) -> None:
        """Nothing to free."""
