"""One target's file of a model, and where its operators run. What can't be had is told, not raised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edgeopt.accelerators import ACCELERATORS, load_accelerator
from edgeopt.accelerators.base import Compiled
from edgeopt.config import RunConfig
from edgeopt.coverage_values import TargetCoverage
from edgeopt.device_profiles import load_device
from edgeopt.errors import ConversionError, EdgeoptError, MissingError
from edgeopt.exporter import load_exporter
from edgeopt.formats import SUFFIXES, litert, onnx, summarize
from edgeopt.report.units import quantity, title
from edgeopt.targets import list_targets, load_target
from edgeopt.targets.schema import Target
from edgeopt.types import (
    Artifact,
    EstimatorSpec,
    EthosU,
    Format,
    LayerRules,
    Npu,
    OpPlacement,
    Placement,
    Precision,
    Scheme,
)
from edgeopt.workbench import Workbench

#: One per CPU runtime; they stand beside the accelerators.
_CPU_TARGETS = ("android-int8", "android-onnx-int8", "android-executorch-int8")
#: Of an accelerator's targets the one that people start from.
_FIRST: tuple[Precision, ...] = ("w8a8", "fp16")
_CPU = {"litert": "int8 kernels of LiteRT", "onnx": "int8 kernels of ONNX Runtime", "executorch": "XNNPACK"}
#: The LiteRT file of every Ethos-U is this one's; only what Vela makes of it differs.
_ANY_ETHOS_U = EthosU("ethos-u55", macs=128, mhz=1, system_config="", memory_mode="", sram_bytes=0, storage_bytes=0)
_CONVERSIONS = frozenset({"QUANTIZE", "DEQUANTIZE", "Convert"}) | onnx.CONVERSIONS


def default_targets() -> tuple[str, ...]:
    """One built-in target per accelerator, then one per CPU runtime."""
    formats = list(ACCELERATORS)

    def rank(target: Target) -> tuple[int, int, str]:
        precision = target.scheme.precision
        assert target.accelerator is not None
        order = _FIRST.index(precision) if precision in _FIRST else len(_FIRST)
        return formats.index((target.format, target.accelerator)), order, target.name

    chosen: dict[str, str] = {}
    for target in sorted((one for one in list_targets() if one.accelerator is not None), key=rank):
        chosen.setdefault(str(target.accelerator), target.name)
    return (*chosen.values(), *_CPU_TARGETS)


def targets_for(format_: Format) -> tuple[str, ...]:
    """The built-in targets whose accelerator takes files of that format, at one precision each."""
    chosen: dict[str, str] = {}
    for target in list_targets():
        if target.accelerator is not None and target.format == format_:
            chosen.setdefault(target.accelerator, target.name)
            if target.scheme.precision == "w8a8":
                chosen[target.accelerator] = target.name
    return tuple(chosen.values())


def cover(name: str, config: RunConfig, workbench: Workbench, directory: Path) -> TargetCoverage:
    """Make the target's file, and tell where its operators run.

    Raises UsageError where the target or its device is no known one: that is a mistake in the request, no result.
    """

    def compiled(target: Target, npu: Npu | None) -> Compiled:
        scheme = replace(target.scheme, npu=npu)
        rules = LayerRules(config.keep_float, config.int16_activations)
        if (problem := load_exporter(target.format, target.accelerator).unsupported(scheme, rules)) is not None:
            raise ConversionError(problem)
        given = target.estimator
        estimator = EstimatorSpec(config.estimator or given.name, config.percentile or given.percentile)
        if scheme.is_plain_float:
            artifact = workbench.float_artifact(target.format)
        else:
            artifact, _ = workbench.quantized_artifact(target.format, _of_file(scheme, target.format), estimator)
        if npu is None:
            return Compiled(artifact, _on_cpu(artifact))
        return load_accelerator(target.format, npu.kind).compile(artifact, npu, directory)

    return _covered(name, config.device, compiled)


def _of_file(scheme: Scheme, format_: Format) -> Scheme:
    """The scheme by which accelerators share a file where their exporter makes the same for all of them."""
    shared = format_ == "litert" and isinstance(scheme.npu, EthosU)
    return replace(scheme, npu=_ANY_ETHOS_U) if shared else scheme


def cover_file(name: str, device: str | None, artifact: Artifact, directory: Path) -> TargetCoverage:
    """Tell where the operators of a file run that is there already."""

    def compiled(target: Target, npu: Npu | None) -> Compiled:
        if target.format != artifact.format:
            raise ConversionError(f"takes {target.format} files, and this is {artifact.format}")
        if npu is None:
            raise ConversionError("runs on the CPU, and the file does not tell why operators stayed float")
        return load_accelerator(target.format, npu.kind).compile(artifact, npu, directory)

    return _covered(name, device, compiled)


def exported_file(path: Path) -> Artifact | None:
    """The artifact of a .tflite, .pte, .mlpackage or quantized .onnx file, which needs no conversion; None for anything
    else.

    Raises UsageError where the file is absent or corrupt.
    """
    if path.suffix not in SUFFIXES:
        return None
    summary = summarize(path)
    if summary.format == "onnx" and not any(op.type in onnx.CONVERSIONS for op in summary.ops):
        return None
    is_int8 = any(op.dtype.startswith("int8") or op.type in _CONVERSIONS for op in summary.ops)
    return Artifact(
        path=path,
        format=summary.format,
        precision="w8a8" if is_int8 else "fp32",
        signature=summary.signature,
        size_bytes=summary.size_bytes,
        sha256=summary.sha256,
        history=(),
        tools={},
        unquantized_ops=(),
    )


def _covered(name: str, device_name: str | None, compile_: Callable[[Target, Npu | None], Compiled]) -> TargetCoverage:
    target = load_target(name)
    device = load_device(device_name or target.device)
    npu = device.npu(target.accelerator) if target.accelerator is not None else None
    empty = TargetCoverage(target.name, target.format, target.accelerator, device.name, None)
    if target.accelerator is not None and npu is None:
        return replace(empty, problem=f"device {device.name!r} has no {target.accelerator}")
    try:
        if npu is not None and (missing := load_accelerator(target.format, npu.kind).unavailable()) is not None:
            return replace(empty, problem=f"needs more on this machine: {missing}")
        made = compile_(target, npu)
    except MissingError as error:
        return replace(empty, problem=f"needs more on this machine: {error.line()}")
    except EdgeoptError as error:
        return replace(empty, problem=f"can't convert: {error.line()}")
    latencies = [one.value for one in made.measurements if one.name == "latency_ms"]
    missed = tuple(
        f"{title(one.name)} {quantity(one.measured, one.unit)}, and the device has {quantity(one.limit, one.unit)}"
        for one in made.checks
        if not one.passed
    )
    return replace(empty, placement=made.placement, latency_ms=latencies[0] if latencies else None, warnings=missed)


def _on_cpu(artifact: Artifact) -> Placement:
    """What the exporter and the file say about the CPU runtime: an operator falls back where it stayed float, or where
    its delegate left it to a portable kernel."""
    reasons = {op.name: op.reason for op in artifact.unquantized_ops}
    layers = _layers(artifact)
    ops = tuple(
        OpPlacement(
            op.name, op.type, "cpu" if op.name in reasons else "accelerator", layers(op.name), reasons.get(op.name)
        )
        for op in summarize(artifact.path).ops
        if op.type not in _CONVERSIONS
    )
    return Placement(_CPU[artifact.format], "the exported file", predicted=False, ops=ops)


def _layers(artifact: Artifact) -> Callable[[str], str | None]:
    """Operator's name -> its source layer; "" for the model's own code."""
    if artifact.format == "litert":
        return lambda name: "" if litert.layer_of(name) == litert.ROOT else litert.layer_of(name)
    if artifact.format == "onnx":
        return lambda name: name.rpartition("/")[0]
    from edgeopt.formats.executorch import read_program

    of_ops = {op.info.name: op.layer or "" for op in read_program(artifact.path).ops}
    return lambda name: of_ops.get(name, name.rpartition("/")[0])
