"""Model -> a LiteRT int8 file in the form that the Edge TPU compiler accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeopt.errors import ConversionError
from edgeopt.exporter.base import QuantizationRequest
from edgeopt.exporter.litert import LiteRTExporter
from edgeopt.exporter.litert_edge_tpu_check import check_results
from edgeopt.exporter.litert_edge_tpu_editor import Editor
from edgeopt.exporter.litert_edge_tpu_fusion import fuse_activations
from edgeopt.exporter.litert_edge_tpu_pools import absorb_pool_paddings
from edgeopt.exporter.litert_edge_tpu_rewrites import INEXACT, rewrite
from edgeopt.formats.edge_tpu_form import FormViolation, check_form
from edgeopt.formats.litert import layer_of, summarize
from edgeopt.types import (
    Artifact,
    Dim,
    Finding,
    Format,
    LayerRules,
    Model,
    Scheme,
    StepRecord,
    UnquantizedOp,
)

_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")


class EdgeTpuExporter:
    """See `edgeopt.exporter.base.Exporter`.

    The quantized file is LiteRT's own, rewritten. What is written is read back, checked against the rules of
    `edge_tpu_form`, and run beside the file before the rewrite.
    """

    format: Format = "litert"
    suffix = ".tflite"

    def __init__(self) -> None:
        self._plain = LiteRTExporter()

    def unsupported(self, scheme: Scheme, rules: LayerRules) -> str | None:
        if (scheme.precision, scheme.activations) != ("w8a8", "static"):
            return (
                f"the Edge TPU computes in 8 bits with ranges that are known beforehand, not in {scheme.precision} "
                f"with {scheme.activations} ranges; take w8a8 with static activations"
            )
        return self._plain.unsupported(scheme, rules)

    def export_float(self, model: Model, directory: Path) -> Artifact:
        _refuse_dynamic_shapes(model)
        return self._plain.export_float(model, directory)

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        if reason := self.unsupported(request.scheme, request.rules):
            raise ConversionError(reason, where=model.name)
        path = directory / f"model{self.suffix}"
        with TemporaryDirectory(dir=directory) as name:
            prepared, first = _prepared(float_artifact, Path(name))
            plain = self._plain.export_quantized(model, prepared, request, Path(name))
            then = _write_in_form(plain.path, path)
            return _described(plain, path, {**first, **then})

    def store_sparse(self, artifact: Artifact, directory: Path) -> tuple[Artifact, tuple[Finding, ...]]:
        return self._plain.store_sparse(artifact, directory)


def _refuse_dynamic_shapes(model: Model) -> None:
    for spec in model.inputs:
        for dim in spec.shape:
            if isinstance(dim, Dim):
                raise ConversionError(
                    f"the dimension {dim.name!r} is dynamic; the Edge TPU takes fixed sizes only",
                    where=f"input {spec.name!r}",
                    fix="give a static shape",
                )


def _prepared(artifact: Artifact, directory: Path) -> tuple[Artifact, Mapping[str, int]]:
    """The float file with operators that int8 has a form for, and how often each rewrite found work."""
    from ai_edge_litert.tools import flatbuffer_utils

    editor = Editor(flatbuffer_utils.read_model(str(artifact.path)))
    counts = {"pool paddings": absorb_pool_paddings(editor), "fused activations": fuse_activations(editor)}
    counts = {name: count for name, count in counts.items() if count}
    if not counts:
        return artifact, {}
    path = directory / artifact.path.name
    editor.sweep()
    flatbuffer_utils.write_model(editor.model, str(path))
    check_results(artifact.path, path, exact=True)
    return replace(artifact, path=path), counts


def _write_in_form(source: Path, destination: Path) -> Mapping[str, int]:
    from ai_edge_litert.tools import flatbuffer_utils

    # Reading resolves buffers outside the FlatBuffer, writing puts them inside: the order of the two matters.
    model = flatbuffer_utils.read_model(str(source))
    counts = rewrite(model)
    flatbuffer_utils.write_model(model, str(destination))
    for violation in check_form(destination):
        if violation.effect != "on-cpu":
            raise _refusal(violation)
    check_results(source, destination, exact=not INEXACT & counts.keys())
    return counts


def _refusal(violation: FormViolation) -> ConversionError:
    problem = f"the Edge TPU compiler can't take the file: {violation.problem}"
    if violation.rule != "operator-version":
        return ConversionError(problem, where=violation.where)
    return ConversionError(
        problem,
        where=f"layer {layer_of(violation.where)!r}",
        fix="keep the layer in float (keep-float) if the operator has an older float version, or replace the operator",
    )


def _described(plain: Artifact, path: Path, counts: Mapping[str, int]) -> Artifact:
    """The file before the rewrite, as the file after it."""
    content = path.read_bytes()
    ops = {(op.name, op.type): op for op in summarize(path).ops}
    before = {(op.name, op.type) for op in summarize(plain.path).ops}
    kept = tuple(op for op in plain.unquantized_ops if (op.name, op.type) in ops)
    made = tuple(
        UnquantizedOp(name, kind, "stands for GELU, which the Edge TPU compiler doesn't know")
        for (name, kind), op in ops.items()
        if op.dtype == "float32" and kind not in _CONVERSIONS and (name, kind) not in before
    )
    return replace(
        plain,
        path=path,
        size_bytes=len(content),
        sha256=sha256(content).hexdigest(),
        history=(*plain.history, StepRecord("edge-tpu-form", dict(counts))),
        unquantized_ops=(*kept, *made),
    )
