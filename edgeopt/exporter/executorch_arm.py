"""PyTorch -> ExecuTorch for Arm's accelerators: Ethos-U through Vela, and GPUs with neural graphics through VGF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import ConversionError
from edgeopt.exporter.base import QuantizationRequest, make_artifact
from edgeopt.exporter.executorch import ExecuTorchExporter
from edgeopt.exporter.executorch_arm_backend import compile_spec
from edgeopt.exporter.executorch_arm_embedding import look_up_integers
from edgeopt.exporter.executorch_arm_emulation import write_emulation
from edgeopt.exporter.executorch_arm_lowering import Lowered, lower_to_arm
from edgeopt.exporter.executorch_arm_observer import calibrate, observe_weights
from edgeopt.exporter.executorch_arm_quantizer import quantizer_for
from edgeopt.exporter.executorch_arm_scheme import unsupported
from edgeopt.exporter.executorch_graph import simplify
from edgeopt.exporter.executorch_io import quantize_io
from edgeopt.exporter.executorch_lowering import blame, capture, first_line, quiet_vendor
from edgeopt.formats.executorch import read_program
from edgeopt.formats.executorch_kinds import PORTABLE_MOVEMENT
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import (
    Artifact,
    Dim,
    EthosU,
    Finding,
    Format,
    LayerRules,
    Model,
    QuantParams,
    Scheme,
    Signature,
    StepRecord,
    UnquantizedOp,
    Vgf,
)

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

_TOOLS = ("torch", "executorch", "torchao", "tosa-tools")
_WITHOUT_GATHER = ("ethos-u55", "ethos-u65")
_AS_ASKED = "kept in float as asked"


class ArmExporter:
    """The .pte file for an Ethos-U or for VGF, and beside it the TOSA program that computes the same.

    See `edgeopt.exporter.base.Exporter`. The float twin is that of the plain ExecuTorch exporter.
    """

    format: Format = "executorch"
    suffix = ".pte"

    def unsupported(self, scheme: Scheme, rules: LayerRules) -> str | None:
        return unsupported(scheme, rules)

    def export_float(self, model: Model, directory: Path) -> Artifact:
        return ExecuTorchExporter().export_float(model, directory)

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
            inputs = _inputs(model)
            graph = _quantize(_capture_model(model), model, request)
            if scheme.io == "int8":
                io, inputs = quantize_io(graph, model, inputs)
            lowered = lower_to_arm(capture(graph, inputs, None), scheme.npu, path)
            signature = _signature(model, path, io)
            emulation = write_emulation(lowered, directory / "model")
        return make_artifact(
            path,
            format_="executorch",
            precision=scheme.precision,
            signature=signature,
            history=(*model.history, *_history(request)),
            tools=_TOOLS if scheme.npu is not None and scheme.npu.kind == "vgf" else (*_TOOLS, "ethos-u-vela"),
            unquantized=_unquantized(lowered, request),
            emulation=emulation,
        )

    def store_sparse(self, artifact: Artifact, directory: Path) -> tuple[Artifact, tuple[Finding, ...]]:
        return ExecuTorchExporter().store_sparse(artifact, directory)


def _capture_model(model: Model) -> ExportedProgram:
    if model.module is None:
        raise ConversionError(
            "ExecuTorch is made from a PyTorch module, and this model has none",
            where=model.name,
            fix="give the PyTorch model, or choose a LiteRT target",
        )
    for spec in model.inputs:
        if any(isinstance(dim, Dim) and dim.max > dim.min for dim in spec.shape[1:]):
            raise ConversionError(
                "has a free dimension, and the accelerator's command stream is made for one size",
                where=f"input {spec.name!r}",
                fix="give it a fixed shape",
            )
    program = capture(model.module, _inputs(model), None)
    simplify(program)
    return program


def _inputs(model: Model) -> tuple[torch.Tensor, ...]:
    """The example as it is: its batch becomes the file's."""
    import torch

    examples = [np.array(model.example_inputs[spec.name], dtype=spec.dtype) for spec in model.inputs]
    return tuple(torch.from_numpy(np.ascontiguousarray(example)) for example in examples)


def _quantize(program: ExportedProgram, model: Model, request: QuantizationRequest) -> GraphModule:
    """The float graph with quantize and dequantize operators in it."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    scheme = request.scheme
    if request.calibration is None:
        raise ConversionError("static activations need calibration data", where="scheme")
    quantizer = quantizer_for(compile_spec(scheme.npu), scheme, request.keep_float)
    try:
        # The guards would check every calibration sample against what the example input happened to be.
        prepared = prepare_pt2e(program.module(check_guards=False), quantizer)
        calibrate(prepared, request.calibration, model.inputs, scheme, model.input_ranges)
        observe_weights(prepared, scheme)
        converted: GraphModule = convert_pt2e(prepared)
        if scheme.npu is not None and scheme.npu.kind in _WITHOUT_GATHER:
            look_up_integers(converted)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        operator, layer = blame(program, error)
        at = f" at the operator {operator}" if operator else ""
        raise ConversionError(
            f"PT2E quantization for {scheme.npu.kind if scheme.npu else 'Arm'} failed{at}: {first_line(error)}",
            where=f"layer {layer!r}" if layer else model.name,
            fix="keep the layers involved in float (keep-float), or take the LiteRT route",
        ) from error
    return converted


def _history(request: QuantizationRequest) -> tuple[StepRecord, ...]:
    scheme, calibration = request.scheme, request.calibration
    config: dict[str, str | int | float | bool | None] = {
        "format": "executorch",
        "accelerator": scheme.npu.kind if scheme.npu else None,
        "precision": scheme.precision,
        "activations": scheme.activations,
        "weights": scheme.weight_granularity,
        "weight_estimator": scheme.weight_estimator,
        "scale": scheme.scale,
        "symmetric": scheme.activation_symmetric,
        "io": scheme.io,
        "keep_float": ",".join(request.keep_float) or None,
    }
    if isinstance(scheme.npu, EthosU):
        config["macs"] = scheme.npu.macs
        config["system_config"] = scheme.npu.system_config
        config["memory_mode"] = scheme.npu.memory_mode
        config["arena_cache_size"] = scheme.npu.sram_bytes
    if calibration is not None:
        config["estimator"] = calibration.estimator.name
        config["samples"] = calibration.count
        if calibration.estimator.name == "percentile":
            config["percentile"] = calibration.estimator.percentile
    return (StepRecord("quantize", config),)


# --- what the file is ------------------------------------------------------------------------------------------------


def _signature(model: Model, path: Path, io: Mapping[str, QuantParams]) -> Signature:
    """The file's inputs and outputs by position, under the model's names."""
    native = read_program(path).signature
    pairs = []
    for kind, ours, theirs in (("inputs", model.inputs, native.inputs), ("outputs", model.outputs, native.outputs)):
        if len(ours) != len(theirs):
            raise ConversionError(f"the file has {len(theirs)} {kind}, the model {len(ours)}", where=model.name)
        pairs.append(
            tuple(
                replace(there, name=spec.name, model_dtype=spec.dtype, quantization=io.get(spec.name))
                for spec, there in zip(ours, theirs, strict=True)
            )
        )
    return Signature(inputs=pairs[0], outputs=pairs[1])


def _unquantized(lowered: Lowered, request: QuantizationRequest) -> tuple[UnquantizedOp, ...]:
    """Operators outside the delegates, and float ones inside. Conversions compute nothing of the model."""
    found = []
    for op in lowered.on_cpu:
        if op.converts:
            continue
        exempt = op.layer and layer_is_exempt(op.layer, request.keep_float)
        name = f"{op.layer}/{op.name}" if op.layer else op.name
        found.append(UnquantizedOp(name, op.type, _AS_ASKED if exempt else op.reason))
    if isinstance(request.scheme.npu, Vgf):  # the delegate computes those layers, in float
        for number, (type_, layer) in enumerate(lowered.delegated):
            computes = type_.rpartition(".")[0] not in PORTABLE_MOVEMENT
            if layer and computes and layer_is_exempt(layer, request.keep_float):
                found.append(UnquantizedOp(f"{layer}/{type_}_{number}", type_, _AS_ASKED))
    return tuple(found)
