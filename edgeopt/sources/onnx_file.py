"""`.onnx` files: read and run as they are; ONNX targets take them without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError, UsageError
from edgeopt.sources.base import SourceOptions
from edgeopt.sources.build import build_native, override
from edgeopt.sources.digest import sha256_of
from edgeopt.sources.signature import describe, dtype_of, spec_of
from edgeopt.telemetry import opt_out
from edgeopt.types import Array, Dim, Model, NativeGraph, StepRecord, TensorSpec

if TYPE_CHECKING:
    import onnx


def load(source: str, options: SourceOptions) -> Model:
    """Read an ONNX file's signature and run it once.

    Raises UsageError when it is corrupt or invalid, ConversionError naming operator and node when it holds an operator
    that nothing can run.
    """
    path = Path(source)
    graph = read(path)
    inputs = override(_inputs(graph.model, source), options.inputs, source)
    return build_native(
        Runner(path, inputs),
        options,
        name=path.stem,
        native=NativeGraph("onnx", path),
        inputs=inputs,
        layout="NCHW" if _has_conv2d(graph.model) else None,
        record=StepRecord("load", {"source": "onnx", "opset": opset(graph.model)}),
        sha256=sha256_of((path, *graph.external_files)),
    )


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """A checked graph, its weights not loaded if they lie in other files (`external_files`, in order of name)."""

    model: onnx.ModelProto
    external_files: tuple[Path, ...]


def read(path: Path) -> OnnxFile:
    """Parse and check a file. Raises UsageError: absent, not ONNX, invalid, or with weights outside its folder."""
    import onnx

    if not path.is_file():
        raise UsageError("no such file", where=str(path))
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        # protobuf's own error classes, which differ between its implementations.
        raise UsageError("is no ONNX file, or corrupt", where=str(path)) from error
    if not model.graph.node:
        raise UsageError("holds no operators", where=str(path))
    external = _external_files(model, path)
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise _unknown(model, error) or UsageError(
            f"is not valid ONNX: {_first_line(error)}", where=str(path)
        ) from error
    return OnnxFile(model, external)


def _unknown(model: onnx.ModelProto, error: Exception) -> ConversionError | None:
    """The error for an operator that neither the standard nor ONNX Runtime knows; None where it is about another thing.

    They say "No Op registered for Foo", "acme:Foo(-1) is not a registered function/op" and "Could not find an
    implementation for Foo(1)", the node's name coming too late, or not at all.
    """
    found = re.search(
        r"No Op registered for (?P<a>\w+)|(?P<b>\w+)\(-?\d+\) is not a registered"
        r"|Could not find an implementation for (?P<c>\w+)\(-?\d+\)(?: node with name '(?P<name>[^']*)')?",
        str(error),
    )
    if found is None:
        return None
    type_, name = found["a"] or found["b"] or found["c"], found["name"]
    nodes = [node for node in _nodes(model.graph) if node.op_type == type_ and name in (None, node.name)]
    domain = nodes[0].domain if nodes else ""
    known_as = (nodes[0].name or next(iter(nodes[0].output), "")) if nodes else name
    return ConversionError(
        f"the operator {f'{domain}.{type_}' if domain else type_} is neither standard ONNX nor known to ONNX Runtime",
        where=f"node {known_as!r}",
        fix="export the model with standard operators in its place",
    )


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operators that the graph uses."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


class Runner:
    """The file in ONNX Runtime, as a function from named inputs to named outputs."""

    def __init__(self, path: Path, inputs: tuple[TensorSpec, ...]) -> None:
        opt_out()
        import onnxruntime

        self.path = path
        self.inputs = inputs
        options = onnxruntime.SessionOptions()
        # Warnings about this reference run would be about nothing that is shipped.
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # ONNX Runtime raises classes of its native module, which share no public base.
            import onnx

            unknown = _unknown(onnx.load(path, load_external_data=False), error)
            raise unknown or UsageError(f"is refused by ONNX Runtime: {_first_line(error)}", where=str(path)) from error

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        names = [output.name for output in self.session.get_outputs()]
        try:
            values = self.session.run(names, {spec.name: arrays[spec.name] for spec in self.inputs})
        except Exception as error:
            shapes = describe(spec_of(spec.name, arrays[spec.name]) for spec in self.inputs)
            raise UsageError(
                f"failed on the inputs {shapes}: {_first_line(error)}",
                where=str(self.path),
                fix="declare the sizes it takes with --input",
            ) from error
        return dict(zip(names, values, strict=True))


def _inputs(model: onnx.ModelProto, source: str) -> tuple[TensorSpec, ...]:
    """Graph inputs without the initializers, which old files list among them."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_spec(value) for value in model.graph.input if value.name not in initializers)
    if not inputs:
        raise UsageError("takes no inputs", where=source)
    return inputs


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    import onnx

    where = f"input {value.name!r}"
    if not value.type.HasField("tensor_type"):
        raise UsageError("is not a tensor", where=where)
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise UsageError("has no shape", where=where, fix="export the model with its input shapes")
    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    dtype = {"float": "float32", "double": "float64"}.get(names[tensor.elem_type], names[tensor.elem_type])
    shape = tuple(_dim(dim, f"{value.name}_{axis}") for axis, dim in enumerate(tensor.shape.dim))
    return TensorSpec(value.name, shape, dtype_of(dtype, where))


def _dim(dim: onnx.TensorShapeProto.Dimension, fallback: str) -> int | Dim:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        if dim.dim_value == 0:
            raise UsageError("has a dimension of size 0", where=f"input dimension {fallback!r}")
        return int(dim.dim_value)
    return Dim(re.sub(r"\W", "_", dim.dim_param or fallback))


def _has_conv2d(model: onnx.ModelProto) -> bool:
    weights = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    return any(
        weights.get(node.input[1]) == 4
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv")
    ) or any(
        # Weights that aren't initializers (constants, dequantized ones): the kernel's shape tells.
        attribute.name == "kernel_shape" and len(attribute.ints) == 2
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose")
        for attribute in node.attribute
    )


def _external_files(model: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    files: set[Path] = set()
    for tensor in _tensors(model.graph):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        location = PurePath(next((entry.value for entry in tensor.external_data if entry.key == "location"), ""))
        if not location.parts or location.is_absolute() or ".." in location.parts:
            raise UsageError(
                f"the tensor {tensor.name!r} has its data outside the model's folder ({str(location)!r})",
                where=str(path),
            )
        file = path.parent / location
        if not file.is_file():
            raise UsageError(f"its weights file {str(location)!r} is not beside it", where=str(path))
        files.add(file)
    return tuple(sorted(files))


def _tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Initializers and constants, those in subgraphs too."""
    found = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            found.extend([attribute.t, *attribute.tensors] if attribute.HasField("t") else attribute.tensors)
            for subgraph in (attribute.g, *attribute.graphs):
                found.extend(_tensors(subgraph))
    return found


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Operators, those in subgraphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _nodes(subgraph)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
