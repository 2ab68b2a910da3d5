"""A module with what is known about it, as a Python factory or a Python program hands it over -> `Model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import UsageError
from edgeopt.sources import adapter
from edgeopt.sources.base import ModelSpec, SourceOptions
from edgeopt.sources.build import build, freeze
from edgeopt.sources.digest import sha256_of
from edgeopt.sources.generative import check_writer, observe_writer
from edgeopt.sources.huggingface_generation import bare_writer_task, writing_model
from edgeopt.sources.signature import DTYPES, fits, spec_of
from edgeopt.types import Array, Model, StepRecord, TensorSpec

if TYPE_CHECKING:
    import torch

    from edgeopt.sources.base import ExampleTensor

HOW_TO_DECLARE = (
    "declare each with --input NAME=DTYPE[d0,d1,...], for example --input x=float32[1,3,224,224], "
    "or return edgeopt.sources.ModelSpec(module, example_inputs=...) from the factory"
)


def model_of(
    spec: ModelSpec, options: SourceOptions, *, name: str, where: str, weights: str | None, sha256: str
) -> Model:
    """Freeze the module and complete its signature.

    Args:
        name: the model's, unless the spec or the options give one.
        where: how messages call the source.
        weights: kind of the weights file, for the record.
        sha256: of what the module was made from.

    Raises UsageError when examples, declared inputs and module don't fit one another, ConversionError when a network
    that writes does not write token by token what it says of a whole target.
    """
    freeze(spec.module)
    record = StepRecord("load", {"source": "python", "class": type(spec.module).__name__, "weights": weights})
    task = None if spec.generation or spec.inputs or spec.example_inputs is not None else bare_writer_task(spec.module)
    if task is not None and not options.inputs:
        return _transformers_writer(
            spec, options, task, name=spec.name or name, where=where, record=record, sha256=sha256
        )
    examples = _examples(spec, where)
    inputs = options.inputs or spec.inputs or _specs_from(examples, where)
    if spec.generation is not None and not any(entry.is_dynamic for entry in inputs):
        raise UsageError(
            "a network that writes needs a dynamic length of its target",
            where=where,
            fix='give ModelSpec.inputs, the last of them TensorSpec(NAME, (1, Dim("target", 2, LENGTH)), "int64")',
        )
    model = build(
        spec.module,
        options,
        name=spec.name or name,
        inputs=inputs,
        examples=_matching(examples, inputs, is_override=bool(options.inputs)),
        output_names=spec.outputs,
        preprocessing=spec.preprocessing,
        labels=tuple(spec.labels),
        record=record,
        sha256=sha256,
        generation=spec.generation,
    )
    if spec.generation is not None:
        model = observe_writer(model)
        check_writer(model)
    return model


def _transformers_writer(
    spec: ModelSpec, options: SourceOptions, task: str, *, name: str, where: str, record: StepRecord, sha256: str
) -> Model:
    """A network of transformers that came without a word about its inputs, and needs none."""
    # As hf: sources are loaded: the other implementations of attention pick kernels by what the machine has.
    set_attention = getattr(spec.module, "set_attn_implementation", None)
    if callable(set_attention):
        set_attention("eager")
    model = writing_model(
        spec.module, options, task=task, directory=None, where=where, name=name, record=record, sha256=sha256
    )
    return replace(model, preprocessing=options.preprocessing or spec.preprocessing)


def load_spec(spec: ModelSpec, options: SourceOptions) -> Model:
    """A model that a Python program holds in memory. Raises UsageError as `model_of` does."""
    import torch

    if not isinstance(spec.module, torch.nn.Module):
        raise UsageError(f"is a {type(spec.module).__name__}, not a torch.nn.Module", where="ModelSpec.module")
    name = type(spec.module).__name__
    return model_of(spec, options, name=name, where=name, weights=None, sha256=sha256_of((), spec.module))


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
