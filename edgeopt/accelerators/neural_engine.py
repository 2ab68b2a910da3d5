"""Apple's Neural Engine: where an .mlpackage runs, by Core ML's compute plan on a Mac, by published rules elsewhere."""

from __future__ import annotations

import platform
from pathlib import Path

from edgeopt.accelerators.base import Compiled
from edgeopt.accelerators.neural_engine_rules import refusal
from edgeopt.errors import ConversionError, UsageError
from edgeopt.formats.coreml import ProgramOp, operators
from edgeopt.formats.coreml_kinds import CONVERSIONS
from edgeopt.formats.coreml_program import Program, missing, quiet_coremltools, read_program
from edgeopt.types import Artifact, Finding, NeuralEngine, Npu, OpPlacement, Placement

_RULES = "published operator rules (coremltools guide, hollance/neural-engine)"
_PLAN = "Core ML's compute plan on this Mac"
#: The first chips whose Neural Engine multiplies int8 by int8 faster than fp16
#: (apple.github.io/coremltools/docs-guides/source/opt-quantization-perf.html).
_FAST_INT8 = ("A17 Pro", "A18", "A19")
#: From this share of the operators on, the app should ask for the Neural Engine.
_MOSTLY = 0.5
_MAC = "Darwin"


class CoreMLAccelerator:
    """See `edgeopt.accelerators.base.Accelerator`. Nothing is compiled: Core ML does that on the phone."""

    def unavailable(self) -> str | None:
        return missing()

    def compile(self, artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
        if not isinstance(npu, NeuralEngine):
            raise ConversionError(f"a Core ML package is not made for {npu.kind}", where=str(artifact.path))
        try:
            program = read_program(artifact.path)
        except UsageError as error:
            raise ConversionError(error.problem, where=error.where, fix=error.fix) from error
        listed = [op for op in operators(program) if op.info.type not in CONVERSIONS]
        plan = _plan(artifact.path, directory) if platform.system() == _MAC else None
        placement = Placement(
            accelerator=f"Neural Engine of the {npu.chip}",
            told_by=_RULES if plan is None else f"{_PLAN} (macOS {platform.mac_ver()[0]})",
            # A Mac's engine is not the phone's.
            predicted=True,
            ops=tuple(_predicted(op, program) if plan is None else _planned(op, plan) for op in listed),
        )
        return Compiled(artifact, placement, findings=_findings(program, listed, placement, npu))


def _predicted(op: ProgramOp, program: Program) -> OpPlacement:
    refused = refusal(op, program)
    if refused is None:
        return OpPlacement(op.info.name, op.info.type, "accelerator", op.layer or None)
    return OpPlacement(op.info.name, op.info.type, "cpu", op.layer or None, reason=refused[0], fix=refused[1])


# --- on a Mac --------------------------------------------------------------------------------------------------------


def _plan(path: Path, directory: Path) -> dict[str, str]:
    """Name of an operator -> the compute device that Core ML prefers for it, by its class."""
    with quiet_coremltools():
        import coremltools as ct
        from coremltools.models.compute_plan import MLComputePlan

        try:
            compiled = ct.models.utils.compile_model(str(path), str(directory / f"{path.stem}.mlmodelc"))
            plan = MLComputePlan.load_from_path(str(compiled), compute_units=ct.ComputeUnit.ALL)
            devices = {}
            for op in plan.model_structure.program.functions["main"].block.operations:
                usage = plan.get_compute_device_usage_for_mlprogram_operation(op)
                if usage is not None and op.outputs:
                    devices[op.outputs[0].name] = type(usage.preferred_compute_device).__name__
        # Core ML's bindings raise plain Exceptions for what they can't load.
        except Exception as error:
            raise ConversionError(f"Core ML refuses the file ({error})", where=str(path)) from error
    return devices


def _planned(op: ProgramOp, plan: dict[str, str]) -> OpPlacement:
    device = plan.get(op.variable, "")
    if "NeuralEngine" in device:
        return OpPlacement(op.info.name, op.info.type, "accelerator", op.layer or None)
    unit = "GPU" if "GPU" in device else "CPU"
    return OpPlacement(op.info.name, op.info.type, "cpu", op.layer or None, reason=f"Core ML prefers the {unit} for it")


# --- what a person should know ---------------------------------------------------------------------------------------


def _findings(
    program: Program, listed: list[ProgramOp], placement: Placement, npu: NeuralEngine
) -> tuple[Finding, ...]:
    found = []
    if platform.system() != _MAC:
        told = (
            "Core ML runs on Apple's systems only: numerics are those of the file's own operators and weights in "
            "reference arithmetic, placement is predicted, and no time was taken"
        )
        found.append(Finding("not-executed", "Core ML", told))
    if program.minimum_ios > npu.ios:
        told = f"needs iOS {program.minimum_ios}, and the phone shipped with iOS {npu.ios}: ask for an update"
        found.append(Finding("system-version", "the file", told))
    found.append(Finding("compute-units", "the app", _compute_units(placement)))
    if any(op.info.dtype == "int8" for op in listed) and not npu.chip.startswith(_FAST_INT8):
        told = f"the A17 Pro and later multiply int8 at a higher rate; on the {npu.chip} int8 saves memory traffic only"
        found.append(Finding("int8-rate", npu.chip, told))
    rows = [op for op in listed if op.info.type == "linear" and _rank(op) == 3]
    if rows:
        told = (
            f"{len(rows)} linear layers work on (batch, sequence, channels); Apple found transformers up to 10 times "
            "faster with 1x1 convolutions on (batch, channels, 1, sequence) "
            "(machinelearning.apple.com/research/neural-engine-transformers)"
        )
        found.append(Finding("transformer-layout", rows[0].layer or rows[0].info.name, told))
    return tuple(found)


def _compute_units(placement: Placement) -> str:
    share = f"{placement.accelerated:.0%} of the operators fit the Neural Engine"
    if placement.accelerated >= _MOSTLY:
        return f"{share}: set MLModelConfiguration.computeUnits to .cpuAndNeuralEngine, or leave it at .all"
    return f"{share}: try MLModelConfiguration.computeUnits = .cpuAndGPU as well, each switch of device costs time"


def _rank(op: ProgramOp) -> int:
    return len(op.operation.outputs[0].type.shape)
