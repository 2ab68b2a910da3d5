"""Model -> .onnx that ONNX Runtime's QNN provider gives to Qualcomm's HTP as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.calibration.ranges import Range
from edgeopt.errors import ConversionError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest, make_artifact
from edgeopt.exporter.onnx import TOOLS, OnnxExporter
from edgeopt.exporter.onnx_calibrate import observe
from edgeopt.exporter.onnx_convert import to_float16
from edgeopt.exporter.onnx_graph import clean, write
from edgeopt.exporter.onnx_hexagon_plan import PRODUCTS, Concerned, HtpPlan
from edgeopt.exporter.onnx_hexagon_prepare import check_static, for_htp
from edgeopt.exporter.onnx_hexagon_qdq import Width, write_htp
from edgeopt.exporter.onnx_shared import with_own_copies
from edgeopt.formats.onnx import MOVEMENT, layer_names, load, read_signature, source_layer
from edgeopt.formats.onnx_hexagon import FIRST_WITH_FLOAT, describe
from edgeopt.layer_names import layer_is_exempt, strip_wrapper
from edgeopt.types import (
    Artifact,
    Finding,
    Format,
    Hexagon,
    LayerRules,
    Model,
    Scheme,
    Signature,
    StepRecord,
    UnquantizedOp,
)

if TYPE_CHECKING:
    import onnx

#: The first that multiplies two 16-bit activations; older ones narrow the second operand to 8 bits.
FIRST_WITH_16_BIT_PRODUCTS = "v73"


class HexagonExporter:
    """ONNX files of opset 21 with fixed shapes, weights inside (see `edgeopt.exporter.base.Exporter`).

    The files also run on ONNX Runtime's CPU kernels.
    """

    format: Format = "onnx"
    suffix = ".onnx"

    def unsupported(self, scheme: Scheme, rules: LayerRules) -> str | None:
        return next(_problems(scheme, rules), None)

    def export_float(self, model: Model, directory: Path) -> Artifact:
        return OnnxExporter().export_float(model, directory)

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        scheme, npu = request.scheme, request.scheme.npu
        problem = self.unsupported(scheme, request.rules)
        if problem is not None:
            raise ConversionError(problem, where=model.name)
        if not isinstance(npu, Hexagon):
            raise ValueError("the scheme names no Hexagon")
        proto = with_own_copies(load(float_artifact.path))
        check_static(proto)
        prepared = for_htp(proto, model.name)
        unquantized: tuple[UnquantizedOp, ...] = ()
        if scheme.precision == "fp16":
            result = to_float16(prepared)
        else:
            exempt, wide = _concerned(request.rules.keep_float), _concerned(request.rules.int16_activations)
            plan = HtpPlan(prepared, exempt, wide, scheme)
            ranges = _ranges(prepared, plan, float_artifact.signature, model, request)
            result = write_htp(prepared, plan, ranges, scheme, _second_operand(npu))
            unquantized = tuple(_unquantized(plan, exempt))
        clean(result)
        describe(result, npu)
        path = directory / f"model{self.suffix}"
        write(result, path)
        return make_artifact(
            path,
            format_="onnx",
            precision=scheme.precision,
            signature=_signature(float_artifact.signature, result),
            history=(*float_artifact.history, _record(request, npu)),
            tools=TOOLS,
            unquantized=unquantized,
        )

    def store_sparse(self, artifact: Artifact, directory: Path) -> tuple[Artifact, tuple[Finding, ...]]:
        return OnnxExporter().store_sparse(artifact, directory)


def _problems(scheme: Scheme, rules: LayerRules) -> Iterator[str]:
    if (scheme.precision, scheme.activations) not in (("w8a8", "static"), ("w8a16", "static"), ("fp16", "none")):
        yield (
            f"HTP has no {scheme.precision} with {scheme.activations} activations; take w8a8 or w8a16 with static "
            "activations, or fp16"
        )
    if isinstance(scheme.npu, Hexagon) and scheme.precision == "fp16" and scheme.npu.architecture < FIRST_WITH_FLOAT:
        yield (
            f"Hexagon {scheme.npu.architecture} has no float arithmetic, {FIRST_WITH_FLOAT} was the first; take "
            "qualcomm-int8 or qualcomm-w8a16"
        )
    if isinstance(scheme.npu, Hexagon) and rules.keep_float and scheme.npu.architecture < FIRST_WITH_FLOAT:
        yield (
            f"Hexagon {scheme.npu.architecture} has no float arithmetic for the layers of keep-float; name them in "
            "int16-activations"
        )
    if not scheme.weight_symmetric:
        yield "HTP's products take weights with zero point 0 only; take symmetric weights"
    if scheme.weight_granularity == "per-group":
        yield "HTP takes one 8-bit weight scale per output channel, not per group; take per-channel"
    if scheme.weight_values != "linear":
        yield f"HTP computes with linear weights, not with {scheme.weight_values} codes; take linear weights"
    if scheme.io == "int8" and scheme.precision != "w8a8":
        yield f"int8 inputs and outputs need 8-bit activations, which {scheme.precision} has not; take float ones"
    if rules.int16_activations and scheme.precision != "w8a8":
        yield f"16-bit activations of single layers belong in a w8a8 file, not in {scheme.precision}; leave them out"


def _concerned(patterns: tuple[str, ...]) -> Concerned:
    def concerned(node: onnx.NodeProto) -> bool:
        return any(layer_is_exempt(name, patterns) for name in layer_names(node))

    return concerned


def _second_operand(npu: Hexagon) -> Width:
    # Measured on the emulator: a uint16 second operand is narrowed, a symmetric int16 one is not.
    return "int16" if npu.architecture >= FIRST_WITH_16_BIT_PRODUCTS else "uint8"


def _ranges(
    proto: onnx.ModelProto, plan: HtpPlan, signature: Signature, model: Model, request: QuantizationRequest
) -> dict[str, Range]:
    """What training learned, else what an earlier run found, else what the samples show.

    A run over the samples looks at all that the graph needs with no layer exempt as well, so that the next conversion
    finds it in `known`. Raises as `onnx_calibrate.observe` does.
    """
    run, scheme = request.calibration, request.scheme
    if run is None:
        raise ValueError("a static scheme needs a calibration run")
    ranges = _learned(plan, model)
    needed = [(name, bits) for name, bits in plan.observed if name not in ranges]
    for bits in sorted({bits for _, bits in needed}):
        names = [name for name, width in needed if width == bits]
        found = _observed(proto, names, bits, signature, run, scheme)
        ranges |= {name: found[name] for name in names}
    return ranges


def _observed(
    proto: onnx.ModelProto, names: list[str], bits: int, signature: Signature, run: CalibrationRun, scheme: Scheme
) -> dict[str, Range]:
    width = replace(scheme, precision="w8a16" if bits == 16 else "w8a8")
    prefix = f"htp:{scheme.activation_symmetric}:{bits}:"
    if any(f"{prefix}{name}" not in run.known for name in names):
        nothing = _concerned(())
        complete = HtpPlan(proto, nothing, nothing, replace(width, io="float"))
        tensors = dict.fromkeys((*(name for name, _ in complete.observed), *names))
        unknown = [name for name in tensors if f"{prefix}{name}" not in run.known]
        found = observe(proto, signature, unknown, run, width)
        run.known.update({f"{prefix}{name}": bounds for name, bounds in found.items()})
    return {name: run.known[f"{prefix}{name}"] for name in names}


def _learned(plan: HtpPlan, model: Model) -> dict[str, Range]:
    """Ranges that training learned for the inputs of layers; they cover those of all layers that read a tensor."""
    by_layer = {strip_wrapper(layer): bounds for layer, bounds in model.input_ranges.items()}
    found: dict[str, Range] = {}
    for node in plan.nodes if by_layer else ():
        bounds = by_layer.get(source_layer(node))
        if bounds is None or node.op_type not in PRODUCTS or node.input[1] not in plan.constants:
            continue
        name = plan.origin(node.input[0])
        known = found.get(name, Range(0.0, 0.0))
        found[name] = Range(min(bounds[0], known.min), max(bounds[1], known.max))
    return found


def _unquantized(plan: HtpPlan, exempt: Concerned) -> Iterator[UnquantizedOp]:
    for node in plan.nodes:
        if plan.computes_integers(node) or node.op_type in MOVEMENT:
            continue
        if any(plan.is_real(name) for name in node.output):
            reason = "exempted by --keep-float" if exempt(node) else f"HTP has no integer kernel for {node.op_type}"
            yield UnquantizedOp(node.name, node.op_type, reason)


def _signature(of_float: Signature, proto: onnx.ModelProto) -> Signature:
    found = read_signature(proto)
    return Signature(
        inputs=tuple(replace(t, name=f.name) for f, t in zip(of_float.inputs, found.inputs, strict=True)),
        outputs=tuple(replace(t, name=f.name) for f, t in zip(of_float.outputs, found.outputs, strict=True)),
    )


def _record(request: QuantizationRequest, npu: Hexagon) -> StepRecord:
    scheme, rules = request.scheme, request.rules
    steps: dict[str, str | int | float | bool | None] = {
        "precision": scheme.precision,
        "activations": scheme.activations,
        "weights": scheme.weight_granularity,
        "io": scheme.io,
        "keep_float": ",".join(rules.keep_float),
        "int16_activations": ",".join(rules.int16_activations),
        "accelerator": f"hexagon {npu.architecture}",
    }
    if request.calibration is not None:
        steps |= {"estimator": request.calibration.estimator.name, "samples": request.calibration.count}
    return StepRecord("quantize", steps)
