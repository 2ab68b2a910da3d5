"""Instrumented copies of model files: the same file with inner tensors as extra outputs, for any runtime to run."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from edgeopt.errors import UsageError
from edgeopt.formats import SUFFIXES
from edgeopt.types import Format, Signature, SignatureTensor

PROBERS: dict[Format, str] = {
    "litert": "edgeopt.formats.litert_probe",
    "onnx": "edgeopt.formats.onnx_probe",
    "executorch": "edgeopt.formats.executorch_probe",
}


@dataclass(frozen=True, slots=True)
class ProbePoint:
    """One inner tensor that the instrumented file gives out.

    Attributes:
        layer: path of the source layer that computes it ("features.0.conv"); "" where the file does not say.
        type: the format's name of the operator that computes it, a fused activation included in its value.
        tensor: as an output of the instrumented file; `quantization` is set where it holds integers.
        inputs: indices of the points that its operator computes from, as near as there are any; () where that is
            the file's own input, None where the format does not tell.
    """

    layer: str
    type: str
    tensor: SignatureTensor
    inputs: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Probed:
    """An instrumented copy.

    Attributes:
        path: of the copy.
        signature: the inputs and outputs of the original, then one output per point.
        points: in execution order.
    """

    path: Path
    signature: Signature
    points: tuple[ProbePoint, ...]


class Prober(Protocol):
    def add_probes(self, source: Path, signature: Signature, destination: Path) -> Probed: ...


def probe_name(index: int) -> str:
    """Name of the index-th point's tensor, which no model's own tensor has."""
    return f"probe:{index}"


def add_probes(source: Path, signature: Signature, destination: Path) -> Probed:
    """Write a copy of `source` to `destination` that gives out the result of every layer.

    There is one point per operator with weights, and per other operator that is quantized and has a source layer of
    its own; the value is the one after a fused activation. The original outputs stay as they are, bit by bit, since
    only tensors are given out that the runtime's own fusions leave in memory.

    Args:
        source: a .tflite, .onnx or .pte file.
        signature: its inputs and outputs, as the bundle or `edgeopt.formats.summarize` describes them.
        destination: the file to write; the suffix of `source`.

    Raises UsageError when the format is unknown, or the file is corrupt or can't be instrumented.
    """
    format_ = SUFFIXES.get(source.suffix)
    if format_ not in PROBERS:
        known = ", ".join(suffix for suffix, name in SUFFIXES.items() if name in PROBERS)
        raise UsageError("is not a model file that can be looked into", where=str(source), fix=f"give one of {known}")
    prober: Prober = import_module(PROBERS[format_])
    return prober.add_probes(source, signature, destination)
