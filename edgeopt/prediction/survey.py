"""One file on every device: which of them would be fast enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeopt.device_profiles.schema import DeviceProfile
from edgeopt.errors import UsageError
from edgeopt.prediction.calibration import find
from edgeopt.prediction.count import count
from edgeopt.prediction.estimate import Prediction, estimate
from edgeopt.types import Format


@dataclass(frozen=True, slots=True)
class Survey:
    """Predictions, fastest first; `skipped`: why there is none -> for which devices."""

    predictions: tuple[Prediction, ...]
    skipped: Mapping[str, tuple[str, ...]]


def survey(path: Path, format_: Format, devices: Iterable[DeviceProfile], threads: int) -> Survey:
    """Estimate one file on all `devices`, each with the user's calibration where there is one.

    Raises UsageError where no device's CPU is one that anything can be told of for this file.
    """
    work = count(path, format_)
    found: list[Prediction] = []
    skipped: dict[str, tuple[str, ...]] = {}
    for device in devices:
        try:
            found.append(estimate(work, str(path), format_, device, threads, find(device)))
        except UsageError as error:
            if error.where == str(path):
                raise  # it is the file, and no device changes that
            skipped[error.problem] = (*skipped.get(error.problem, ()), device.name)
    return Survey(tuple(sorted(found, key=lambda prediction: (prediction.ms, prediction.device))), skipped)
