"""`file.py:factory` and `package.module:factory`: the user's own Python builds the module."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType

from edgeopt.errors import UsageError
from edgeopt.sources.base import ModelSpec, SourceOptions
from edgeopt.sources.build import freeze
from edgeopt.sources.digest import sha256_of
from edgeopt.sources.spec import model_of
from edgeopt.sources.weights import load_weights
from edgeopt.types import Model
from edgeopt.user_code import UserObject, load_user_object


def load(source: str, options: SourceOptions) -> Model:
    """Run the factory, fill in the weights. This executes the user's code; raises UsageError when it goes wrong."""
    location, _, factory_name = source.rpartition(":")
    factory = load_user_object(source, "factory")
    spec = _spec(factory)
    with factory.running("the model failed"):  # running it for the first time may import more of the user's code
        if options.weights is not None:
            load_weights(spec.module, options.weights)
        freeze(spec.module)
        code = _code_file(factory.module, source)
        weights = options.weights.suffix.removeprefix(".") if options.weights else None
        return model_of(
            spec,
            options,
            name=f"{location.removesuffix('.py').replace('/', '.').rpartition('.')[2]}-{factory_name}",
            where=source,
            weights=weights,
            sha256=sha256_of([code, options.weights]) if options.weights else sha256_of([code], spec.module),
        )


def _spec(factory: UserObject) -> ModelSpec:
    """What the factory gives; the name may also stand for a module or a spec that is there already."""
    import torch

    given = factory.value
    made = given if isinstance(given, torch.nn.Module | ModelSpec) else factory.call("the factory failed")
    spec = ModelSpec(made) if isinstance(made, torch.nn.Module) else made
    if not isinstance(spec, ModelSpec) or not isinstance(spec.module, torch.nn.Module):
        kind = type(spec.module if isinstance(spec, ModelSpec) else spec).__name__
        raise UsageError(
            f"returned a {kind}",
            where=factory.where,
            fix="return a torch.nn.Module or an edgeopt.sources.ModelSpec",
        )
    return spec


def _code_file(python_module: ModuleType, source: str) -> Path:
    file = inspect.getsourcefile(python_module)
    if file is None:
        raise UsageError("has no source file to identify it by", where=source)
    return Path(file)
