"""`file.py:factory` and `package.module:factory`: the user's own Python builds the module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from edgeopt.errors import EdgeoptError, UsageError
from edgeopt.sources.base import ModelSpec, SourceOptions
from edgeopt.sources.digest import sha256_of
from edgeopt.sources.spec import model_of
from edgeopt.sources.weights import load_weights
from edgeopt.types import Model


def load(source: str, options: SourceOptions) -> Model:
    """Run the factory, fill in the weights. This executes the user's code; raises UsageError when it goes wrong."""
    location, _, factory_name = source.rpartition(":")
    with _importable(location):
        python_module = _import(location, source)
        spec = _call(python_module, factory_name, source)
        if options.weights is not None:
            load_weights(spec.module, options.weights)
        code = _code_file(python_module, source)
        weights = options.weights.suffix.removeprefix(".") if options.weights else None
        return model_of(
            spec,
            options,
            name=f"{location.removesuffix('.py').replace('/', '.').rpartition('.')[2]}-{factory_name}",
            where=source,
            weights=weights,
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
