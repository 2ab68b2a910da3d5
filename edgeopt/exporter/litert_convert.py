"""PyTorch module, SavedModel or Keras file -> float .tflite file."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import ConversionError, MissingError
from edgeopt.exporter import litert_graph
from edgeopt.exporter.litert_names import layers_in, mark_layers, rename
from edgeopt.formats.litert_write import write_model
from edgeopt.types import Array, Dim, Model, NativeGraph, TensorSpec

if TYPE_CHECKING:
    import torch

#: NCHW -> NHWC.
CHANNELS_LAST = (0, 2, 3, 1)
_CHANNELS_FIRST = (0, 3, 1, 2)
#: Attribute under which our adapter holds the model.
_ADAPTED = "edgeopt_adapted"
#: Bytes of weights from which on litert-torch shall leave them where they are. It otherwise copies each, and once more
#: each that it transposes. What it can't fold into weights that it does not look at, it folds by running LiteRT.
LARGE = 1 << 28


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Python warnings of vendor packages to themselves; the user can do nothing about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def permutation(spec: TensorSpec) -> tuple[int, ...] | None:
    """How a model tensor is transposed in the file: images channel-last, as LiteRT's kernels want them."""
    return CHANNELS_LAST if spec.layout == "NCHW" and len(spec.shape) == 4 else None


def from_native(native: NativeGraph, destination: Path) -> None:
    """Convert a TensorFlow SavedModel or a .keras file.

    Raises:
        MissingError: TensorFlow is not installed.
        ConversionError: the graph is of another kind, or TensorFlow's converter refuses it.
    """
    if native.kind not in ("savedmodel", "keras"):
        raise ConversionError(
            f"a {native.kind} graph can't become a LiteRT file directly",
            where=str(native.path),
            fix="give the PyTorch model it was made from",
        )
    try:
        with quiet():
            import tensorflow as tf
    except ModuleNotFoundError as error:
        raise MissingError.extra("tensorflow", "tensorflow", "converting a TensorFlow model") from error
    try:
        with quiet():
            if native.kind == "keras":
                keras = tf.keras.models.load_model(native.path, compile=False, safe_mode=True)
                converter = tf.lite.TFLiteConverter.from_keras_model(keras)
            else:
                converter = tf.lite.TFLiteConverter.from_saved_model(str(native.path))
            content = converter.convert()
    except Exception as error:  # Keras and the converter raise whatever a layer's own code raises.
        raise ConversionError(f"TensorFlow's converter failed: {_first_line(error)}", where=str(native.path)) from error
    destination.write_bytes(content)


def from_torch(model: Model, destination: Path) -> None:
    """Convert a module with litert-torch. Image inputs and outputs become channel-last, int64 becomes int32.

    Raises:
        ConversionError: PyTorch can't trace the module, a dynamic dimension turns out to be fixed, or litert-torch
            has no lowering for an operator (named, with its layer).
    """
    with quiet():
        import litert_torch
    from ai_edge_litert.tools import flatbuffer_utils

    arguments = _example_arguments(model)
    dynamic_shapes = _dynamic_shapes(model.inputs)
    program = _trace(_adapt(model), arguments, dynamic_shapes, model)
    litert_graph.drop_unread_weights(program)
    litert_graph.rewrite(program)
    output_layers = mark_layers(program.graph, _ADAPTED)
    try:
        with quiet():
            converted = litert_torch.convert(
                program, arguments, dynamic_shapes=dynamic_shapes, lightweight_conversion=_is_large(program)
            )
            converted.export(str(destination))
    except Exception as error:  # Every lowering raises its own type.
        raise _conversion_error(error, model.name, dynamic_shapes is not None) from error
    if not destination.is_file() or not destination.stat().st_size:
        raise ConversionError("litert-torch wrote an empty file", where=model.name)
    del converted, program  # they hold the weights once more
    content = flatbuffer_utils.read_model(str(destination))
    rename(content, [t.name for t in model.inputs], [t.name for t in model.outputs], output_layers)
    write_model(content, destination)


def _is_large(program: torch.fx.GraphModule) -> bool:
    return sum(tensor.nbytes for tensor in (*program.parameters(), *program.buffers())) >= LARGE


def _example_arguments(model: Model) -> tuple[torch.Tensor, ...]:
    import torch

    arguments = []
    for spec in model.inputs:
        values = _stretched(model.example_inputs[spec.name], spec)
        order = permutation(spec)
        arguments.append(torch.from_numpy(np.ascontiguousarray(values.transpose(order) if order else values)))
    return tuple(arguments)


def _stretched(values: Array, spec: TensorSpec) -> Array:
    """The example with at least two elements along dynamic dimensions: torch.export takes a size of 1 for fixed."""
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, Dim) and values.shape[axis] == 1 and dim.max > 1:
            values = np.repeat(values, max(2, dim.min), axis=axis)
    return values


def _dynamic_shapes(inputs: Sequence[TensorSpec]) -> tuple[dict[int, object], ...] | None:
    """In torch.export's form, one entry per input; None where all is static."""
    import torch

    dims: dict[str, object] = {}
    shapes: list[dict[int, object]] = []
    for spec in inputs:
        order = permutation(spec) or range(len(spec.shape))
        axes: dict[int, object] = {}
        for axis, source in enumerate(order):
            dim = spec.shape[source]
            if isinstance(dim, Dim):
                axes[axis] = dims.setdefault(dim.name, torch.export.Dim(dim.name, min=dim.min, max=dim.max))
        shapes.append(axes)
    return tuple(shapes) if dims else None


def _adapt(model: Model) -> torch.nn.Module:
    """The module with channel-last images at its borders and its outputs as one flat tuple."""
    import torch
    from torch.utils import _pytree as pytree

    input_orders = [_CHANNELS_FIRST if permutation(t) else None for t in model.inputs]
    output_orders = [permutation(t) for t in model.outputs]

    class Adapter(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.add_module(_ADAPTED, module)

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            arguments = [x.permute(o) if o else x for x, o in zip(inputs, input_orders, strict=True)]
            outputs = pytree.tree_leaves(self.get_submodule(_ADAPTED)(*arguments))
            return tuple(y.permute(o) if o else y for y, o in zip(outputs, output_orders, strict=True))

    if model.module is None:
        raise ConversionError("holds no PyTorch module", where=model.name)
    return Adapter(model.module).eval()


def _trace(
    module: torch.nn.Module,
    arguments: tuple[torch.Tensor, ...],
    dynamic_shapes: tuple[dict[int, object], ...] | None,
    model: Model,
) -> torch.fx.GraphModule:
    import torch

    try:
        with quiet(), torch.no_grad():
            # The adapter takes all inputs as one variadic argument.
            dims = None if dynamic_shapes is None else (dynamic_shapes,)
            program = torch.export.export(module, arguments, dynamic_shapes=dims, strict=False)
            traced: torch.fx.GraphModule = program.module(check_guards=False)
        traced.training = False  # Traced in eval mode; the flag alone would make litert-torch warn.
    except Exception as error:  # The module's own code runs here and can raise anything.
        if dynamic_shapes is not None and re.search(r"[Cc]onstraints violated|specializ|not.*dynamic", str(error)):
            raise ConversionError(
                f"a dynamic dimension is fixed by the model's code: {_first_line(error)}",
                where=model.name,
                fix="give a static shape for it",
            ) from error
        raise ConversionError(f"torch.export can't trace the model: {_first_line(error)}", where=model.name) from error
    return traced


def _conversion_error(error: Exception, name: str, is_dynamic: bool) -> ConversionError:
    """Name the operator and the layer at which litert-torch gave up."""
    node = _failing_node(error)
    missing = re.search(r"Lowering not found: (\S+)", str(error))
    layers = layers_in(_marks_of(node) if node is not None else str(error))
    where = f"layer {layers[0]!r}" if layers and layers[0] else name
    if node is None:
        return ConversionError(f"litert-torch can't convert the model: {_first_line(error)}", where=where)
    if is_dynamic and not missing:
        return ConversionError(
            f"litert-torch can't convert the operator {node.target} with a dynamic dimension",
            where=where,
            fix="give static shapes, or choose an ONNX target",
        )
    operator = missing[1] if missing else str(node.target)
    reason = "LiteRT has no counterpart for it" if missing else _first_line(error)
    return ConversionError(
        f"the operator {operator} can't be converted: {reason}",
        where=where,
        fix="replace it in the model, or choose an ONNX target",
    )


def _failing_node(error: Exception) -> torch.fx.Node | None:
    """The node that litert-torch was lowering; its message doesn't tell, the frames of its interpreter do."""
    import torch

    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in (frame.f_locals.get("node"), frame.f_locals.get("n")):
            if isinstance(value, torch.fx.Node) and value.op == "call_function":
                found = value
    return found


def _marks_of(node: torch.fx.Node) -> str:
    return ";".join(f"{kind}_{path}" for path, kind in (node.meta.get("nn_module_stack") or {}).values())


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
