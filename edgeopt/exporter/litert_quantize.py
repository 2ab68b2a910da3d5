"""Float .tflite -> quantized .tflite with ai-edge-quantizer, from our own activation ranges."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import Range
from edgeopt.errors import ConversionError
from edgeopt.exporter import litert_plan
from edgeopt.exporter.base import QuantizationRequest
from edgeopt.exporter.litert_calibrate import Calibration, trained_ranges
from edgeopt.exporter.litert_convert import quiet
from edgeopt.exporter.litert_integer import attends, finite_masks, integer_npu, wide_by_nature
from edgeopt.exporter.litert_integer_rewrites import lower
from edgeopt.exporter.litert_islands import fill_islands
from edgeopt.exporter.litert_names import rename_conversions
from edgeopt.exporter.litert_plan import Graph, KeptFloat
from edgeopt.exporter.litert_recipe import write_recipe
from edgeopt.exporter.litert_rewrite import split_hardswish
from edgeopt.exporter.litert_statistics import statistics
from edgeopt.formats.files import size_of
from edgeopt.formats.litert_write import write_model
from edgeopt.types import Scheme, Signature

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: It insists on some statistics, even where every operator stays float.
_NOTHING_CALIBRATED = {"": {"min": np.float32(0), "max": np.float32(0)}}


def quantize(
    source: Path,
    signature: Signature,
    request: QuantizationRequest,
    destination: Path,
    input_ranges: Mapping[str, tuple[float, float]],
) -> tuple[KeptFloat, ...]:
    """Write `source`, a float file, to `destination` at the requested scheme.

    Args:
        input_ranges: see `Model.input_ranges`.

    Returns:
        The operators that were kept float on purpose.

    Raises:
        ConversionError: ai-edge-quantizer fails on the model.
        DataError: an activation is NaN or Inf, or a calibration sample doesn't fit the model.
    """
    with quiet():
        from ai_edge_litert.tools import flatbuffer_utils
    model = flatbuffer_utils.read_model(str(source))
    graphs = [Graph.of(model, graph) for graph in model.subgraphs]
    integers = integer_npu(request.scheme)
    kept = litert_plan.kept_by_rule(graphs, request.scheme, request.rules)
    if integers is None or (not integers.has_16_bits and attends(graphs[0])):
        kept += litert_plan.kept_by_nature(graphs[0], request.scheme)
    wide = _wide(graphs[0], request, {k.tensor for k in kept})
    ranges: dict[str, Range] = {}
    if request.calibration is not None:
        calibration = Calibration(source, signature, graphs[0], request.calibration)
        ranges = _ranges(calibration, graphs[0], request.scheme, {k.tensor for k in kept}, wide)
        ranges |= {n: r for n, r in trained_ranges(graphs[0], input_ranges).items() if n in ranges}
        masks = calibration.masks()
        if integers is not None and integers.has_16_bits:
            finite = finite_masks(model, graphs[0], masks, ranges)
            ranges |= finite.ranges
            masks = {n: reach for n, reach in masks.items() if n not in finite.ranges and n not in finite.constants}
        kept += litert_plan.kept_by_masks(graphs[0], masks)
        ranges |= split_hardswish(model, {k.tensor for k in kept})
        if integers is not None:
            lowered = lower(model, ranges, {k.tensor for k in kept}, wide, request.scheme, integers)
            ranges |= lowered.ranges
            wide |= lowered.wide
        graphs = [Graph.of(model, graph) for graph in model.subgraphs]
    with TemporaryDirectory(dir=destination.parent) as scratch:
        names = {k.tensor for k in kept}
        content = _converted(model, graphs, request.scheme, ranges, wide, names, Path(scratch), source.name)
        finished = flatbuffer_utils.read_model(str(content))
    if integers is not None:
        fill_islands(finished, ranges, {k.tensor for k in kept}, wide, request.scheme)
        rename_conversions(finished, {tensor.name.decode() for graph in model.subgraphs for tensor in graph.tensors})
    _align_outputs(finished, model, request.scheme.io)
    for buffer in finished.buffers:
        if buffer.data is not None:  # Anything but an array is written byte by byte, which takes seconds.
            buffer.data = np.frombuffer(buffer.data, np.uint8)
    write_model(finished, destination)
    return tuple(kept)


def _wide(graph: Graph, request: QuantizationRequest, kept: set[str]) -> set[str]:
    """First outputs of the operators that get 16-bit activations in an 8-bit file."""
    wide = litert_plan.wide_ops(graph, request.rules, kept)
    integers = integer_npu(request.scheme)
    if integers is not None and integers.has_16_bits:
        wide |= wide_by_nature(graph) - kept
    return wide


def _ranges(
    calibration: Calibration, graph: Graph, scheme: Scheme, kept: set[str], wide_ops: set[str]
) -> dict[str, Range]:
    """Of every activation that a quantized operator touches, each estimated for the integers that will hold it."""
    wanted = graph.quantized_activations(kept)
    if scheme.io == "int8":  # the borders are integers also where the operator next to them stays float
        wanted |= {*graph.inputs, *graph.outputs} & graph.activations().keys()
    wide = litert_plan.wide_tensors(graph, wide_ops, kept) & wanted
    bits = scheme.activation_bits
    found = calibration.ranges(wanted - wide, bits=bits, symmetric=bits == 16 or scheme.activation_symmetric)
    if wide:
        found |= calibration.ranges(wide, bits=16, symmetric=True)
    return found


def _converted(
    model: schema.ModelT,
    graphs: Sequence[Graph],
    scheme: Scheme,
    ranges: Mapping[str, Range],
    wide: set[str],
    kept: set[str],
    scratch: Path,
    where: str,
) -> Path:
    """The file as ai-edge-quantizer makes it, in `scratch`. Files, since it would keep what it is given otherwise."""
    with quiet():
        from ai_edge_quantizer import quantizer as aeq
    given, made = scratch / "float.tflite", scratch / "quantized.tflite"
    write_model(model, given)
    try:
        # It draws a progress bar for every model, however small and told not to.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            quantizer = aeq.Quantizer(str(given))
            write_recipe(
                quantizer,
                scheme,
                wide=litert_plan.scopes(graphs, wide),
                kept=litert_plan.scopes(graphs, kept),
            )
            known = statistics(graphs, ranges, scheme) or _NOTHING_CALIBRATED
            quantizer.quantize(known, str(made), enable_progress_bar=False, enable_progress_report=False)
    except Exception as error:  # Every operator's rule raises its own type.
        raise ConversionError(f"ai-edge-quantizer failed: {error}", where=where) from error
    if not size_of(made):
        raise ConversionError("ai-edge-quantizer made an empty file", where=where)
    return made


def _align_outputs(model: schema.ModelT, source: schema.ModelT, io: str) -> None:
    """Undo a disagreement between the file's signature and its graph about which tensors are the outputs, in place.

    Where an output also feeds an operator that stays float, ai-edge-quantizer inserts one DEQUANTIZE for both and
    puts its result among the graph's outputs, but not in the signature.
    """
    if not source.signatureDefs:
        return
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
