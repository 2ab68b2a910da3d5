"""The directions of a layer's output that carry the most, judged on samples that they were not fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Variance that every input is given beside its own, as a multiple of their mean variance: few samples show few
#: directions, and weights that none of them used must not be forgotten. What serves held-out samples best is taken.
_RIDGES = (1e-3, 3e-2, 1.0, 30.0)


@dataclass(frozen=True, slots=True, eq=False)
class Covariance:
    """Of what a layer's matrix A (n, m) reads (n, n) or puts out (m, m), about the mean, in float64.

    Attributes:
        halves: of every other sample, for fitting and for judging; None where there was one sample only.
    """

    side: Literal["inputs", "outputs"]
    mean: Tensor
    values: Tensor
    halves: tuple[Tensor, Tensor] | None


def principal_directions(matrix: Tensor, seen: Covariance | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of the outputs times `scale`, (m, k) with k = min(n, m), and the mean square that each carries, (k,).

    Without samples the inputs count alike. With two samples or more, the directions come from all of them, with the
    ridge and the energies from fitting to one half and measuring on the other: directions that follow a few samples
    carry next to nothing there.

    Args:
        matrix: A, times scale.
        scale: (m,), for a covariance of outputs.
    """
    if seen is None:
        return _decomposed(matrix)
    weights = torch.outer(scale, scale) if seen.side == "outputs" else torch.ones(())
    whole = seen.values * weights
    fitted, held = (half * weights for half in seen.halves or (seen.values, seen.values))
    cut = max(1, matrix.numel() // sum(matrix.shape) // 2)
    candidates = []
    for ridge in _RIDGES if seen.halves is not None else _RIDGES[:1]:
        basis = _fitted(matrix, fitted, seen.side, ridge)
        energies = _carried(matrix, basis, held, seen.side)
        candidates.append((float(energies[cut:].sum()), ridge, energies))
    _, ridge, energies = min(candidates, key=lambda candidate: candidate[0])
    return _fitted(matrix, whole, seen.side, ridge), energies


def _fitted(matrix: Tensor, covariance: Tensor, side: str, ridge: float) -> Tensor:
    """Eigenvectors of A' (C + ridge) A."""
    if side == "outputs":
        gram = matrix.mT @ matrix
        level = _level(covariance.trace(), gram.trace(), ridge)
        directions: Tensor = torch.linalg.eigh(covariance + level * gram)[1].flip(1)
        return directions[:, : min(matrix.shape)]
    level = _level((matrix * (covariance @ matrix)).sum(), matrix.square().sum(), ridge)
    values, vectors = torch.linalg.eigh(covariance)
    return _decomposed((values.clamp(min=0) + level).sqrt()[:, None] * (vectors.mT @ matrix))[0]


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    _, roots, transposed = torch.linalg.svd(matrix, full_matrices=False)
    return transposed.mT, roots.square()


def _carried(matrix: Tensor, basis: Tensor, covariance: Tensor, side: str) -> Tensor:
    """Mean square along each direction."""
    read = basis if side == "outputs" else matrix @ basis
    return (read * (covariance @ read)).sum(0).clamp(min=0)


def _level(power: Tensor, norm: Tensor, ridge: float) -> float:
    """Variance to add; where all inputs are constant, they count alike."""
    return ridge * float(power / norm) if power > 0 else 1.0
