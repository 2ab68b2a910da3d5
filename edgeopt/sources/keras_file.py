"""`.keras` and `.h5` files and SavedModel directories: for TFLite targets, which convert them without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from edgeopt.errors import MissingError, UsageError
from edgeopt.sources.base import SourceOptions
from edgeopt.sources.build import build_native, override
from edgeopt.sources.digest import sha256_of
from edgeopt.sources.observe import Call
from edgeopt.sources.signature import describe, dtype_of, spec_of
from edgeopt.types import Array, Dim, Model, NativeGraph, StepRecord, TensorSpec

#: Entry point of a SavedModel that TensorFlow Serving and the TFLite converter use.
SIGNATURE = "serving_default"


def load(source: str, options: SourceOptions) -> Model:
    """Read the signature and run the model once. Raises MissingError without TensorFlow, UsageError for a bad file."""
    path = Path(source)
    if not path.exists():
        raise UsageError("no such file", where=source)
    if find_spec("tensorflow") is None:
        raise MissingError.extra("tensorflow", "tensorflow", "a Keras or SavedModel source")
    kind: Literal["savedmodel", "keras"] = "savedmodel" if path.is_dir() else "keras"
    graph = _open_saved_model(path) if kind == "savedmodel" else _open_keras(path)
    return build_native(
        graph.call,
        options,
        name=path.stem if kind == "keras" else path.resolve().name,
        native=NativeGraph(kind, path),
        inputs=override(graph.inputs, options.inputs, source),
        layout="NHWC" if graph.is_convolutional else None,
        record=StepRecord("load", {"source": kind}),
        sha256=sha256_of(sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]),
    )


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: tuple[TensorSpec, ...]
    call: Call
    is_convolutional: bool


def _open_keras(path: Path) -> _Graph:
    import keras

    try:
        # Safe mode refuses Lambda layers, which hold pickled Python.
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        # Keras raises many kinds, for corrupt files and for layers that it doesn't know or trust.
        raise UsageError(f"Keras can't load it: {_first_line(error)}", where=str(path)) from error
    specs = tuple(_spec(str(tensor.name), tuple(tensor.shape), str(tensor.dtype)) for tensor in model.inputs)

    def call(arrays: Mapping[str, Array]) -> dict[str, Array]:
        values = [arrays[spec.name] for spec in specs]
        try:
            results = model(values if len(values) > 1 else values[0], training=False)
        except Exception as error:
            raise _failed(specs, arrays, error, path) from error
        return _named(results)

    return _Graph(specs, call, any("conv2d" in kind.lower() for kind in _layer_kinds(model)))


def _layer_kinds(model: object) -> Iterator[str]:
    """Class names of a model's layers, nested models included."""
    for layer in getattr(model, "layers", ()):
        yield type(layer).__name__
        yield from _layer_kinds(layer)


def _open_saved_model(path: Path) -> _Graph:
    import tensorflow

    try:
        loaded = tensorflow.saved_model.load(str(path))
    except Exception as error:
        # TensorFlow raises many kinds for a directory that is damaged.
        raise UsageError(f"TensorFlow can't load it: {_first_line(error)}", where=str(path)) from error
    if SIGNATURE not in loaded.signatures:
        raise UsageError(
            f"has no signature {SIGNATURE!r}", where=str(path), fix="save it with model.export(DIR) or a signature"
        )
    function = loaded.signatures[SIGNATURE]
    _, keywords = function.structured_input_signature
    specs = tuple(_spec(name, _sizes(spec.shape, path), spec.dtype.name) for name, spec in sorted(keywords.items()))

    def call(arrays: Mapping[str, Array]) -> dict[str, Array]:
        try:
            results = function(**{spec.name: tensorflow.constant(arrays[spec.name]) for spec in specs})
        except Exception as error:
            raise _failed(specs, arrays, error, path) from error
        return {str(name): results[name].numpy() for name in sorted(results)}

    definition = function.graph.as_graph_def()
    nodes = [*definition.node, *(node for part in definition.library.function for node in part.node_def)]
    is_convolutional = any("Conv2d" in node.op or "Conv2D" in node.op for node in nodes)
    return _Graph(specs, call, is_convolutional)


def _sizes(shape: Iterable[int | None], path: Path) -> tuple[int | None, ...]:
    try:
        return tuple(shape)
    except ValueError as error:
        raise UsageError("has an input of unknown rank", where=str(path), fix="save it with input shapes") from error


def _spec(name: str, shape: tuple[int | None, ...], dtype: str) -> TensorSpec:
    clean = re.sub(r"\W", "_", name)
    dims = tuple(Dim("batch" if axis == 0 else f"{clean}_{axis}") if d is None else d for axis, d in enumerate(shape))
    return TensorSpec(name, dims, dtype_of(dtype, f"input {name!r}"))


def _named(results: object) -> dict[str, Array]:
    """Keras results by name: a mapping's keys, else their positions."""
    if isinstance(results, Mapping):
        return {str(name): value.numpy() for name, value in results.items()}
    if isinstance(results, list | tuple):
        return {f"output_{index}": value.numpy() for index, value in enumerate(results)}
    return {"output": np.asarray(results)}


def _failed(specs: tuple[TensorSpec, ...], arrays: Mapping[str, Array], error: Exception, path: Path) -> UsageError:
    shapes = describe(spec_of(spec.name, arrays[spec.name]) for spec in specs)
    return UsageError(
        f"failed on the inputs {shapes}: {_first_line(error)}",
        where=str(path),
        fix="declare the sizes it takes with --input",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
