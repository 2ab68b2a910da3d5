"""PyTorch -> ExecuTorch for the XNNPACK delegate, in float and through PT2E quantization."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.exporter.base import ZEROS_SAVE_STORAGE, QuantizationRequest, make_artifact
from edgeopt.exporter.executorch_graph import dynamic_shapes, example_inputs, simplify
from edgeopt.exporter.executorch_io import quantize_io
from edgeopt.exporter.executorch_lowering import blame, capture, first_line, lower, quiet_vendor
from edgeopt.exporter.executorch_observer import calibrate
from edgeopt.exporter.executorch_quantizer import XnnpackQuantizer
from edgeopt.exporter.executorch_scheme import unsupported
from edgeopt.exporter.executorch_weights import (
    observe_weights,
    quantize_embeddings,
    quantize_linears_to_4_bits,
)
from edgeopt.formats.executorch import ProgramOp, read_program
from edgeopt.formats.executorch_kinds import MOVEMENT, PORTABLE_MOVEMENT
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import (
    Artifact,
    Dim,
    Finding,
    Format,
    LayerRules,
    Model,
    Precision,
    QuantParams,
    Scheme,
    Signature,
    SignatureTensor,
    StepRecord,
    TensorSpec,
    UnquantizedOp,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

_TOOLS = ("torch", "executorch", "torchao")

#: Delegated operators that exist in int8 (STATIC_QUANT in the partitioner's configurations).
_INT8_KERNELS = {
    "Add", "Clamp", "Conv2d", "ConvTranspose2d", "DepthwiseConv2d", "ELU", "FullyConnected", "GlobalAvgPooling2d",
    "MaxPooling2d", "Multiply", "Subtract",
}  # fmt: skip


#: What decodes the int8 rows of an embedding; the lookup is that of their scales.
_DECODERS = {"Multiply", "aten.mul", "aten.embedding"}


class ExecuTorchExporter:
    """The .pte files of a model: `model_fp32.pte` and `model.pte`. See `edgeopt.exporter.base.Exporter`."""

    format: Format = "executorch"
    suffix = ".pte"

    def unsupported(self, scheme: Scheme, rules: LayerRules) -> str | None:
        return unsupported(scheme, rules)

    def export_float(self, model: Model, directory: Path) -> Artifact:
        path = directory / f"model_fp32{self.suffix}"
        with quiet_vendor():
            lower(_capture_model(model), path)
        step = StepRecord("export", {"format": self.format, "precision": "fp32"})
        return _artifact(model, path, "fp32", {}, (step,), ())

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        del float_artifact  # PT2E starts from the module
        scheme = request.scheme
        if (reason := self.unsupported(scheme, request.rules)) is not None:
            raise ConversionError(reason, where="scheme", fix="see `edgeopt targets` for what each format offers")
        path = directory / f"model{self.suffix}"
        io: dict[str, QuantParams] = {}
        with quiet_vendor():
            inputs = example_inputs(model)
            graph = _quantize(_capture_model(model), model, request)
            decoded = quantize_embeddings(graph, scheme, request.keep_float)
            if scheme.io == "int8":
                io, inputs = quantize_io(graph, model, inputs)
            lower(capture(graph, inputs, dynamic_shapes(model.inputs)), path)
        unquantized = _unquantized(read_program(path).ops, request, decoded)
        return _artifact(model, path, scheme.precision, io, _history(request), unquantized)

    def store_sparse(self, artifact: Artifact, directory: Path) -> tuple[Artifact, tuple[Finding, ...]]:
        del directory
        told = f"ExecuTorch computes zeros like any other weight: {ZEROS_SAVE_STORAGE}"
        return artifact, (Finding("no-sparse-kernels", artifact.precision, told),)


def _capture_model(model: Model) -> ExportedProgram:
    if model.module is None:
        raise ConversionError(
            "ExecuTorch is made from a PyTorch module, and this model has none",
            where=model.name,
            fix="give the PyTorch model, or choose a LiteRT or ONNX target",
        )
    program = capture(model.module, example_inputs(model), dynamic_shapes(model.inputs))
    simplify(program)
    return program


def _quantize(program: ExportedProgram, model: Model, request: QuantizationRequest) -> GraphModule:
    """The float graph with quantize and dequantize operators in it."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    scheme = request.scheme
    # The guards would check every calibration sample against what the example input happened to be.
    graph = program.module(check_guards=False)
    try:
        prepared = prepare_pt2e(graph, XnnpackQuantizer(scheme, request.keep_float))
        if request.calibration is not None:
            calibrate(prepared, request.calibration, model.inputs, scheme, model.input_ranges)
        observe_weights(prepared, scheme)
        converted: GraphModule = convert_pt2e(prepared)
        if scheme.weight_bits == 4:
            quantize_linears_to_4_bits(converted, scheme)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        operator, layer = blame(program, error)
        at = f" at the operator {operator}" if operator else ""
        raise ConversionError(
            f"PT2E quantization failed{at}: {first_line(error)}",
            where=f"layer {layer!r}" if layer else model.name,
            fix="keep the layers involved in float (keep-float), or choose another format",
        ) from error
    return converted


def _history(request: QuantizationRequest) -> tuple[StepRecord, ...]:
    scheme = request.scheme
    config: dict[str, str | int | float | bool | None] = {
        "format": "executorch",
        "precision": scheme.precision,
        "activations": scheme.activations,
        "weights": scheme.weight_granularity,
        "weight_estimator": scheme.weight_estimator,
        "scale": scheme.scale,
        "symmetric": scheme.activation_symmetric,
        "io": scheme.io,
        "keep_float": ",".join(request.keep_float) or None,
    }
    if scheme.weight_granularity == "per-group":
        config["group_size"] = scheme.group_size
    if request.calibration is not None:
        config["estimator"] = request.calibration.estimator.name
        config["samples"] = request.calibration.count
        if request.calibration.estimator.name == "percentile":
            config["percentile"] = request.calibration.estimator.percentile
    return (StepRecord("quantize", config),)


# --- what the file is ------------------------------------------------------------------------------------------------


def _artifact(
    model: Model,
    path: Path,
    precision: Precision,
    io: dict[str, QuantParams],
    steps: tuple[StepRecord, ...],
    unquantized: tuple[UnquantizedOp, ...],
) -> Artifact:
    return make_artifact(
        path,
        format_="executorch",
        precision=precision,
        signature=_signature(model, path, io),
        history=(*model.history, *steps),
        tools=_TOOLS,
        unquantized=unquantized,
    )


def _signature(model: Model, path: Path, io: dict[str, QuantParams]) -> Signature:
    """The file's inputs and outputs by position, under the model's names."""
    native = read_program(path).signature
    for kind, ours, theirs in (("inputs", model.inputs, native.inputs), ("outputs", model.outputs, native.outputs)):
        if len(ours) != len(theirs):
            raise ConversionError(f"the file has {len(theirs)} {kind}, the model {len(ours)}", where=model.name)
    return Signature(
        inputs=tuple(_bind(s, n, io) for s, n in zip(model.inputs, native.inputs, strict=True)),
        outputs=tuple(_bind(s, n, io) for s, n in zip(model.outputs, native.outputs, strict=True)),
    )


def _bind(spec: TensorSpec, native: SignatureTensor, io: dict[str, QuantParams]) -> SignatureTensor:
    shape = tuple(dim.name if isinstance(dim, Dim) else dim for dim in spec.shape)
    if not spec.is_dynamic:
        shape = native.shape
    return replace(native, name=spec.name, shape=shape, model_dtype=spec.dtype, quantization=io.get(spec.name))


def _unquantized(
    ops: Sequence[ProgramOp], request: QuantizationRequest, decoded: Collection[str]
) -> tuple[UnquantizedOp, ...]:
    """Float computation in the written file: portable kernels, and delegated operators without int8 operands.

    `decoded` are layers whose int8 rows float operators decode.
    """
    found = []
    for op in ops:
        type_ = op.info.type
        base = type_.rpartition(".")[0] if type_.count(".") > 1 else type_
        if type_ in MOVEMENT or base in PORTABLE_MOVEMENT or not _computes_in_float(op):
            continue
        if op.layer in decoded and base in _DECODERS:
            continue
        if op.layer and layer_is_exempt(op.layer, request.keep_float):
            reason = "kept in float as asked"
        elif op.info.delegate is None:
            reason = f"the XNNPACK delegate does not take {base}, which runs on a portable kernel"
        else:
            reason = _why_float(type_, request.scheme)
        found.append(UnquantizedOp(name=op.info.name, type=type_, reason=reason))
    return tuple(found)


def _why_float(type_: str, scheme: Scheme) -> str:
    if scheme.activations == "dynamic":
        return "only linear layers are quantized dynamically"
    if type_ not in _INT8_KERNELS:
        return f"the XNNPACK delegate has no int8 kernel for {type_}"
    return "its operands are float: it stands among float operators, or one of them has no int8 range (a mask)"


def _computes_in_float(op: ProgramOp) -> bool:
    floats = ("float32", "float16", "bfloat16", "float64", "double")
    return op.info.dtype in floats and any(t in floats for t in op.inputs)
