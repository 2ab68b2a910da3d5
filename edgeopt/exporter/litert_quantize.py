"""Float .tflite -> quantized .tflite with ai-edge-quantizer, from our own activation ranges."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import ActivationRanges, Range
from edgeopt.errors import ConversionError, DataError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest, layer_is_exempt
from edgeopt.exporter.litert_convert import quiet
from edgeopt.exporter.litert_rewrite import split_hardswish
from edgeopt.formats.litert import ROOT, layer_of
from edgeopt.types import Array, Sample, Scheme, Signature, SignatureTensor

if TYPE_CHECKING:
    from ai_edge_litert import interpreter as litert
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_quantizer import quantizer as aeq

#: Magnitude that only the "minus infinity" of an attention mask has; one int8 scale for it would erase all else.
MASK = 1e9
_MASK_CARRIERS = (
    "ADD", "SUB", "MUL", "SELECT", "SELECT_V2", "RESHAPE", "TRANSPOSE", "BROADCAST_TO", "TILE", "SLICE",
    "STRIDED_SLICE", "CONCATENATION", "GATHER", "GATHER_ND", "EXPAND_DIMS", "SQUEEZE", "PAD", "PADV2", "MINIMUM",
    "DYNAMIC_UPDATE_SLICE",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class KeptFloat:
    """Output tensor of an operator that is to stay float, and why."""

    tensor: str
    reason: str


def quantize(
    source: Path, signature: Signature, request: QuantizationRequest, destination: Path
) -> tuple[KeptFloat, ...]:
    """Write `source`, a float file, to `destination` at the requested scheme.

    Returns:
        The operators that were kept float on purpose.

    Raises:
        ConversionError: ai-edge-quantizer can't do this scheme, or fails on the model.
        DataError: an activation is NaN or Inf, or a calibration sample doesn't fit the model.
    """
    with quiet():
        from ai_edge_litert.tools import flatbuffer_utils
        from ai_edge_quantizer import quantizer as aeq
    model = flatbuffer_utils.read_model(str(source))
    graphs = [_Graph.of(model, graph) for graph in model.subgraphs]
    kept = [
        KeptFloat(op.outputs[0], "kept in float on request")
        for graph in graphs
        for op in graph.ops
        if op.outputs and layer_is_exempt(layer_of(op.outputs[0]).removeprefix(ROOT), request.keep_float)
    ]
    ranges: dict[str, Range] | None = None
    if request.calibration is not None:
        # Nothing can be observed in there: the bodies of loops and reductions run inside one operator.
        kept += [KeptFloat(op.outputs[0], "inside another operator") for g in graphs[1:] for op in g.ops if op.outputs]
        observed = _observe(source, signature, graphs[0], request.scheme, request.calibration, {k.tensor for k in kept})
        ranges = observed.ranges
        kept += [KeptFloat(t, f"reaches {reach:.3g} as attention masks do") for t, reach in observed.masks.items()]
        ranges |= split_hardswish(model, {k.tensor for k in kept})
    scopes = _scopes(graphs, kept)
    try:
        with quiet():
            quantizer = aeq.Quantizer(bytes(flatbuffer_utils.convert_object_to_bytearray(model)))
            _write_recipe(quantizer, request.scheme, scopes)
            result = quantizer.quantize(_statistics(ranges), enable_progress_bar=False, enable_progress_report=False)
    except Exception as error:  # Every operator's rule raises its own type.
        raise ConversionError(f"ai-edge-quantizer failed: {error}", where=source.name) from error
    if not result.quantized_model:
        raise ConversionError("ai-edge-quantizer made an empty file", where=source.name)
    destination.write_bytes(_with_outputs_aligned(result.quantized_model, model, request.scheme.io))
    return tuple(kept)


def _with_outputs_aligned(content: bytes, source: schema.ModelT, io: str) -> bytes:
    """Undo a disagreement between the file's signature and its graph about which tensors are the outputs.

    Where an output also feeds an operator that stays float, ai-edge-quantizer inserts one DEQUANTIZE for both and
    puts its result among the graph's outputs, but not in the signature.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    if not source.signatureDefs:
        return content
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    signature, before = model.signatureDefs[0], source.signatureDefs[0]
    graph, graph_before = model.subgraphs[signature.subgraphIndex], source.subgraphs[before.subgraphIndex]
    positions = {t.name: list(graph_before.outputs).index(t.tensorIndex) for t in before.outputs}
    outputs = [int(index) for index in graph.outputs]
    for entry in signature.outputs:
        position = positions[entry.name]
        if io == "float":
            entry.tensorIndex = outputs[position]
        else:
            outputs[position] = entry.tensorIndex
    graph.outputs = np.array(outputs, np.int32)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def has_recipe(kind: str, activations: str) -> bool:
    """Whether ai-edge-quantizer knows an int8 form of a LiteRT operator."""
    from ai_edge_quantizer import default_policy

    policy = json.loads(default_policy.DEFAULT_JSON_POLICY)["ops_per_config"]
    name = "CONV_2D_TRANSPOSE" if kind == "TRANSPOSE_CONV" else kind
    return name in policy["static_wi8_ai8" if activations == "static" else "dynamic_wi8_afp32"]


def _write_recipe(quantizer: aeq.Quantizer, scheme: Scheme, kept: Sequence[str]) -> None:
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.quantizer import AlgorithmName

    every, granularity = qtyping.TFLOperationName.ALL_SUPPORTED, qtyping.QuantGranularity
    weights = granularity.CHANNELWISE if scheme.weight_granularity == "per-channel" else granularity.TENSORWISE
    match scheme.precision, scheme.activations:
        case "w8a8", "static":
            config = qtyping.OpQuantizationConfig(
                activation_tensor_config=qtyping.TensorQuantizationConfig(
                    num_bits=8, symmetric=scheme.activation_symmetric
                ),
                weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=8, symmetric=True, granularity=weights),
                compute_precision=qtyping.ComputePrecision.INTEGER,
            )
            quantizer.update_quantization_recipe(".*", every, config)
            # There is no static form of a table look-up; this one at least stores the table in int8.
            quantizer.add_dynamic_config(
                ".*", qtyping.TFLOperationName.EMBEDDING_LOOKUP, num_bits=8, granularity=weights
            )
            if scheme.io == "float":
                for border in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
                    quantizer.update_quantization_recipe(".*", border, algorithm_key=AlgorithmName.NO_QUANTIZE)
        case "w8a8", "dynamic":
            quantizer.add_dynamic_config(".*", every, num_bits=8, granularity=weights)
        case "w8", _:
            quantizer.add_weight_only_config(".*", every, num_bits=8, granularity=weights)
        case "fp16", _:
            quantizer.add_weight_only_config(".*", every, num_bits=16, algorithm_key=AlgorithmName.FLOAT_CASTING)
        case precision, activations:
            raise ConversionError(f"LiteRT files can't be made at {precision} with {activations} activations")
    if kept:
        quantizer.update_quantization_recipe(
            f"^(?:{'|'.join(map(re.escape, kept))})$", every, algorithm_key=AlgorithmName.NO_QUANTIZE
        )


def _statistics(ranges: Mapping[str, Range] | None) -> dict[str, dict[str, Array]] | None:
    """Ranges in ai-edge-quantizer's form ("quantization statistics values"); constants need none.

    Scalars without dimensions: those it can give to a constant of any rank that shares an activation's scale.
    """
    if ranges is None:
        return None
    return {
        name: {"min": np.array(r.min, np.float32), "max": np.array(r.max, np.float32)} for name, r in ranges.items()
    }


# --- what the float file holds ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Op:
    kind: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Graph:
    """The tensors of every operator, by name.

    Attributes:
        floats: index of each float32 tensor.
        masks: how far each tensor reaches that holds, or may hold, the "minus infinity" of an attention mask.
    """

    ops: tuple[_Op, ...]
    inputs: tuple[str, ...]
    floats: dict[str, int]
    masks: dict[str, float]

    @classmethod
    def of(cls, model: schema.ModelT, graph: schema.SubGraphT) -> _Graph:
        from ai_edge_litert import schema_py_generated as schema

        names = [tensor.name.decode() for tensor in graph.tensors]
        floats = {names[i]: i for i, t in enumerate(graph.tensors) if t.type == schema.TensorType.FLOAT32}
        ops = tuple(
            _Op(
                model.operatorCodes[op.opcodeIndex].builtinCode,
                tuple(names[i] for i in op.inputs if i >= 0),
                tuple(names[i] for i in op.outputs if i >= 0),
            )
            for op in graph.operators
        )
        constants = {}
        for name, index in floats.items():
            data = model.buffers[graph.tensors[index].buffer].data
            reach = None if data is None else mask_reach(np.frombuffer(bytes(data), np.float32))
            if reach is not None:
                constants[name] = reach
        return cls(ops, tuple(names[i] for i in graph.inputs), floats, _spread_masks(ops, constants, floats))

    def activations(self, kept: set[str]) -> dict[str, int]:
        """Index of every float activation that a quantized operator reads or writes."""
        computed = {*self.inputs, *(name for op in self.ops for name in op.outputs)}
        touched = {name for op in self.ops if not kept & {*op.outputs} for name in (*op.inputs, *op.outputs)}
        return {name: index for name, index in self.floats.items() if name in computed & touched}


def _spread_masks(ops: Sequence[_Op], constants: Mapping[str, float], floats: Mapping[str, int]) -> dict[str, float]:
    """Follow mask constants to where a softmax or the like takes their size away.

    Looking at the data is not enough: in calibration samples without padding no mask is ever seen, and an int8 range
    without it would switch masking off.
    """
    from ai_edge_litert import schema_py_generated as schema

    carriers = {getattr(schema.BuiltinOperator, name) for name in _MASK_CARRIERS}
    masks = dict(constants)
    for op in ops:
        reached = [masks[name] for name in op.inputs if name in masks]
        if reached and op.kind in carriers:
            masks.update({name: reached[0] for name in op.outputs if name in floats})
    return masks


def _scopes(graphs: Sequence[_Graph], kept: Sequence[KeptFloat]) -> list[str]:
    """The operators as ai-edge-quantizer's recipes name them: all output tensors, a semicolon after each."""
    tensors = {k.tensor for k in kept}
    return ["".join(f"{name};" for name in op.outputs) for g in graphs for op in g.ops if tensors & {*op.outputs}]


# --- calibration -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Observed:
    """`masks`: output tensor of each operator that touches an activation as wide as a mask -> how far that reaches."""

    ranges: dict[str, Range]
    masks: dict[str, float]


def _observe(
    source: Path, signature: Signature, graph: _Graph, scheme: Scheme, run: CalibrationRun, kept: set[str]
) -> _Observed:
    """Run the float file over the samples, one at a time, and watch every activation that will be quantized."""
    wanted = graph.activations(kept)
    ranges = ActivationRanges(run.estimator, symmetric=scheme.activation_symmetric, total=run.count)
    reach = dict(graph.masks)
    interpreter = _open(source)
    indices = {name: d["index"] for name, d in interpreter.get_signature_runner().get_input_details().items()}
    for sample in run.samples():
        _invoke(interpreter, indices, signature, sample)
        for name, index in wanted.items():
            if name in reach:
                continue
            # A view; the interpreter refuses to run again while one is alive.
            values = interpreter.tensor(index)()
            widest = mask_reach(values)
            if widest is None:
                ranges.update(name, values)
            else:
                reach[name] = widest
            del values
        ranges.next_sample()
    for finding in ranges.findings():
        if finding.where not in reach:
            run.on_finding(finding)
    masks = {}
    for op in graph.ops:
        widest_names = [name for name in (*op.inputs, *op.outputs) if name in reach]
        if widest_names and op.outputs:
            masks[op.outputs[0]] = reach[widest_names[0]]
    return _Observed({n: r for n, r in ranges.ranges().items() if n not in reach}, masks)


def mask_reach(values: Array) -> float | None:
    """The value of largest magnitude where that is beyond any activation (-inf included), else None."""
    if values.size == 0:
        return None
    low, high = float(values.min()), float(values.max())
    widest = low if -low > high else high
    return widest if abs(widest) >= MASK else None


def _open(source: Path) -> litert.Interpreter:
    with quiet():  # It warns that keeping all tensors costs memory.
        from ai_edge_litert import interpreter as litert

        # XNNPACK runs here too: intermediate tensors become outputs of its graph.
        interpreter = litert.Interpreter(str(source), num_threads=1, experimental_preserve_all_tensors=True)
        interpreter.allocate_tensors()
    return interpreter


def _invoke(interpreter: litert.Interpreter, indices: Mapping[str, int], signature: Signature, sample: Sample) -> None:
    for tensor in signature.inputs:
        if tensor.name not in sample.inputs:
            raise DataError(f"the sample lacks the input {tensor.name!r}", where=sample.name)
        values = _arranged(sample.inputs[tensor.name], tensor)
        index = indices[tensor.native_name]
        if not _fits(values.shape, tensor):
            raise DataError(
                f"input {tensor.name!r} has shape {sample.inputs[tensor.name].shape}, the model was exported for "
                f"{tensor.shape}",
                where=sample.name,
            )
        if interpreter.tensor(index)().shape != values.shape:
            interpreter.resize_tensor_input(index, values.shape)
            interpreter.allocate_tensors()
    for tensor in signature.inputs:
        interpreter.set_tensor(indices[tensor.native_name], _arranged(sample.inputs[tensor.name], tensor))
    interpreter.invoke()


def _arranged(values: Array, tensor: SignatureTensor) -> Array:
    if tensor.permutation is not None and values.ndim == len(tensor.permutation):
        values = values.transpose(tensor.permutation)
    return np.ascontiguousarray(values, dtype=tensor.dtype)


def _fits(shape: tuple[int, ...], tensor: SignatureTensor) -> bool:
    return len(shape) == len(tensor.shape) and all(
        isinstance(expected, str) or expected == actual for expected, actual in zip(tensor.shape, shape, strict=True)
    )
