"""Float .tflite -> the same with sparse 1x1 convolutions, for XNNPACK's sparse kernels (Elsen et al. 2020).

A file asks for them by one sparse constant (a compressed tensor with a DENSIFY). XNNPACK then decides itself, part by
part of the network; `litert_sparse_parts` foresees how.
"""

from __future__ import annotations

import copy
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import ConversionError, UsageError
from edgeopt.exporter.litert_convert import quiet
from edgeopt.exporter.litert_sparse_parts import Network, find_parts
from edgeopt.formats.litert import summarize
from edgeopt.types import Array

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: XNNPACK's own threshold, over all 1x1 convolutions of one part.
LEAST_ZEROS = 2 / 3
#: Largest difference between dense and sparse, as a share of the output's largest magnitude: sums in another order.
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class SparseLayer:
    """One float 1x1 convolution.

    Attributes:
        name: of the source layer.
        elements: how many weights it has.
        zeros: share of them that is zero, 0..1.
        refusal: why it stays dense; None where it is stored sparse.
    """

    name: str
    elements: int
    zeros: float
    refusal: str | None


def write_sparse(source: Path, destination: Path, min_zeros: float = LEAST_ZEROS) -> tuple[SparseLayer, ...]:
    """Store the 1x1 convolutions of a float32 or float16 file sparse where XNNPACK then computes them sparse.

    The file shrinks too: zeros are not stored. `destination` is not written where no layer can be sparse.

    Args:
        min_zeros: least share of zeros, 0..1, of a layer that is stored sparse.

    Returns:
        Every float 1x1 convolution of the main graph.

    Raises:
        UsageError: `source` is no LiteRT file, or `min_zeros` is no share.
        ConversionError: LiteRT does not run the result, or its outputs differ.
    """
    if not 0 < min_zeros <= 1:
        raise UsageError(f"{min_zeros:g} is not a share of zeros above 0", where="min-zeros")
    signature = summarize(source).signature
    with quiet():
        from ai_edge_litert.tools import flatbuffer_utils
    model = flatbuffer_utils.read_model(str(source))
    network = Network(model)
    parts, uncountable = find_parts(network), network.uncountable()
    layers = []
    leaving: set[int] = set()
    for position in network.pointwise():
        weights = network.weights(position)
        zeros = float(np.mean(weights == 0))
        refusal = uncountable or parts.refusal(position) or _own_refusal(network, position, zeros, min_zeros)
        if refusal is None:
            leaving |= parts.ends(position)
        layers.append(SparseLayer(network.layer(position), weights.size, zeros, refusal))
    taken = [p for p, layer in zip(network.pointwise(), layers, strict=True) if layer.refusal is None]
    if taken:
        _rewrite(model, network, taken, leaving)
        flatbuffer_utils.write_model(model, str(destination))
        _check(source, destination)
        # Names of inputs and outputs are an interface of their own.
        if summarize(destination).signature != signature:
            raise ConversionError("its inputs and outputs changed when it was made sparse", where=str(destination))
    return tuple(layers)


def dense_here() -> str | None:
    """Why XNNPACK computes sparse files densely on this machine; None where its sparse kernels run."""
    if platform.machine().lower() in ("x86_64", "amd64", "i386", "i686"):
        return "XNNPACK computes densely on x86 processors with AVX, which it expects to be faster"
    return None


def _own_refusal(network: Network, position: int, zeros: float, min_zeros: float) -> str | None:
    tensor = network.stored(position)
    if zeros < min_zeros:
        return f"{zeros:.0%} of its weights are zero, less than {min_zeros:.0%}"
    if tensor is not None and network.shared(tensor):
        return "its weights are shared with another operator"
    return None


def _rewrite(model: schema.ModelT, network: Network, taken: list[int], leaving: set[int]) -> None:
    """Weights of `taken` as sparse constants with a DENSIFY each; pooling set apart from a classifier behind it."""
    from ai_edge_litert import schema_py_generated as schema

    graph = network.graph
    operators = []
    for position, operator in enumerate(graph.operators):
        operators.append(operator)
        readers = network.readers[network.output(position)]
        if position in leaving and any(network.kind(r) == "FULLY_CONNECTED" for r in readers):
            # XNNPACK would take the classifier for a 1x1 convolution, whose dense weights speak against sparse kernels.
            operators.append(_reshape(model, graph, operator))
    densify = _operator(model, schema.BuiltinOperator.DENSIFY, "DensifyOptions", schema.DensifyOptionsT())
    unpacking = []
    for position in taken:
        tensor = network.stored(position)
        if tensor is None:
            raise ValueError(f"operator {position} has no constant float weights")
        unpack = copy.copy(densify)
        unpack.inputs = np.array([_sparse_tensor(model, graph, tensor, network.weights(position))], np.int32)
        unpack.outputs = np.array([tensor], np.int32)
        model.buffers[graph.tensors[tensor].buffer].data = None
        graph.tensors[tensor].buffer = 0
        unpacking.append(unpack)
    graph.operators = unpacking + operators


def _sparse_tensor(model: schema.ModelT, graph: schema.SubGraphT, dense: int, weights: Array) -> int:
    """A constant with the values that aren't zero; compressed rows, one for each output channel."""
    from ai_edge_litert import schema_py_generated as schema

    rows, columns = np.nonzero(weights.reshape(weights.shape[0], -1))
    starts = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=weights.shape[0]))))
    sparsity = schema.SparsityParametersT()
    sparsity.traversalOrder = np.arange(4, dtype=np.int32)
    sparsity.dimMetadata = [schema.DimensionMetadataT() for _ in range(4)]
    for axis, dimension in enumerate(sparsity.dimMetadata[:3]):
        dimension.format, dimension.denseSize = schema.DimensionType.DENSE, weights.shape[axis]
    last = sparsity.dimMetadata[3]
    last.format = schema.DimensionType.SPARSE_CSR
    last.arraySegmentsType, last.arraySegments = _index_vector(starts)
    last.arrayIndicesType, last.arrayIndices = _index_vector(columns)
    tensor = copy.copy(graph.tensors[dense])
    tensor.name = tensor.name + b":sparse"
    tensor.sparsity = sparsity
    tensor.buffer = _buffer(model, weights[weights != 0])
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _index_vector(values: Array) -> tuple[int, object]:
    """The narrowest of the schema's three vectors of indices."""
    from ai_edge_litert import schema_py_generated as schema

    kinds = schema.SparseIndexVector
    largest = int(values.max(initial=0))
    if largest <= np.iinfo(np.uint8).max:
        kind, vector, stored = kinds.Uint8Vector, schema.Uint8VectorT(), values.astype(np.uint8)
    elif largest <= np.iinfo(np.uint16).max:
        kind, vector, stored = kinds.Uint16Vector, schema.Uint16VectorT(), values.astype(np.uint16)
    else:
        kind, vector, stored = kinds.Int32Vector, schema.Int32VectorT(), values.astype(np.int32)
    vector.values = stored
    return kind, vector


def _reshape(model: schema.ModelT, graph: schema.SubGraphT, pooling: schema.OperatorT) -> schema.OperatorT:
    """A RESHAPE to the same shape between a pooling operator and its readers."""
    from ai_edge_litert import schema_py_generated as schema

    result = int(pooling.outputs[0])
    pooled = copy.copy(graph.tensors[result])
    pooled.name = pooled.name + b":pooled"
    shape = schema.TensorT()
    shape.name, shape.type = pooled.name + b"/shape", schema.TensorType.INT32
    shape.shape = np.array([len(pooled.shape)], np.int32)
    shape.buffer = _buffer(model, np.array(pooled.shape, np.int32))
    graph.tensors += [pooled, shape]
    first = len(graph.tensors) - 2
    pooling.outputs = np.array([first], np.int32)
    options = schema.ReshapeOptionsT()
    options.newShape = np.array(pooled.shape, np.int32)
    operator = _operator(model, schema.BuiltinOperator.RESHAPE, "ReshapeOptions", options)
    operator.inputs, operator.outputs = np.array([first, first + 1], np.int32), np.array([result], np.int32)
    return operator


def _buffer(model: schema.ModelT, values: Array) -> int:
    from ai_edge_litert import schema_py_generated as schema

    buffer = schema.BufferT()
    buffer.data = np.frombuffer(values.tobytes(), np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def _operator(model: schema.ModelT, kind: int, options_name: str, options: object) -> schema.OperatorT:
    from ai_edge_litert import schema_py_generated as schema

    kinds = [code.builtinCode for code in model.operatorCodes]
    if kind not in kinds:
        code = schema.OperatorCodeT()
        # Readers of old files look at the deprecated field.
        code.builtinCode, code.deprecatedBuiltinCode, code.version = kind, kind, 1
        model.operatorCodes.append(code)
        kinds.append(kind)
    operator = schema.OperatorT()
    operator.opcodeIndex = kinds.index(kind)
    operator.builtinOptionsType, operator.builtinOptions = getattr(schema.BuiltinOptions, options_name), options
    return operator


def _check(source: Path, destination: Path) -> None:
    """Run both files on the same noise. Raises ConversionError where they differ."""
    try:
        dense, sparse = _run(source), _run(destination)
    except (ValueError, RuntimeError) as error:
        raise ConversionError(f"LiteRT refuses the file: {error}", where=str(destination)) from error
    for number, (expected, result) in enumerate(zip(dense, sparse, strict=True)):
        difference = float(np.abs(expected - result).max(initial=0))
        if not difference <= _TOLERANCE * max(float(np.abs(expected).max(initial=0)), 1e-6):
            raise ConversionError(
                f"the sparse file's output {number} differs from the dense one's by {difference:.3g}",
                where=str(destination),
            )


def _run(path: Path) -> list[Array]:
    """A file's outputs for the same noise every time, as float64."""
    from ai_edge_litert import interpreter as litert

    interpreter = litert.Interpreter(str(path))
    interpreter.allocate_tensors()
    random = np.random.default_rng(0)
    for detail in interpreter.get_input_details():
        noise = random.uniform(-1, 1, detail["shape"]).astype(detail["dtype"])
        interpreter.set_tensor(detail["index"], noise)
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]).astype(np.float64) for detail in interpreter.get_output_details()]
