"""Whether the Core ML package inside a .pte file computes what the model computes. coremltools converts some graphs
wrongly without a word, and no other machine than Apple's would tell."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeopt.errors import ConversionError
from edgeopt.exporter.executorch_graph import example_inputs
from edgeopt.formats.executorch_delegated import COREML_MODEL, coreml_files
from edgeopt.types import Array, Model, Precision

#: Weights rounded to float16 alone cost a deep network some 60 dB; a wrong operator leaves next to nothing.
_LEAST_DB: dict[Precision, float] = {"fp16": 20.0, "fp32": 40.0}


def check_package(blob: bytes, model: Model, input_names: Sequence[str], precision: Precision) -> None:
    """Run a delegate that holds the whole model on the example input, beside the model in torch.

    An operator that `edgeopt.formats.coreml_interpreter` does not know leaves the delegate unchecked.

    Args:
        blob: the delegate.
        input_names: what the program that was delegated calls the model's inputs.

    Raises:
        ConversionError: naming the output that differs.
    """
    arrays = [tensor.numpy() for tensor in example_inputs(model)]
    found = _computed(blob, dict(zip(input_names, arrays, strict=True)))
    if found is None:
        return
    for spec, wanted in zip(model.outputs, _expected(model), strict=True):
        # Delegates order their outputs as they please.
        alike = [values for values in found if values.shape == wanted.shape]
        closest = max((_sqnr_db(wanted, values) for values in alike), default=-np.inf)
        if closest < _LEAST_DB[precision]:
            raise ConversionError(
                f"coremltools converted it wrongly: on the example input the signal-to-noise ratio to the model in "
                f"torch is {closest:.0f} dB",
                where=f"output {spec.name!r}",
                fix="take an ios-coreml target, or an ExecuTorch target for the CPU",
            )


def _computed(blob: bytes, inputs: dict[str, Array]) -> list[Array] | None:
    from edgeopt.formats.coreml_interpreter import Interpreter
    from edgeopt.formats.coreml_program import read_program

    with tempfile.TemporaryDirectory() as scratch:
        for name, content in coreml_files(blob).items():
            (Path(scratch) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / name).write_bytes(content)
        program = read_program(Path(scratch) / Path(COREML_MODEL).parts[0])
        if {feature.name for feature in program.inputs} != set(inputs):
            return None
        feed = {feature.name: inputs[feature.name].astype(feature.dtype) for feature in program.inputs}
        try:
            return list(Interpreter(program, rounding=False).run(feed).values())
        except ConversionError:
            return None


def _expected(model: Model) -> list[Array]:
    import torch
    from torch.utils import _pytree as pytree

    assert model.module is not None
    with torch.no_grad():
        return [tensor.numpy() for tensor in pytree.tree_leaves(model.module(*example_inputs(model)))]


def _sqnr_db(wanted: Array, values: Array) -> float:
    """10 log10 of the signal's energy over that of the difference; infinite values must be the same ones."""
    reference, result = wanted.astype(np.float64), values.astype(np.float64)
    finite = np.isfinite(reference)
    if not np.array_equal(reference[~finite], result[~finite], equal_nan=True):
        return float("-inf")
    noise = float(((reference - result)[finite] ** 2).sum())
    signal = float((reference[finite] ** 2).sum())
    return float(10 * np.log10(max(signal, 1e-30) / max(noise, 1e-30)))
