"""Model -> LiteRT (.tflite): litert-torch for the float file, ai-edge-quantizer for the quantized one."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path

from edgeopt.errors import ConversionError, UsageError
from edgeopt.exporter import litert_convert, litert_quantize
from edgeopt.exporter.base import QuantizationRequest
from edgeopt.formats.litert import readable, summarize
from edgeopt.types import (
    Artifact,
    Dim,
    FileSummary,
    Format,
    Model,
    Precision,
    Scheme,
    Signature,
    SignatureTensor,
    StepRecord,
    TensorSpec,
    UnquantizedOp,
)

_TOOLS = ("ai-edge-quantizer", "ai-edge-litert")
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")
#: Operators that only move values: nothing is computed, whatever the type.
_MOVEMENT = frozenset(
    {
        "RESHAPE", "TRANSPOSE", "SLICE", "STRIDED_SLICE", "CONCATENATION", "SPLIT", "SPLIT_V", "PACK", "UNPACK", "PAD",
        "PADV2", "MIRROR_PAD", "SQUEEZE", "EXPAND_DIMS", "GATHER", "GATHER_ND", "BROADCAST_TO", "TILE",
        "SPACE_TO_DEPTH", "DEPTH_TO_SPACE", "RESIZE_NEAREST_NEIGHBOR", "SELECT", "SELECT_V2", "CAST",
    }
)  # fmt: skip


class LiteRTExporter:
    """See `edgeopt.exporter.base.Exporter`."""

    format: Format = "litert"
    suffix = ".tflite"

    def export_float(self, model: Model, directory: Path) -> Artifact:
        path = directory / f"model_fp32{self.suffix}"
        if model.module is not None:
            litert_convert.from_torch(model, path)
        elif model.native is not None:
            litert_convert.from_native(model.native, path)
        else:
            raise ConversionError("holds neither a module nor a graph file", where=model.name)
        history = (*model.history, StepRecord("export", {"format": self.format}))
        return _artifact(path, "fp32", model, history, ())

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        path = directory / f"model{self.suffix}"
        kept = litert_quantize.quantize(float_artifact.path, float_artifact.signature, request, path)
        scheme = request.scheme
        artifact = _artifact(path, scheme.precision, model, (*float_artifact.history, _record(request)), ())
        reasons = {readable(k.tensor): k.reason for k in kept}
        return replace(artifact, unquantized_ops=_unquantized(summarize(path), scheme, reasons))


def _artifact(
    path: Path,
    precision: Precision,
    model: Model,
    history: tuple[StepRecord, ...],
    unquantized: tuple[UnquantizedOp, ...],
) -> Artifact:
    try:
        summary = summarize(path)
    except UsageError as error:
        raise ConversionError("the converter wrote an unreadable file", where=str(path)) from error
    return Artifact(
        path=path,
        format="litert",
        precision=precision,
        signature=_signature(model, summary),
        size_bytes=summary.size_bytes,
        sha256=summary.sha256,
        history=history,
        tools={name: metadata.version(name) for name in (*_converters(model), *_TOOLS)},
        unquantized_ops=unquantized,
    )


def _converters(model: Model) -> tuple[str, ...]:
    """Distributions that made the float file."""
    if model.module is not None:
        return ("torch", "litert-torch")
    # It comes under several names: tensorflow, tensorflow-cpu, ...
    return (metadata.packages_distributions()["tensorflow"][0],)


def _signature(model: Model, summary: FileSummary) -> Signature:
    found = summary.signature
    return Signature(_matched(model, model.inputs, found.inputs), _matched(model, model.outputs, found.outputs))


def _matched(
    model: Model, specs: tuple[TensorSpec, ...], found: tuple[SignatureTensor, ...]
) -> tuple[SignatureTensor, ...]:
    """The file's tensors in the model's order, with the model's names.

    A file made from a TensorFlow graph has its own names and order; where they aren't the model's, order decides. An
    input that nothing depends on may be absent from the file.
    """
    by_name = {tensor.native_name: tensor for tensor in found}
    if not by_name.keys() & {spec.name for spec in specs}:
        by_name = {spec.name: tensor for spec, tensor in zip(specs, found, strict=True)}
    from_torch = model.module is not None
    return tuple(_described(by_name[spec.name], spec, from_torch) for spec in specs if spec.name in by_name)


def _described(tensor: SignatureTensor, spec: TensorSpec, from_torch: bool) -> SignatureTensor:
    permutation = litert_convert.permutation(spec) if from_torch else None
    order = permutation or range(len(spec.shape))
    dims = [spec.shape[axis] for axis in order]
    # litert-torch writes outputs with the example's sizes, also where they follow a dynamic input.
    shape = tuple(dim.name if isinstance(dim, Dim) else size for size, dim in zip(tensor.shape, dims, strict=True))
    return replace(tensor, name=spec.name, shape=shape, model_dtype=spec.dtype, permutation=permutation)


def _record(request: QuantizationRequest) -> StepRecord:
    scheme, calibration = request.scheme, request.calibration
    return StepRecord(
        "quantize",
        {
            "precision": scheme.precision,
            "activations": scheme.activations,
            "weight_granularity": scheme.weight_granularity,
            "activation_symmetric": scheme.activation_symmetric,
            "io": scheme.io,
            "keep_float": " ".join(request.keep_float) or None,
            "estimator": calibration.estimator.name if calibration else None,
            "percentile": calibration.estimator.percentile
            if calibration and calibration.estimator.name == "percentile"
            else None,
            "calibration_samples": calibration.count if calibration else None,
        },
    )


def _unquantized(summary: FileSummary, scheme: Scheme, reasons: dict[str, str]) -> tuple[UnquantizedOp, ...]:
    """Operators of the quantized file that compute in float, each with the reason."""
    if not scheme.is_quantized:
        return ()
    found = []
    for op in summary.ops:
        if op.dtype not in ("float32", "float16") or op.type in _CONVERSIONS:
            continue
        if scheme.activations == "none" and op.name not in reasons:
            continue  # With quantized weights only, float arithmetic is what was asked for.
        if scheme.activations == "dynamic" and op.type in _MOVEMENT:
            continue
        found.append(UnquantizedOp(op.name, op.type, reasons.get(op.name) or _reason(op.type, scheme)))
    return tuple(found)


def _reason(kind: str, scheme: Scheme) -> str:
    if litert_quantize.has_recipe(kind, scheme.activations):
        if scheme.activations == "dynamic":
            return "its weights are not constant: both operands are activations"
        return "ai-edge-quantizer found no int8 form for these inputs"
    if scheme.activations == "dynamic":
        return "dynamic quantization covers matrix products, convolutions and embeddings only"
    return f"ai-edge-quantizer has no int8 recipe for {kind}"
