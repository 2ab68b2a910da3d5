"""PyTorch -> Core ML (.mlpackage) through coremltools, with our own ranges, integers and tables."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.exporter.base import ZEROS_SAVE_STORAGE, QuantizationRequest, make_artifact
from edgeopt.exporter.coreml_activations import (
    name_relu6,
    quantize_activations,
    share_ranges,
    wanted,
)
from edgeopt.exporter.coreml_calibrate import activation_ranges, trained_ranges
from edgeopt.exporter.coreml_convert import Converted, convert, native_name
from edgeopt.exporter.coreml_package import write_package
from edgeopt.exporter.coreml_scheme import PROGRAMS, for_device, minimum_ios, unsupported
from edgeopt.exporter.coreml_weights import compress_weights
from edgeopt.exporter.executorch_lowering import first_line, quiet_vendor
from edgeopt.formats.coreml import computes, summarize
from edgeopt.formats.coreml_program import quiet_coremltools, read_program
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import (
    Artifact,
    Dim,
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

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Operation, Program

    from edgeopt.calibration.ranges import Range

_TOOLS = ("torch", "coremltools")


class CoreMLExporter:
    """The packages of a model: `model_fp32.mlpackage` and `model.mlpackage`. See `edgeopt.exporter.base.Exporter`."""

    format: Format = "coreml"
    suffix = ".mlpackage"

    def unsupported(self, scheme: Scheme, rules: LayerRules) -> str | None:
        return unsupported(scheme, rules)

    def export_float(self, model: Model, directory: Path) -> Artifact:
        path = directory / f"model_fp32{self.suffix}"
        with quiet_vendor():
            converted = convert(model, half=False, ios=PROGRAMS)
            write_package(converted.mlmodel, converted.layers, path)
        return _artifact(model, path, "fp32", StepRecord("export", {"format": self.format, "precision": "fp32"}), ())

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        del float_artifact  # fp16 is decided while the program is made
        if (reason := self.unsupported(request.scheme, request.rules)) is not None:
            raise ConversionError(reason, where="scheme", fix="see `edgeopt targets` for what each format offers")
        scheme = for_device(request.scheme)
        request = replace(request, scheme=scheme)
        path = directory / f"model{self.suffix}"
        kept: dict[str, str] = {}
        with quiet_vendor():
            converted = convert(
                model,
                half=scheme.precision != "fp32",
                ios=minimum_ios(scheme),
                keep_float=() if scheme.is_quantized else request.keep_float,
            )
            if scheme.is_quantized:
                converted, kept = _quantize(converted, model, request)
            write_package(converted.mlmodel, converted.layers, path)
        return _artifact(model, path, scheme.precision, _record(request, path), _unquantized(path, scheme, kept))

    def store_sparse(self, artifact: Artifact, directory: Path) -> tuple[Artifact, tuple[Finding, ...]]:
        del directory
        told = f"Core ML expands zeros before it computes: {ZEROS_SAVE_STORAGE}"
        return artifact, (Finding("no-sparse-kernels", artifact.precision, told),)


def _quantize(converted: Converted, model: Model, request: QuantizationRequest) -> tuple[Converted, dict[str, str]]:
    """The model with integers in it, and for each operator that was to have them and has not: why."""
    scheme, layers = request.scheme, converted.layers

    def exempt(op: Operation) -> bool:
        return bool(op.outputs) and layer_is_exempt(layers.get(op.outputs[0].name, ""), request.keep_float)

    kept: dict[str, str] = {}

    def change(program: Program) -> None:
        if request.calibration is not None:
            ranges = _ranges(converted, program, model, request, wanted(program, exempt))
            quantize_activations(program, ranges, scheme, exempt)
        kept.update(compress_weights(program, scheme, exempt))

    if request.calibration is not None:
        # First alone, since ranges are those of the file that the interpreter reads.
        converted = _changed(converted, name_relu6, scheme)
    return _changed(converted, change, scheme), kept


def _ranges(
    converted: Converted, program: Program, model: Model, request: QuantizationRequest, names: tuple[str, ...]
) -> dict[str, Range]:
    if request.calibration is None:
        return {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "float.mlpackage"
        write_package(converted.mlmodel, converted.layers, path)
        seen = read_program(path)
        trained = {n: r for n, r in trained_ranges(seen, model.input_ranges).items() if n in names}
        missing = [name for name in names if name not in trained]
        ranges = activation_ranges(seen, _signature(model, path), missing, request.calibration)
    return share_ranges(program, ranges | trained)


def _changed(converted: Converted, change: Callable[[Program], None], scheme: Scheme) -> Converted:
    """The model after a change to its program; coremltools writes it anew."""
    with quiet_coremltools():
        from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
        from coremltools.models.utils import _apply_graph_pass

        # coremltools takes instances of its own class only.
        graph_pass = type("Change", (AbstractGraphPass,), {"apply": lambda _, program: change(program)})()
        try:
            # Its specification version is iOS's less 9.
            mlmodel = _apply_graph_pass(
                converted.mlmodel, graph_pass, spec_version=minimum_ios(scheme) - 9, skip_model_load=True
            )
        except (ValueError, TypeError, RuntimeError, NotImplementedError, AssertionError, KeyError) as error:
            raise ConversionError(
                f"coremltools refuses the quantized program ({first_line(error)})",
                where="the model",
                fix="keep the layers involved in float (keep-float), or choose another format",
            ) from error
    return Converted(mlmodel, converted.layers)


# --- what the file is ------------------------------------------------------------------------------------------------


def _artifact(
    model: Model, path: Path, precision: Precision, step: StepRecord, unquantized: tuple[UnquantizedOp, ...]
) -> Artifact:
    return make_artifact(
        path,
        format_="coreml",
        precision=precision,
        signature=_signature(model, path),
        history=(*model.history, step),
        tools=_TOOLS,
        unquantized=unquantized,
    )


def _signature(model: Model, path: Path) -> Signature:
    native = summarize(path).signature
    return Signature(_bound(model.inputs, native.inputs, path), _bound(model.outputs, native.outputs, path))


def _bound(
    specs: tuple[TensorSpec, ...], native: tuple[SignatureTensor, ...], path: Path
) -> tuple[SignatureTensor, ...]:
    by_name = {tensor.native_name: tensor for tensor in native}
    missing = [spec.name for spec in specs if native_name(spec.name) not in by_name]
    if missing:
        raise ConversionError(f"the file has no {missing[0]!r}", where=str(path))
    return tuple(_described(spec, by_name[native_name(spec.name)]) for spec in specs)


def _described(spec: TensorSpec, tensor: SignatureTensor) -> SignatureTensor:
    # A program says nothing of the shape of an output that follows a free input.
    dims = spec.shape if len(tensor.shape) != len(spec.shape) or spec.is_dynamic else tensor.shape
    shape = tuple(dim.name if isinstance(dim, Dim) else dim for dim in dims)
    return replace(tensor, name=spec.name, shape=shape, model_dtype=spec.dtype)


def _record(request: QuantizationRequest, path: Path) -> StepRecord:
    scheme, calibration = request.scheme, request.calibration
    config: dict[str, str | int | float | bool | None] = {
        "format": "coreml",
        "precision": scheme.precision,
        "activations": scheme.activations,
        "minimum_ios": read_program(path).minimum_ios,
        "keep_float": ",".join(request.keep_float) or None,
    }
    if scheme.is_quantized:
        config |= {
            "weights": scheme.weight_granularity,
            "weight_values": scheme.weight_values,
            "weight_estimator": scheme.weight_estimator,
            "weight_symmetric": scheme.weight_symmetric,
            "symmetric": scheme.activation_symmetric,
            "scale": scheme.scale,
        }
    if scheme.weight_granularity == "per-group":
        config["group_size"] = scheme.group_size
    if calibration is not None:
        config |= {"estimator": calibration.estimator.name, "samples": calibration.count}
        if calibration.estimator.name == "percentile":
            config["percentile"] = calibration.estimator.percentile
    return StepRecord("quantize", config)


def _unquantized(path: Path, scheme: Scheme, kept: Mapping[str, str]) -> tuple[UnquantizedOp, ...]:
    """Operators of the file that compute in floating point where the scheme asked for integers, and why."""
    if not scheme.is_quantized:
        return ()
    found = []
    for op in computes(path):
        if op.variable in kept:
            found.append(UnquantizedOp(op.info.name, op.info.type, kept[op.variable]))
        elif scheme.activations == "static" and op.info.dtype in ("fp16", "fp32"):
            found.append(UnquantizedOp(op.info.name, op.info.type, op.why_float))
    return tuple(found)
