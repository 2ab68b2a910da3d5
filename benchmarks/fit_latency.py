"""Fitting the CPU latency model to published figures: least squares on log time, pulled towards priors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from published_networks import NETWORKS, family, works
from scipy.optimize import least_squares

from edgeopt.device_profiles import list_devices, load_device
from edgeopt.device_profiles.schema import DeviceProfile
from edgeopt.prediction.machine import machine
from edgeopt.prediction.model import EFFICIENCIES, Demand, Parameters, demand, milliseconds
from edgeopt.prediction.work import OpWork

EXTRA = Path(__file__).parent / "prediction_devices"
#: Clock of the boards that figures were taken on, where it is not the profile's.
CLOCKS = {"raspberry-pi-4": 1500}
#: Addresses of figures taken before LiteRT ran such files in XNNPACK (float since 2.3 and 2.4, int8 since 2.5 and 2.6:
#: blog.tensorflow.org/2020/07/accelerating-tensorflow-lite-xnnpack-integration.html and
#: blog.tensorflow.org/2021/09/faster-quantized-inference-with-xnnpack.html), by precision.
OLD_KERNELS = {
    "fp32": ("tensorflow.org/lite", "tensorflow/tpu"),
    "w8a8": ("tensorflow.org/lite", "tensorflow/tpu", "coral.ai", "efficientdet.md"),
}
RUNTIMES = ("litert", "xnnpack")

#: Prior (a value and the standard deviation of its logarithm). Efficiencies of matrix kernels: half of the peak, less
#: the more a cycle could do; depthwise kernels load as much as they multiply. The rest: orders of magnitude.
#: No figure tells of fp16 and i8mm: what they gain over fp32 and dot products is the prior's (1.8 and 1.3 times).
_EFFICIENCY = {
    "matrix-fp32": (0.6, 0.3), "matrix-fp16": (0.9, 0.3), "matrix-int8": (0.5, 0.3), "matrix-dotprod": (0.4, 0.3),
    "matrix-i8mm": (0.65, 0.3), "depthwise-float": (0.25, 0.4), "depthwise-int8": (0.15, 0.4), "pool": (0.3, 0.6),
    "elementwise": (0.3, 0.6), "transcendental": (0.05, 0.6), "movement": (0.3, 0.6),
}  # fmt: skip
#: Whose entry above is a share of another's efficiency.
_RELATIVE = {"matrix-fp16": "matrix-fp32", "matrix-i8mm": "matrix-dotprod"}
_SERIAL, _SHARING, _DISPATCH = (0.08, 0.5), (0.4, 0.5), (5.0, 0.7)
_CORE, _MEMORY = 0.2, 0.4
_DEVICE_COMPUTE, _DEVICE_MEMORY = 0.15, 0.3
_KERNELS = 0.4
#: Of one published figure around a model that is right.
NOISE = 0.15


@dataclass(frozen=True)
class Observation:
    """One published figure. `old` says of which precision the kernels were old ("" for today's)."""

    device: DeviceProfile
    model: str
    precision: str
    threads: int
    ms: float
    source: str
    old: str
    asked: Demand

    @property
    def family(self) -> str:
        return family(self.model)

    @property
    def macs(self) -> int:
        return sum(op.macs for op in _works(self.model, self.precision) if op.kind in ("conv", "depthwise", "matmul"))


@cache
def _works(model: str, precision: str) -> Sequence[OpWork]:
    return works(model, precision)


def observations() -> list[Observation]:
    """Every figure of a CPU whose network is known; a figure without thread count is one of a single thread, which is
    the default of LiteRT's interpreter."""
    devices = [*list_devices(), *(load_device(str(path)) for path in sorted(EXTRA.glob("*.toml")))]
    found = []
    for device in devices:
        for figure in device.reference_latencies:
            if figure.runtime not in RUNTIMES or figure.model not in NETWORKS or figure.precision not in OLD_KERNELS:
                continue
            threads = figure.threads or 1
            on = machine(device, threads, CLOCKS.get(device.name))
            old = any(part in figure.source for part in OLD_KERNELS[figure.precision])
            asked = demand(_works(figure.model, figure.precision), on)
            kernels = figure.precision if old else ""
            found.append(
                Observation(device, figure.model, figure.precision, threads, figure.ms, figure.source, kernels, asked)
            )
    return found


@dataclass(frozen=True)
class Fitted:
    """`old` is how much longer figures of old kernels are, by precision."""

    parameters: Parameters
    old: dict[str, float]

    def predict(self, observation: Observation) -> float:
        """Milliseconds, with the kernels of the figure's time."""
        ms = float(milliseconds(observation.asked, self.parameters).sum())
        return ms * self.old.get(observation.old, 1.0)


class Layout:
    """Which entry of the vector of logarithms is what."""

    def __init__(self, data: Sequence[Observation]) -> None:
        self.kinds = sorted({o.asked.core for o in data})
        self.devices = sorted({o.device.name for o in data})
        rows = [*_EFFICIENCY.values(), _SERIAL, _SHARING, _DISPATCH, (1.0, _KERNELS), (1.0, _KERNELS)]
        rows += [(1.0, _CORE)] * len(self.kinds) + [(1.0, _MEMORY)] * len(self.kinds)
        rows += [(1.0, _DEVICE_COMPUTE), (1.0, _DEVICE_MEMORY)] * len(self.devices)
        self.prior = np.log([value for value, _ in rows])
        self.sd = np.array([sd for _, sd in rows])

    def fitted(self, vector: np.ndarray) -> Fitted:
        values = iter(np.exp(vector).tolist())
        efficiency = {name: next(values) for name in _EFFICIENCY}
        serial, sharing, dispatch, old_float, old_int8 = (next(values) for _ in range(5))
        core = {kind: next(values) for kind in self.kinds}
        memory = {kind: next(values) for kind in self.kinds}
        device = {name: (next(values), next(values)) for name in self.devices}
        efficiency |= {name: efficiency[name] * efficiency[whose] for name, whose in _RELATIVE.items()}
        assert tuple(efficiency) == EFFICIENCIES
        parameters = Parameters(efficiency, min(serial, 1.0), min(sharing, 1.0), dispatch, core, memory, device)
        return Fitted(parameters, {"fp32": old_float, "w8a8": old_int8})


def fit(data: Sequence[Observation], layout: Layout) -> Fitted:
    """Fit to all of `data`, from the priors on, where what `data` says nothing about stays."""
    target = np.log([o.ms for o in data])

    def residuals(vector: np.ndarray) -> np.ndarray:
        fitted = layout.fitted(vector)
        ms = np.log([fitted.predict(o) for o in data])
        return np.concatenate([(ms - target) / NOISE, (vector - layout.prior) / layout.sd])

    # Far residuals count linearly (soft L1): a figure may be of a network, or of a throttled board, that we mistake.
    solution = least_squares(residuals, layout.prior, loss="soft_l1", max_nfev=30, diff_step=1e-4)
    return layout.fitted(solution.x)


def error(predicted: float, measured: float) -> float:
    """Logarithm of the ratio; +0.1 is about 10 % too long."""
    return math.log(predicted / measured)
