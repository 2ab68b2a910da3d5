"""An ONNX model as a torch model, checked against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import ConversionError, EdgeoptError
from edgeopt.sources import adapter
from edgeopt.sources.build import freeze
from edgeopt.sources.observe import array_of
from edgeopt.sources.onnx_file import Runner, read
from edgeopt.types import Array, Model, NativeGraph, StepRecord

if TYPE_CHECKING:
    import torch

#: Largest difference from ONNX Runtime, relative to the largest value of the output. Two float32 implementations
#: differ by about 1e-6 times the depth; a misread operator by far more.
TOLERANCE = 1e-3


def convert(model: Model, native: NativeGraph) -> Model:
    """Rebuild the graph as a module.

    Raises ConversionError naming operator and node when that can't be done, or when the module's outputs on the
    example inputs are not those of ONNX Runtime.
    """
    from edgeopt.sources.onnx_graph import load_graph
    from edgeopt.sources.onnx_module import OnnxModule

    read(native.path)
    graph = load_graph(native.path, model.inputs)
    names = [spec.name for spec in model.inputs]
    module = adapter.adapt(OnnxModule(graph), list(graph.inputs), None)
    if list(graph.inputs) != names:
        # The simplifier drops inputs that nothing depends on.
        raise ConversionError(
            f"does not depend on its inputs {', '.join(sorted(set(names) - set(graph.inputs)))}",
            where=str(native.path),
            fix="choose an ONNX target, or remove these inputs from the graph",
        )
    freeze(module)
    _check(_run(module, model), Runner(native.path, model.inputs)(model.example_inputs), native)
    return replace(model, module=module, native=None, history=(*model.history, StepRecord("onnx-to-torch")))


def _run(module: torch.nn.Module, model: Model) -> dict[str, Array]:
    import torch

    tensors = [torch.from_numpy(np.array(model.example_inputs[spec.name])) for spec in model.inputs]
    try:
        with torch.no_grad():
            results = adapter.flatten(module(*tensors))
    except EdgeoptError:
        raise
    except Exception as error:
        # torch raises many kinds for a node whose shapes or types it doesn't take.
        notes = getattr(error, "__notes__", ["an unknown operator"])
        reason = str(error).strip().splitlines()
        raise ConversionError(
            f"torch can't run it: {reason[0] if reason else type(error).__name__}",
            where=notes[0],
            fix="choose an ONNX target, which takes the graph as it is",
        ) from error
    return {spec.name: array_of(tensor, spec.name) for spec, (_, tensor) in zip(model.outputs, results, strict=True)}


def _check(found: Mapping[str, Array], expected: Mapping[str, Array], native: NativeGraph) -> None:
    for name, reference in expected.items():
        largest = float(np.max(np.abs(reference), initial=0.0)) if reference.dtype.kind == "f" else 0.0
        is_same = found[name].shape == reference.shape and np.allclose(
            found[name], reference, rtol=0.0, atol=TOLERANCE * max(largest, 1e-6), equal_nan=reference.dtype.kind == "f"
        )
        if not is_same:
            raise ConversionError(
                f"the torch module's output {name!r} is not that of ONNX Runtime",
                where=str(native.path),
                fix="choose an ONNX target, which takes the graph as it is, and please report this",
            )
