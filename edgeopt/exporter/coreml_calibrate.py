"""Ranges of a Core ML program's activations, seen by running it in our own interpreter: Core ML itself needs macOS."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import ActivationRanges, Range
from edgeopt.errors import DataError
from edgeopt.exporter.base import CalibrationRun
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Array, Sample, Signature

if TYPE_CHECKING:
    from edgeopt.formats.coreml_program import Program

_PREFIX = "coreml/"
_KERNELS = ("conv", "conv_transpose", "linear", "matmul")


def activation_ranges(
    program: Program, signature: Signature, wanted: Iterable[str], run: CalibrationRun
) -> dict[str, Range]:
    """The range of each wanted variable over the calibration samples.

    One that held minus infinity, as attention masks do, has none and stays float.

    All floating-point variables are observed in one pass as soon as one is missing from `run.known`, so that other
    exemptions find theirs there. One sample's activations are held at a time.

    Raises:
        DataError: no samples; or one does not fit the model, or makes a wanted activation NaN or Inf.
        ConversionError: the interpreter does not know an operator of the program.
    """
    names = list(wanted)
    if any(_PREFIX + name not in run.known for name in names):
        run.known.update({_PREFIX + name: r for name, r in _observe(program, signature, set(names), run).items()})
    return {name: run.known[_PREFIX + name] for name in names if _PREFIX + name in run.known}


def _observe(program: Program, signature: Signature, wanted: set[str], run: CalibrationRun) -> dict[str, Range]:
    from edgeopt.formats.coreml_interpreter import Interpreter

    # Always both ends: what is symmetric follows from them (see coreml_activations.parameters).
    ranges = ActivationRanges(run.estimator, symmetric=False, bits=8, total=run.count)
    unusable: set[str] = set()

    def see(name: str, values: Array) -> None:
        if name in unusable:
            return
        if np.isneginf(values).any():
            unusable.add(name)
            return
        try:
            ranges.update(name, values)
        except DataError:
            if name in wanted:
                raise
            unusable.add(name)  # of a layer that stays float

    interpreter = Interpreter(program, rounding=False)
    count = 0
    for sample in run.samples():
        interpreter.run(_feed(sample, signature), see)
        ranges.next_sample()
        count += 1
    if not count:
        raise DataError("holds no samples", where="calibration data")
    for finding in ranges.findings():
        if finding.where in wanted:
            run.on_finding(replace(finding, where=program.layers.get(finding.where, finding.where)))
    return {name: r for name, r in ranges.ranges().items() if name not in unusable}


def _feed(sample: Sample, signature: Signature) -> Mapping[str, Array]:
    missing = [t.name for t in signature.inputs if t.name not in sample.inputs]
    if missing:
        raise DataError(f"lacks the input {missing[0]!r}", where=f"calibration sample {sample.name!r}")
    return {t.native_name: sample.inputs[t.name].astype(t.dtype) for t in signature.inputs}


def trained_ranges(program: Program, input_ranges: Mapping[str, tuple[float, float]]) -> dict[str, Range]:
    """Ranges that a layer's input was trained for, by variable; of layers that share an input, the widest."""
    by_layer = {strip_wrapper(layer): bounds for layer, bounds in input_ranges.items()}
    found: dict[str, Range] = {}
    for op in program.main.operations:
        bounds = by_layer.get(program.layers.get(op.name, ""))
        name = next(iter(op.inputs.get("x", ())), None)
        if bounds is None or op.type not in _KERNELS or not isinstance(name, str):
            continue
        old = found.get(name, Range(0.0, 0.0))
        found[name] = Range(min(bounds[0], old.min), max(bounds[1], old.max))
    return found
