"""From figures that were measured on a device to its own two factors, on the time of computing and of moving data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeopt.prediction.model import Demand, Parameters, parts

#: Standard deviations of the logarithms: of one measurement around the model, and of the factors of a device that
#: nothing is known about. The second pair is what leaving whole devices out of the fit shows (docs/prediction.md).
NOISE = 0.1
SPREAD = (0.25, 0.35)
_STEPS = 20


@dataclass(frozen=True, slots=True)
class Share:
    """A prediction by what limits it, in milliseconds, and what was measured instead."""

    compute_ms: float
    memory_ms: float
    start_ms: float
    measured_ms: float

    @property
    def predicted_ms(self) -> float:
        return self.compute_ms + self.memory_ms + self.start_ms


def share(asked: Demand, parameters: Parameters, measured_ms: float) -> Share:
    """Where the predicted time goes, operator by operator."""
    compute, memory, start = parts(asked, parameters)
    bound = compute >= memory
    return Share(float(compute[bound].sum()), float(memory[~bound].sum()), float(start.sum()), measured_ms)


def factors(shares: Sequence[Share]) -> tuple[float, float]:
    """The factors (computing, moving) that meet the measurements best: least squares on logarithms, each factor pulled
    towards 1. One figure moves both as far as it can be trusted; several figures of different networks tell them apart.
    """
    spread = np.array(SPREAD)
    logs = np.zeros(2)
    for _ in range(_STEPS):  # Gauss-Newton
        scaled = np.array([[s.compute_ms, s.memory_ms] for s in shares]) * np.exp(logs)
        total = scaled.sum(axis=1) + np.array([s.start_ms for s in shares])
        residual = np.log(total / np.array([s.measured_ms for s in shares]))
        slope = scaled / total[:, None]
        normal = slope.T @ slope / NOISE**2 + np.diag(1 / spread**2)
        step = np.linalg.solve(normal, slope.T @ residual / NOISE**2 + logs / spread**2)
        logs = logs - step
        if np.abs(step).max() < 1e-9:
            break
    compute, memory = np.exp(logs)
    return float(compute), float(memory)
