"""Model -> .onnx for ONNX Runtime: float32, float16, int8 with calibrated ranges (QDQ), int8 with run-time ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.exporter.base import QuantizationRequest, layer_is_exempt, make_artifact
from edgeopt.exporter.onnx_calibrate import observe
from edgeopt.exporter.onnx_convert import DYNAMIC_TYPES, to_dynamic_int8, to_float16
from edgeopt.exporter.onnx_embedding import quantize_embeddings
from edgeopt.exporter.onnx_graph import float_graph, write
from edgeopt.exporter.onnx_plan import Plan
from edgeopt.exporter.onnx_qdq import quantize_graph
from edgeopt.exporter.onnx_rewrite import for_int8
from edgeopt.formats.onnx import (
    CONVERSIONS,
    INT8_ARITHMETIC,
    INT8_PRODUCTS,
    MOVEMENT,
    load,
    read_ops,
    read_signature,
    source_layer,
)
from edgeopt.types import Artifact, Format, Model, OpInfo, Precision, Signature, StepRecord, UnquantizedOp

if TYPE_CHECKING:
    import onnx

TOOLS = ("torch", "onnx", "onnxruntime", "onnxscript", "onnxsim")


class OnnxExporter:
    """ONNX files of opset 18, one file each, weights inside (see `edgeopt.exporter.base.Exporter`)."""

    format: Format = "onnx"
    suffix = ".onnx"

    def export_float(self, model: Model, directory: Path) -> Artifact:
        path = directory / f"model_fp32{self.suffix}"
        write(float_graph(model), path)
        history = (*model.history, StepRecord("export", {"format": "onnx", "precision": "fp32"}))
        return _artifact(path, "fp32", model, history, ())

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        scheme = request.scheme
        if scheme.io == "int8" and scheme.activations != "static":
            raise ConversionError(
                f"int8 inputs and outputs need ranges from calibration, which {scheme.precision} with "
                f"{scheme.activations} activations has not",
                fix="use float inputs and outputs, or a target with static activations",
            )
        path = directory / f"model{self.suffix}"
        proto = load(float_artifact.path)
        exempt = _exemption(request.keep_float)
        if scheme.precision == "fp16":
            write(to_float16(proto), path)
        elif scheme.precision == "w8a8" and scheme.activations == "static":
            write(_static(proto, float_artifact.signature, request, exempt), path)
        elif scheme.precision in ("w8a8", "w8") and scheme.activations == "dynamic":
            write(to_dynamic_int8(quantize_embeddings(proto, exempt, scheme), exempt, scheme), path)
        else:
            raise ConversionError(
                f"the ONNX exporter does not make {scheme.precision} with {scheme.activations} activations",
                fix="use fp16, w8a8 with static activations or w8a8 with dynamic activations",
            )
        steps: dict[str, str | int | float | bool | None] = {
            "precision": scheme.precision,
            "activations": scheme.activations,
            "weights": scheme.weight_granularity,
            "io": scheme.io,
            "keep_float": ",".join(request.keep_float),
        }
        if request.calibration is not None:
            steps |= {"estimator": request.calibration.estimator.name, "samples": request.calibration.count}
        history = (*float_artifact.history, StepRecord("quantize", steps))
        unquantized: tuple[UnquantizedOp, ...] = ()
        if scheme.is_quantized:
            own = {node.name for node in proto.graph.node}
            unquantized = tuple(_unquantized(load(path), own, request))
        return _artifact(path, scheme.precision, model, history, unquantized)


def _static(
    proto: onnx.ModelProto,
    signature: Signature,
    request: QuantizationRequest,
    exempt: Callable[[onnx.NodeProto], bool],
) -> onnx.ModelProto:
    if request.calibration is None:
        raise ValueError("a static scheme needs a calibration run")
    symmetric = request.scheme.activation_symmetric
    prepared = for_int8(proto, exempt)
    plan = Plan(prepared, exempt, quantize_io=request.scheme.io == "int8", fold_clips=not symmetric)
    ranges = observe(prepared, signature, plan.observed, request.calibration, symmetric)
    return quantize_embeddings(quantize_graph(prepared, plan, ranges, request.scheme), exempt, request.scheme)


def _exemption(patterns: tuple[str, ...]) -> Callable[[onnx.NodeProto], bool]:
    def exempt(node: onnx.NodeProto) -> bool:
        return layer_is_exempt(source_layer(node), patterns)

    return exempt


def _unquantized(proto: onnx.ModelProto, own: set[str], request: QuantizationRequest) -> Iterator[UnquantizedOp]:
    """The float arithmetic of a quantized file, with the reason; `own` are the float model's operators.

    What moves or clips values is not arithmetic, and what the quantizer added belongs to an int8 operator.
    """
    from onnx import NodeProto

    for op in read_ops(proto):
        if op.dtype not in ("float32", "float16") or op.type in MOVEMENT | CONVERSIONS or op.name not in own:
            continue
        exempt = layer_is_exempt(source_layer(NodeProto(name=op.name)), request.keep_float)
        yield UnquantizedOp(op.name, op.type, "exempted by --keep-float" if exempt else _reason(op, request))


def _reason(op: OpInfo, request: QuantizationRequest) -> str:
    if request.scheme.activations == "dynamic":
        if op.type in ("Conv", "ConvTranspose"):
            return "dynamic int8 covers matrix products: ONNX Runtime's ConvInteger is slower than float"
        if op.type in DYNAMIC_TYPES:
            return "both operands are activations, or its weights are not constant"
        return "dynamic int8 covers matrix products only"
    if op.type in ("Conv", *INT8_PRODUCTS):
        return "its weights or bias are not constant, or it computes positions"
    if op.type in INT8_ARITHMETIC:
        return "a float operator is before or after it: int8 would only add conversions"
    return f"ONNX Runtime has no int8 kernel for {op.type}"


def _artifact(
    path: Path,
    precision: Precision,
    model: Model,
    history: tuple[StepRecord, ...],
    unquantized: tuple[UnquantizedOp, ...],
) -> Artifact:
    return make_artifact(
        path,
        format_="onnx",
        precision=precision,
        signature=_signature(load(path, weights=False), model),
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
