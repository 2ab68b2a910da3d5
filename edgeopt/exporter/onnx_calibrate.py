"""Ranges of a float ONNX graph's activations: run it on the calibration samples and look at some inner tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import ActivationRanges, Range
from edgeopt.errors import ConversionError, DataError
from edgeopt.exporter.base import CalibrationRun
from edgeopt.types import Array, Sample, Signature

if TYPE_CHECKING:
    import onnx


def observe(
    proto: onnx.ModelProto, signature: Signature, tensors: Sequence[str], run: CalibrationRun, symmetric: bool
) -> dict[str, Range]:
    """The range of each of `tensors` over the calibration samples; holds the activations of one sample at a time.

    Raises DataError when the run has no samples or one does not fit the model, ConversionError when ONNX Runtime
    refuses the graph.
    """
    import onnxruntime as ort

    estimator = ActivationRanges(run.estimator, symmetric=symmetric, total=run.count)
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
