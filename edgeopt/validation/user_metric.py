"""A metric that the user wrote, named as `file.py:name` or `package.module:name`.

A function `name(outputs: dict[str, ndarray], label) -> float` is averaged over the samples. A class is created once
per model without arguments, its `update(outputs, label)` is called per sample and its `value() -> float` at the end.
Higher is better unless the function or class has an attribute `higher_is_better = False`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from edgeopt.errors import UsageError
from edgeopt.types import Array, Sample
from edgeopt.user_code import UserObject, load_user_object

Label = int | Array | None


@runtime_checkable
class Accumulator(Protocol):
    """What a user's metric class offers."""

    def update(self, outputs: dict[str, Array], label: Label) -> None: ...

    def value(self) -> float: ...


class _Average:
    """A user's function as an accumulator: its mean over the samples."""

    def __init__(self, function: Callable[[dict[str, Array], Label], float]) -> None:
        self._function = function
        self._sum = 0.0
        self._samples = 0

    def update(self, outputs: dict[str, Array], label: Label) -> None:
        self._sum += float(self._function(outputs, label))
        self._samples += 1

    def value(self) -> float:
        return self._sum / self._samples


class UserMetric:
    """Calls the user's code and says so when that fails."""

    def __init__(self, name: str, code: UserObject, accumulator: Accumulator, *, higher_is_better: bool) -> None:
        self.name = name
        self._code = code
        self.higher_is_better = higher_is_better
        self._accumulator = accumulator

    def update(self, outputs: Mapping[str, Array], sample: Sample) -> None:
        with self._code.running(f"failed on sample {sample.name!r}"):
            self._accumulator.update(dict(outputs), sample.label)

    def value(self) -> float:
        with self._code.running("has no value"):
            value = float(self._accumulator.value())
        if not math.isfinite(value):
            raise UsageError(f"is {value}", where=f"metric {self.name!r}", fix="it must be a finite number")
        return value


def load_user_metric(spec: str) -> Callable[[], UserMetric]:
    """Import the user's code now; the returned function makes a fresh metric.

    Raises:
        UsageError: when the file, module or name does not exist, importing it fails, or it is neither a function nor
            a class with `update` and `value`.
    """
    found = load_user_object(spec, "function or class", where=f"metric {spec!r}")
    code = found.value
    if not callable(code):
        raise UsageError(f"is a {type(code).__name__}, not a function or a class", where=found.where)
    higher = bool(getattr(code, "higher_is_better", True))

    def create() -> UserMetric:
        accumulator = found.call("could not be created") if isinstance(code, type) else _Average(code)
        if not isinstance(accumulator, Accumulator):
            raise UsageError("lacks update() or value()", where=found.where)
        return UserMetric(spec, found, accumulator, higher_is_better=higher)

    return create
