"""PyTorch -> ExecuTorch for Qualcomm's QNN delegate, where Qualcomm's SDK is on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest, make_artifact
from edgeopt.exporter.executorch import ExecuTorchExporter
from edgeopt.exporter.executorch_graph import example_inputs, simplify
from edgeopt.exporter.executorch_lowering import capture, first_line, lower, quiet_vendor
from edgeopt.exporter.executorch_observer import tensors
from edgeopt.types import Artifact, Finding, Format, Hexagon, LayerRules, Model, Scheme, StepRecord

if TYPE_CHECKING:
    from torch.fx import GraphModule


class HexagonExporter:
    """`model.pte` for one system on chip, quantized by ExecuTorch's QnnQuantizer with its own min-max observers; the
    float twin and `Artifact.emulation`, the same quantized graph, are XNNPACK files."""

    format: Format = "executorch"
    suffix = ".pte"

    def unsupported(self, scheme: Scheme, rules: LayerRules) -> str | None:
        if (scheme.precision, scheme.activations) != ("w8a8", "static") or scheme.io != "float":
            return "ExecuTorch's QNN route is offered for w8a8 with static activations and float inputs and outputs"
        if not scheme.weight_symmetric or scheme.weight_granularity == "per-group" or scheme.scale != "any":
            return "QnnQuantizer chooses symmetric weights per channel or per tensor with any scale; take these"
        if rules.keep_float or rules.int16_activations:
            return "QnnQuantizer takes no exceptions by layer; take qualcomm-int8 for keep-float and int16-activations"
        return None

    def export_float(self, model: Model, directory: Path) -> Artifact:
        return ExecuTorchExporter().export_float(model, directory)

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        if (problem := self.unsupported(request.scheme, request.rules)) is not None:
            raise ConversionError(problem, where=model.name)
        npu, run = request.scheme.npu, request.calibration
        if not isinstance(npu, Hexagon) or run is None:
            raise ValueError("a static scheme for a Hexagon has a calibration run")
        if npu.soc_model is None:
            raise ConversionError(
                "QNN compiles for one system on chip, and the device profile names none",
                where=model.name,
                fix="set soc-model in its [[npu]] table",
            )
        path, emulation = directory / f"model{self.suffix}", directory / f"model_emulation{self.suffix}"
        with quiet_vendor():
            graph = _quantized(model, request.scheme, run, npu.soc_model)
            lower(capture(graph, example_inputs(model), None), emulation)
            path.write_bytes(_delegated(graph, model, npu.soc_model))
        step = StepRecord(
            "quantize", {"format": "executorch", "precision": "w8a8", "delegate": "QNN", "samples": run.count}
        )
        return make_artifact(
            path,
            format_="executorch",
            precision="w8a8",
            signature=float_artifact.signature,
            history=(*model.history, step),
            tools=("torch", "executorch", "torchao"),
            emulation=emulation,
        )

    def store_sparse(self, artifact: Artifact, directory: Path) -> tuple[Artifact, tuple[Finding, ...]]:
        return ExecuTorchExporter().store_sparse(artifact, directory)


def _quantized(model: Model, scheme: Scheme, run: CalibrationRun, soc: int) -> GraphModule:
    from executorch.backends.qualcomm.quantizer.quantizer import QnnQuantizer, QuantDtype
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    if model.module is None:
        raise ConversionError("ExecuTorch is made from a PyTorch module, and this model has none", where=model.name)
    if run.estimator.name != "min-max":
        raise ConversionError(
            f"QnnQuantizer observes ranges itself and knows no {run.estimator.name}", where=model.name,
            fix="take --estimator min-max",
        )  # fmt: skip
    program = capture(model.module, example_inputs(model), None)
    simplify(program)
    per_channel = scheme.weight_granularity == "per-channel"
    try:
        quantizer = QnnQuantizer(soc_model=QcomChipset(soc))
        quantizer.set_default_quant_config(
            QuantDtype.use_8a8w, is_conv_per_channel=per_channel, is_linear_per_channel=per_channel
        )
        prepared = prepare_pt2e(program.module(check_guards=False), quantizer)
        for sample in run.samples():
            prepared(*tensors(sample.inputs, model.inputs))
        converted: GraphModule = convert_pt2e(prepared)
    # The vendor's passes raise all kinds.
    except Exception as error:
        raise ConversionError(f"QnnQuantizer failed: {first_line(error)}", where=model.name) from error
    return converted


def _delegated(graph: GraphModule, model: Model, soc: int) -> bytes:
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils.utils import (
        generate_htp_compiler_spec,
        generate_qnn_executorch_compiler_spec,
        to_edge_transform_and_lower_to_qnn,
    )

    try:
        spec = generate_qnn_executorch_compiler_spec(
            soc_model=QcomChipset(soc), backend_options=generate_htp_compiler_spec(use_fp16=False)
        )
        lowered = to_edge_transform_and_lower_to_qnn(graph, example_inputs(model), spec)
        buffer: bytes = lowered.to_executorch().buffer
    # As above; the SDK's own libraries fail here where they are of another version.
    except Exception as error:
        raise ConversionError(f"QNN's lowering failed: {first_line(error)}", where=model.name) from error
    return buffer
