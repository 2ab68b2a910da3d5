"""Model -> LiteRT (.tflite): litert-torch for the float file, ai-edge-quantizer for the quantized one."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from edgeopt.errors import ConversionError, UsageError
from edgeopt.exporter import litert_convert, litert_quantize, litert_recipe
from edgeopt.exporter.base import ZEROS_SAVE_STORAGE, QuantizationRequest, make_artifact
from edgeopt.exporter.litert_names import KERNEL_OPERATORS
from edgeopt.exporter.litert_sparse import dense_here, write_sparse
from edgeopt.formats.litert import readable, summarize
from edgeopt.types import (
    Artifact,
    Dim,
    FileSummary,
    Finding,
    Format,
    LayerRules,
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

    def unsupported(self, scheme: Scheme, rules: LayerRules) -> str | None:
        return litert_recipe.unsupported(scheme, rules)

    def export_float(self, model: Model, directory: Path) -> Artifact:
        path = directory / f"model_fp32{self.suffix}"
        if model.module is not None:
            litert_convert.from_torch(model, path)
        elif model.native is not None:
            litert_convert.from_native(model.native, path)
        else:
            raise ConversionError("holds neither a module nor a graph file", where=model.name)
        history = (*model.history, StepRecord("export", {"format": self.format}))
        return _artifact(path, _summary(path), "fp32", model, history)

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        scheme = request.scheme
        if reason := self.unsupported(scheme, request.rules):
            raise ConversionError(reason, where=model.name)
        path = directory / f"model{self.suffix}"
        kept = litert_quantize.quantize(
            float_artifact.path, float_artifact.signature, request, path, model.input_ranges
        )
        summary = _summary(path)
        unquantized = _unquantized(summary, scheme, {readable(k.tensor): k.reason for k in reversed(kept)})
        history = (*float_artifact.history, _record(request))
        return _artifact(path, summary, scheme.precision, model, history, unquantized)

    def store_sparse(self, artifact: Artifact, directory: Path) -> tuple[Artifact, tuple[Finding, ...]]:
        if artifact.precision not in ("fp32", "fp16"):
            told = f"LiteRT has sparse kernels for float 1x1 convolutions only: {ZEROS_SAVE_STORAGE}"
            return artifact, (Finding("no-sparse-kernels", artifact.precision, told),)
        path = directory / artifact.path.name
        layers = write_sparse(artifact.path, path)
        refused = tuple(
            Finding("dense-layer", layer.name, layer.refusal) for layer in layers if layer.refusal is not None
        )
        if not path.is_file():
            told = f"no layer of this network is one that LiteRT computes sparsely: {ZEROS_SAVE_STORAGE}"
            return artifact, (Finding("no-sparse-kernels", artifact.precision, told), *refused)
        taken = [layer for layer in layers if layer.refusal is None]
        told = f"{len(taken)} of {len(layers)} float 1x1 convolutions are stored for LiteRT's sparse kernels"
        here = dense_here()
        where = f"; the latency here does not show it: {here}" if here is not None else ""
        step = StepRecord("sparse-kernels", {"layers": len(taken)})
        sparse = replace(
            artifact,
            path=path,
            size_bytes=path.stat().st_size,
            sha256=sha256(path.read_bytes()).hexdigest(),
            history=(*artifact.history, step),
        )
        return sparse, (Finding("sparse-kernels", artifact.precision, told + where), *refused)


def _summary(path: Path) -> FileSummary:
    try:
        return summarize(path)
    except UsageError as error:
        raise ConversionError("the converter wrote an unreadable file", where=str(path)) from error


def _artifact(
    path: Path,
    summary: FileSummary,
    precision: Precision,
    model: Model,
    history: tuple[StepRecord, ...],
    unquantized: tuple[UnquantizedOp, ...] = (),
) -> Artifact:
    return make_artifact(
        path,
        format_="litert",
        precision=precision,
        signature=_signature(model, summary),
        history=history,
        tools=(*_converters(model), *_TOOLS),
        unquantized=unquantized,
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
    config: dict[str, str | int | float | bool | None] = {
        "precision": scheme.precision,
        "activations": scheme.activations,
        "weight_granularity": scheme.weight_granularity,
        "activation_symmetric": scheme.activation_symmetric,
        "io": scheme.io,
        "keep_float": " ".join(request.rules.keep_float) or None,
        "int16_activations": " ".join(request.rules.int16_activations) or None,
        "weight_symmetric": scheme.weight_symmetric,
        "weight_estimator": scheme.weight_estimator,
        "scale": scheme.scale,
        "group_size": scheme.group_size if scheme.weight_granularity == "per-group" else None,
        "estimator": calibration.estimator.name if calibration else None,
        "percentile": calibration.estimator.percentile
        if calibration and calibration.estimator.name == "percentile"
        else None,
        "calibration_samples": calibration.count if calibration else None,
    }
    return StepRecord("quantize", config)


def _unquantized(summary: FileSummary, scheme: Scheme, reasons: dict[str, str]) -> tuple[UnquantizedOp, ...]:
    """Operators of the quantized file that compute in float, each with the reason."""
    if not scheme.is_quantized:
        return ()
    found = []
    for op in summary.ops:
        if op.dtype not in ("float32", "float16") or op.type in _CONVERSIONS:
            continue
        has_form = litert_recipe.has_recipe(op.type, scheme)
        if scheme.activations == "none" and op.name not in reasons and (has_form or op.type not in KERNEL_OPERATORS):
            continue  # With quantized weights only, float arithmetic is what was asked for.
        if scheme.activations == "dynamic" and op.type in _MOVEMENT:
            continue
        found.append(UnquantizedOp(op.name, op.type, reasons.get(op.name) or _reason(op.type, scheme, has_form)))
    return tuple(found)


def _reason(kind: str, scheme: Scheme, has_form: bool) -> str:
    if scheme.activations == "static":
        if has_form:
            return "ai-edge-quantizer found no integer form for these inputs"
        return f"ai-edge-quantizer has no int{scheme.activation_bits} recipe for {kind}"
    if has_form:
        return "its weights are not constant: both operands are activations"
    if scheme.weight_bits == 8 or kind not in KERNEL_OPERATORS:
        return "dynamic quantization covers matrix products, convolutions and embeddings only"
    return f"{kind} has no {scheme.weight_granularity} {scheme.weight_bits}-bit weights in LiteRT"
