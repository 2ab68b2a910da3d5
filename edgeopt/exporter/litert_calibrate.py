"""Ranges of the activations of a float .tflite file: from calibration samples, earlier runs, or training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import ActivationRanges, Range
from edgeopt.errors import DataError
from edgeopt.exporter.base import CalibrationRun
from edgeopt.exporter.litert_convert import quiet
from edgeopt.exporter.litert_names import KERNEL_OPERATORS
from edgeopt.exporter.litert_plan import SAME_SCALE, Graph, mask_reach
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Array, Sample, Signature, SignatureTensor

if TYPE_CHECKING:
    from ai_edge_litert import interpreter as litert

_LARGEST = float(np.finfo(np.float32).max)


class Calibration:
    """Ranges of the activations of one float file, looked up in `run.known` before any sample is run.

    Keys of `run.known` are "range/<bits>/<free or symmetric>/<tensor>" and, for activations as wide as an attention
    mask, "mask/<tensor>" with how far it reaches.
    """

    def __init__(self, source: Path, signature: Signature, graph: Graph, run: CalibrationRun) -> None:
        self._source, self._signature, self._graph, self._run = source, signature, graph, run

    def masks(self) -> dict[str, float]:
        """How far each tensor reaches that is as wide as a mask, by its constants or in the samples seen so far."""
        found = {
            key.removeprefix("mask/"): r.min if -r.min > r.max else r.max
            for key, r in self._run.known.items()
            if key.startswith("mask/")
        }
        return found | self._graph.masks

    def ranges(self, wanted: Iterable[str], *, bits: int, symmetric: bool) -> dict[str, Range]:
        """The range of each wanted activation, without those that `masks` names (which may grow by this call).

        All samples run once for all activations as soon as one is missing, so that other exemptions find theirs.

        Raises:
            DataError: a wanted activation is NaN or Inf, or a sample doesn't fit the model.
        """
        prefix = f"range/{bits}/{'symmetric' if symmetric else 'free'}/"
        names = set(wanted)
        if any(prefix + name not in self._run.known for name in names - self.masks().keys()):
            self._observe(prefix, names, bits=bits, symmetric=symmetric)
        return {name: self._run.known[prefix + name] for name in sorted(names - self.masks().keys())}

    def _observe(self, prefix: str, wanted: set[str], *, bits: int, symmetric: bool) -> None:
        run, reach = self._run, self.masks()
        ranges = ActivationRanges(run.estimator, symmetric=symmetric, bits=bits, total=run.count)
        activations = self._graph.activations()
        unusable: set[str] = set()
        interpreter = _open(self._source)
        indices = {name: d["index"] for name, d in interpreter.get_signature_runner().get_input_details().items()}
        for sample in run.samples():
            _invoke(interpreter, indices, self._signature, sample)
            for name, index in activations.items():
                if name in reach or name in unusable:
                    continue
                # A view; the interpreter refuses to run again while one is alive.
                values = interpreter.tensor(index)()
                widest = mask_reach(values)
                if widest is not None:
                    reach[name] = widest
                else:
                    try:
                        ranges.update(name, values)
                    except DataError:
                        if name in wanted:
                            raise
                        unusable.add(name)  # Of a layer that stays float; no reason to refuse the others.
                del values
            ranges.next_sample()
        for finding in ranges.findings():
            if finding.where in wanted and finding.where not in reach:
                run.on_finding(finding)
        run.known.update({f"mask/{name}": _as_range(value) for name, value in reach.items()})
        run.known.update({prefix + n: r for n, r in ranges.ranges().items() if n not in reach and n not in unusable})


def _as_range(reach: float) -> Range:
    return Range(max(min(reach, 0.0), -_LARGEST), min(max(reach, 0.0), _LARGEST))


def trained_ranges(graph: Graph, input_ranges: Mapping[str, tuple[float, float]]) -> dict[str, Range]:
    """Ranges that a layer's input was trained for, by tensor; back to where a tensor was last computed.

    Layers that share an input share its range, the widest.
    """
    by_layer = {strip_wrapper(layer): bounds for layer, bounds in input_ranges.items()}
    producer = {name: op for op in graph.ops for name in op.outputs}
    found: dict[str, Range] = {}
    for op in graph.ops:
        if op.kind not in KERNEL_OPERATORS or op.layer not in by_layer:
            continue
        low, high = by_layer[op.layer]
        name: str | None = next((n for n in op.inputs if n in graph.floats and n not in graph.constants), None)
        while name is not None:
            old = found.get(name, Range(0.0, 0.0))
            found[name] = Range(min(low, old.min), max(high, old.max))
            before = producer.get(name)
            name = before.inputs[0] if before is not None and before.kind in SAME_SCALE else None
    return found


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
