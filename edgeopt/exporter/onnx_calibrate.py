"""Ranges of a float ONNX graph's activations: learned, known, or found by running it on the calibration samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import ActivationRanges, Range
from edgeopt.errors import ConversionError, DataError
from edgeopt.exporter.base import CalibrationRun
from edgeopt.exporter.onnx_plan import Plan, Role
from edgeopt.exporter.onnx_rewrite import for_int8
from edgeopt.formats.onnx import source_layer
from edgeopt.layer_names import strip_wrapper
from edgeopt.telemetry import opt_out
from edgeopt.types import Array, Model, Sample, Scheme, Signature

if TYPE_CHECKING:
    import onnx


def activation_ranges(
    proto: onnx.ModelProto, plan: Plan, signature: Signature, model: Model, run: CalibrationRun, scheme: Scheme
) -> dict[str, Range]:
    """The range of each tensor that `plan` observes: what training learned, else what an earlier run found, else what
    the samples show.

    A run over the samples looks at all that the graph would need with no layer exempt as well, so that the next
    conversion finds it in `run.known`.

    Args:
        proto: the float graph as exported, before `for_int8`.
        plan: made from that graph.

    Raises as `observe` does.
    """
    learned = learned_ranges(plan, model.input_ranges)
    needed = [name for name in plan.observed if name not in learned]
    prefix = f"{scheme.activation_symmetric}:{scheme.activation_bits}:"
    missing = [name for name in needed if f"{prefix}{name}" not in run.known]
    if missing:
        whole = for_int8(proto, _exempts_nothing)
        complete = Plan(whole, _exempts_nothing, scheme)
        tensors = dict.fromkeys((*complete.observed, *complete.read_by_anchors, *missing))
        unknown = [name for name in tensors if f"{prefix}{name}" not in run.known]
        found = observe(whole, signature, unknown, run, scheme)
        run.known.update({f"{prefix}{name}": bounds for name, bounds in found.items()})
    return learned | {name: run.known[f"{prefix}{name}"] for name in needed}


def _exempts_nothing(node: onnx.NodeProto) -> bool:
    del node
    return False


def learned_ranges(plan: Plan, input_ranges: Mapping[str, tuple[float, float]]) -> dict[str, Range]:
    """Ranges that training learned for the inputs of layers, by the tensor whose parameters they decide.

    Where a layer reads what was only moved or rescaled, that is the tensor before; where several layers read the same
    tensor, the range covers all of theirs.
    """
    by_layer = {strip_wrapper(layer): bounds for layer, bounds in input_ranges.items()}
    found: dict[str, Range] = {}
    for node in plan.nodes if by_layer else ():
        bounds = by_layer.get(source_layer(node))
        if bounds is None or plan.roles.get(node.name) not in (Role.CONV, Role.GEMM, Role.MATMUL):
            continue
        read = plan.activations(node)
        if len(read) != 1:
            continue  # a product of two activations has no weights
        name, factor = plan.origin(read[0])
        low, high = min(bounds[0] / factor, 0.0), max(bounds[1] / factor, 0.0)
        known = found.get(name, Range(low, high))
        found[name] = Range(min(low, known.min), max(high, known.max))
    return found


def observe(
    proto: onnx.ModelProto, signature: Signature, tensors: Sequence[str], run: CalibrationRun, scheme: Scheme
) -> dict[str, Range]:
    """The range of each of `tensors` over the calibration samples; holds the activations of one sample at a time.

    Raises DataError when the run has no samples or one does not fit the model, ConversionError when ONNX Runtime
    refuses the graph.
    """
    opt_out()
    import onnxruntime as ort

    estimator = ActivationRanges(
        run.estimator, symmetric=scheme.activation_symmetric, bits=scheme.activation_bits, total=run.count
    )
    inputs = {t.native_name for t in signature.inputs}
    inner = [name for name in tensors if name not in inputs]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(
            _exposing(proto, inner).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    # The bindings raise a dozen unrelated classes for one thing: the file was refused.
    except Exception as error:
        raise ConversionError(f"ONNX Runtime refuses the float graph: {_first_line(error)}") from error
    count = 0
    for sample in run.samples():
        feed = _feed(sample, signature)
        try:
            values = session.run(inner, feed) if inner else []
        except Exception as error:
            raise DataError(
                f"does not run through the model: {_first_line(error)}", where=f"calibration sample {sample.name!r}"
            ) from error
        for name in tensors:
            if name in feed:
                estimator.update(name, feed[name])
        for name, value in zip(inner, values, strict=True):
            estimator.update(name, value)
        estimator.next_sample()
        count += 1
    if not count:
        raise DataError("holds no samples", where="calibration data")
    layers = {output: node.name for node in proto.graph.node for output in node.output}
    for finding in estimator.findings():
        run.on_finding(replace(finding, where=layers.get(finding.where, finding.where)))
    return estimator.ranges()


def _feed(sample: Sample, signature: Signature) -> Mapping[str, Array]:
    missing = [t.name for t in signature.inputs if t.name not in sample.inputs]
    if missing:
        raise DataError(f"lacks the input {missing[0]!r}", where=f"calibration sample {sample.name!r}")
    return {t.native_name: np.ascontiguousarray(sample.inputs[t.name], dtype=t.dtype) for t in signature.inputs}


def _exposing(proto: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The graph with only these inner tensors as outputs."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in tensors)
    return copy


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
