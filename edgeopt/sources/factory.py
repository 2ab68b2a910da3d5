"""`file.py:factory` and `package.module:factory`: the user's own Python builds the module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import EdgeoptError, UsageError
from edgeopt.sources import adapter
from edgeopt.sources.base import ModelSpec, SourceOptions
from edgeopt.sources.build import build, freeze
from edgeopt.sources.digest import sha256_of
from edgeopt.sources.signature import DTYPES, fits, spec_of
from edgeopt.sources.weights import load_weights
from edgeopt.types import Array, Model, StepRecord, TensorSpec

if TYPE_CHECKING:
    import torch

    from edgeopt.sources.base import ExampleTensor

HOW_TO_DECLARE = (
    "declare each with --input NAME=DTYPE[d0,d1,...], for example --input x=float32[1,3,224,224], "
    "or return edgeopt.sources.ModelSpec(module, example_inputs=...) from the factory"
)


def load(source: str, options: SourceOptions) -> Model:
    """Run the factory, fill in the weights. This executes the user's code; raises UsageError when it goes wrong."""
    location, _, factory_name = source.rpartition(":")
    with _importable(location):
        python_module = _import(location, source)
        spec = _call(python_module, factory_name, source)
        if options.weights is not None:
            load_weights(spec.module, options.weights)
        freeze(spec.module)
        examples = _examples(spec, source)
        inputs = options.inputs or spec.inputs or _specs_from(examples, source)
        code = _code_file(python_module, source)
        record = StepRecord(
            "load",
            {
                "source": "python",
                "class": type(spec.module).__name__,
                "weights": options.weights.suffix.removeprefix(".") if options.weights else None,
            },
        )
        return build(
            spec.module,
            options,
            name=spec.name or f"{location.removesuffix('.py').replace('/', '.').rpartition('.')[2]}-{factory_name}",
            inputs=inputs,
            examples=_matching(examples, inputs, is_override=bool(options.inputs)),
            output_names=spec.outputs,
            preprocessing=spec.preprocessing,
            labels=tuple(spec.labels),
            record=record,
            sha256=sha256_of([code, options.weights]) if options.weights else sha256_of([code], spec.module),
        )


@contextmanager
def _importable(location: str) -> Iterator[None]:
    """The file's folder (the working directory for a package) on sys.path while the factory is loaded and run."""
    folder = str(Path(location).resolve().parent if location.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _import(location: str, source: str) -> ModuleType:
    if location.endswith(".py"):
        return _import_file(Path(location), source)
    try:
        return importlib.import_module(location)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{location}.".startswith(f"{error.name}."):
            raise UsageError(
                f"no module named {error.name!r}", where=source, fix="install it, or give the path of a .py file"
            ) from error
        raise _went_wrong("importing it failed", error, source) from error
    except Exception as error:
        raise _went_wrong("importing it failed", error, source) from error


def _import_file(path: Path, source: str) -> ModuleType:
    if not path.is_file():
        raise UsageError("no such file", where=str(path))
    # Classes look their module up in sys.modules (dataclasses, pickle); the path keeps two files of one name apart.
    name = f"_edgeopt_source_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError("is not a Python file", where=source)
    python_module = importlib.util.module_from_spec(spec)
    sys.modules[name] = python_module
    try:
        spec.loader.exec_module(python_module)
    except Exception as error:
        del sys.modules[name]
        raise _went_wrong("running the file failed", error, source) from error
    return python_module


def _call(python_module: ModuleType, factory_name: str, source: str) -> ModelSpec:
    import torch

    factory: object = python_module
    for part in factory_name.split("."):
        if not hasattr(factory, part):
            candidates = [
                name
                for name, value in vars(python_module).items()
                if callable(value) and getattr(value, "__module__", None) == python_module.__name__
            ]
            fix = f"it has {', '.join(candidates)}" if candidates else "it has no functions or classes"
            raise UsageError(f"has no factory {factory_name!r}", where=source, fix=fix)
        factory = getattr(factory, part)
    if isinstance(factory, torch.nn.Module | ModelSpec):
        result: object = factory
    elif callable(factory):
        try:
            result = factory()
        except EdgeoptError:
            raise
        except Exception as error:
            raise _went_wrong("the factory failed", error, source) from error
    else:
        raise UsageError(f"is a {type(factory).__name__}, not a function", where=source)
    spec = ModelSpec(result) if isinstance(result, torch.nn.Module) else result
    if not isinstance(spec, ModelSpec) or not isinstance(spec.module, torch.nn.Module):
        kind = type(spec.module if isinstance(spec, ModelSpec) else spec).__name__
        raise UsageError(
            f"returned a {kind}", where=source, fix="return a torch.nn.Module or an edgeopt.sources.ModelSpec"
        )
    return spec


def _went_wrong(what: str, error: Exception, source: str) -> UsageError:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f" at {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame is not None else ""
    return UsageError(f"{what}{place}: {type(error).__name__}: {error}", where=source)


def _code_file(python_module: ModuleType, source: str) -> Path:
    file = inspect.getsourcefile(python_module)
    if file is None:
        raise UsageError("has no source file to identify it by", where=source)
    return Path(file)


def _examples(spec: ModelSpec, source: str) -> dict[str, Array] | None:
    """The factory's examples under the inputs' names."""
    import torch

    given = spec.example_inputs
    if given is None:
        return None
    if isinstance(given, Mapping):
        return {str(name): _array(value, f"example input {name!r}") for name, value in given.items()}
    values = [given] if isinstance(given, torch.Tensor | np.ndarray) else list(given)
    names = [s.name for s in spec.inputs] if spec.inputs else _positional_names(spec.module, len(values))
    if len(names) != len(values):
        raise UsageError(f"gives {len(values)} example inputs, but declares {len(names)} inputs", where=source)
    return {name: _array(value, f"example input {name!r}") for name, value in zip(names, values, strict=True)}


def _positional_names(module: torch.nn.Module, count: int) -> list[str]:
    names, _ = adapter.forward_parameters(module)
    return [names[i] if i < len(names) else f"input_{i}" for i in range(count)]


def _array(value: ExampleTensor, where: str) -> Array:
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            raise UsageError("is bfloat16", where=where, fix="use float32")
        array: Array = value.numpy()
    elif isinstance(value, np.ndarray):
        array = value
    else:
        raise UsageError(f"is a {type(value).__name__}", where=where, fix="give a torch tensor or a NumPy array")
    if array.dtype.name not in DTYPES:
        raise UsageError(f"is {array.dtype.name}", where=where, fix=f"use one of {', '.join(DTYPES)}")
    return array


def _specs_from(examples: dict[str, Array] | None, source: str) -> tuple[TensorSpec, ...]:
    if not examples:
        raise UsageError("the factory returned a module without its inputs", where=source, fix=HOW_TO_DECLARE)
    return tuple(spec_of(name, array) for name, array in examples.items())


def _matching(
    examples: dict[str, Array] | None, inputs: tuple[TensorSpec, ...], *, is_override: bool
) -> dict[str, Array] | None:
    """The factory's examples, unless the user declared other inputs than they are for."""
    if examples is None or set(examples) != {spec.name for spec in inputs}:
        return None
    if is_override and not all(fits(spec, examples[spec.name]) for spec in inputs):
        return None
    return {spec.name: examples[spec.name] for spec in inputs}
