"""Model -> .onnx for ONNX Runtime: float32, float16, integers with calibrated or run-time ranges, integer weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.exporter.base import ZEROS_SAVE_STORAGE, QuantizationRequest, make_artifact
from edgeopt.exporter.onnx_calibrate import activation_ranges
from edgeopt.exporter.onnx_convert import to_dynamic_int8, to_float16
from edgeopt.exporter.onnx_embedding import quantize_embeddings
from edgeopt.exporter.onnx_graph import WIDE_OPSET, at_opset, float_graph, write
from edgeopt.exporter.onnx_plan import Plan
from edgeopt.exporter.onnx_products import takes_blocks, to_block_products
from edgeopt.exporter.onnx_qdq import quantize_graph
from edgeopt.exporter.onnx_report import unquantized_ops
from edgeopt.exporter.onnx_rewrite import for_int8
from edgeopt.exporter.onnx_shared import store_once, with_own_copies
from edgeopt.exporter.onnx_storage import expand_at_load
from edgeopt.exporter.onnx_support import unsupported
from edgeopt.formats.onnx import layer_names, load, read_signature
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import (
    Artifact,
    Finding,
    Format,
    LayerRules,
    Model,
    Precision,
    Scheme,
    Signature,
    StepRecord,
    UnquantizedOp,
)

if TYPE_CHECKING:
    import onnx

TOOLS = ("torch", "onnx", "onnxruntime", "onnxscript", "onnxsim")


class OnnxExporter:
    """ONNX files of opset 18 or later, one file each, weights inside (see `edgeopt.exporter.base.Exporter`)."""

    format: Format = "onnx"
    suffix = ".onnx"

    def unsupported(self, scheme: Scheme, rules: LayerRules) -> str | None:
        return unsupported(scheme, rules)

    def export_float(self, model: Model, directory: Path) -> Artifact:
        path = directory / f"model_fp32{self.suffix}"
        proto = float_graph(model)
        store_once(proto)
        write(proto, path)
        history = (*model.history, StepRecord("export", {"format": "onnx", "precision": "fp32"}))
        return _artifact(path, proto, "fp32", model, history, ())

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        scheme = request.scheme
        problem = unsupported(scheme, request.rules)
        if problem is not None:
            raise ConversionError(problem, where=model.name)
        proto = with_own_copies(load(float_artifact.path))
        exempt = _exemption(request.keep_float)
        if scheme.precision == "fp16":
            result = to_float16(proto)
        elif scheme.activations == "static":
            result = _static(proto, model, float_artifact.signature, request, exempt)
        elif scheme.activations == "dynamic":
            result = _dynamic(proto, scheme, exempt)
        else:
            result = _weights_only(proto, model.name, scheme, exempt)
        path = directory / f"model{self.suffix}"
        unquantized = tuple(unquantized_ops(proto, result, exempt, scheme)) if scheme.is_quantized else ()
        store_once(result)
        write(result, path)
        history = (*float_artifact.history, _record(request))
        return _artifact(path, result, scheme.precision, model, history, unquantized)

    def store_sparse(self, artifact: Artifact, directory: Path) -> tuple[Artifact, tuple[Finding, ...]]:
        del directory
        told = f"ONNX Runtime computes zeros like any other weight: {ZEROS_SAVE_STORAGE}"
        return artifact, (Finding("no-sparse-kernels", artifact.precision, told),)


def _static(
    proto: onnx.ModelProto,
    model: Model,
    signature: Signature,
    request: QuantizationRequest,
    exempt: Callable[[onnx.NodeProto], bool],
) -> onnx.ModelProto:
    if request.calibration is None:
        raise ValueError("a static scheme needs a calibration run")
    scheme = request.scheme
    if scheme.activation_bits == 16:
        proto = at_opset(proto, WIDE_OPSET, model.name)
    prepared = for_int8(proto, exempt)
    plan = Plan(prepared, exempt, scheme)
    ranges = activation_ranges(proto, plan, signature, model, request.calibration, scheme)
    return quantize_embeddings(quantize_graph(prepared, plan, ranges, scheme), exempt, scheme)


def _dynamic(proto: onnx.ModelProto, scheme: Scheme, exempt: Callable[[onnx.NodeProto], bool]) -> onnx.ModelProto:
    embedded = quantize_embeddings(proto, exempt, scheme)
    if takes_blocks(scheme):
        return to_block_products(embedded, exempt, scheme)
    return to_dynamic_int8(embedded, exempt, scheme)


def _weights_only(
    proto: onnx.ModelProto, name: str, scheme: Scheme, exempt: Callable[[onnx.NodeProto], bool]
) -> onnx.ModelProto:
    if scheme.weight_bits == 4:
        proto = at_opset(proto, WIDE_OPSET, name)
    if scheme.weight_values == "linear":
        proto = quantize_embeddings(proto, exempt, scheme)
    if takes_blocks(scheme):
        proto = to_block_products(proto, exempt, scheme)
    return expand_at_load(proto, exempt, scheme)


def _exemption(patterns: tuple[str, ...]) -> Callable[[onnx.NodeProto], bool]:
    def exempt(node: onnx.NodeProto) -> bool:
        return any(layer_is_exempt(name, patterns) for name in layer_names(node))

    return exempt


def _record(request: QuantizationRequest) -> StepRecord:
    scheme = request.scheme
    steps: dict[str, str | int | float | bool | None] = {
        "precision": scheme.precision,
        "activations": scheme.activations,
        "weights": scheme.weight_granularity,
        "io": scheme.io,
        "keep_float": ",".join(request.keep_float),
    }
    # What is rarely asked for is named where it was.
    plain = Scheme(scheme.precision, scheme.activations, scheme.weight_granularity, io=scheme.io, npu=scheme.npu)
    steps |= {
        f.name: getattr(scheme, f.name) for f in fields(Scheme) if getattr(scheme, f.name) != getattr(plain, f.name)
    }
    if scheme.npu is not None:
        steps["npu"] = scheme.npu.kind
    if scheme.weight_granularity == "per-group":
        steps["group_size"] = scheme.group_size
    if request.calibration is not None:
        steps |= {"estimator": request.calibration.estimator.name, "samples": request.calibration.count}
    return StepRecord("quantize", steps)


def _artifact(
    path: Path,
    proto: onnx.ModelProto,
    precision: Precision,
    model: Model,
    history: tuple[StepRecord, ...],
    unquantized: tuple[UnquantizedOp, ...],
) -> Artifact:
    return make_artifact(
        path,
        format_="onnx",
        precision=precision,
        signature=_signature(proto, model),
        history=history,
        tools=TOOLS,
        unquantized=unquantized,
    )


def _signature(proto: onnx.ModelProto, model: Model) -> Signature:
    """The file's signature under the model's names, which it keeps in the model's order."""
    found = read_signature(proto)
    for kind, mine, theirs in (("inputs", model.inputs, found.inputs), ("outputs", model.outputs, found.outputs)):
        if len(mine) != len(theirs):
            raise ConversionError(f"the model has {len(mine)} {kind}, its ONNX graph {len(theirs)}", where=model.name)
    return Signature(
        inputs=tuple(replace(t, name=s.name) for s, t in zip(model.inputs, found.inputs, strict=True)),
        outputs=tuple(replace(t, name=s.name) for s, t in zip(model.outputs, found.outputs, strict=True)),
    )
