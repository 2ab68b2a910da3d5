"""A metric that the user wrote, named as `file.py:name` or `package.module:name`.

A function `name(outputs: dict[str, ndarray], label) -> float` is averaged over the samples. A class is created once
per model without arguments, its `update(outputs, label)` is called per sample and its `value() -> float` at the end.
Higher is better unless the function or class has an attribute `higher_is_better = False`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

from edgeopt.errors import UsageError
from edgeopt.types import Array, Sample

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

    def __init__(self, name: str, accumulator: Accumulator, *, higher_is_better: bool) -> None:
        self.name = name
        self.higher_is_better = higher_is_better
        self._accumulator = accumulator

    def update(self, outputs: Mapping[str, Array], sample: Sample) -> None:
        try:
            self._accumulator.update(dict(outputs), sample.label)
        except Exception as error:
            raise _failed(self.name, f"failed on sample {sample.name!r}", error) from error

    def value(self) -> float:
        try:
            value = float(self._accumulator.value())
        except Exception as error:
            raise _failed(self.name, "has no value", error) from error
        if not math.isfinite(value):
            raise UsageError(f"is {value}", where=f"metric {self.name!r}", fix="it must be a finite number")
        return value


def load_user_metric(spec: str) -> Callable[[], UserMetric]:
    """Import the user's code now; the returned function makes a fresh metric.

    Raises:
        UsageError: when the file, module or name does not exist, importing it fails, or it is neither a function nor
            a class with `update` and `value`.
    """
    location, _, name = spec.rpartition(":")
    module = _import(location, spec)
    found = getattr(module, name, None)
    if found is None:
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
        raise UsageError(f"has no {name!r}", where=f"metric {spec!r}", fix=f"it has {', '.join(own) or 'nothing'}")
    if not callable(found):
        raise UsageError(f"is a {type(found).__name__}, not a function or a class", where=f"metric {spec!r}")
    higher = bool(getattr(found, "higher_is_better", True))

    def create() -> UserMetric:
        try:
            accumulator = found() if isinstance(found, type) else _Average(found)
        except Exception as error:
            raise _failed(spec, "could not be created", error) from error
        if not isinstance(accumulator, Accumulator):
            raise UsageError("lacks update() or value()", where=f"metric {spec!r}")
        return UserMetric(spec, accumulator, higher_is_better=higher)

    return create


def _import(location: str, spec: str) -> ModuleType:
    is_file = location.endswith(".py")
    if is_file and not Path(location).is_file():
        raise UsageError("no such file", where=location)
    folder = str(Path(location).resolve().parent if is_file else Path.cwd())
    sys.path.insert(0, folder)
    try:
        return _run_file(Path(location)) if is_file else importlib.import_module(location)
    except Exception as error:
        raise _failed(spec, "could not be imported", error) from error
    finally:
        sys.path.remove(folder)


def _run_file(path: Path) -> ModuleType:
    # Classes look their module up in sys.modules; the hash keeps two files of one name apart.
    name = f"_edgeopt_metric_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _failed(metric: str, what: str, error: Exception) -> UsageError:
    return UsageError(f"{what}: {type(error).__name__}: {error}", where=f"metric {metric!r}")
