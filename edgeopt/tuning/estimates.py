"""How long files take on an accelerator that this machine can only emulate: what its compiler says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeopt.accelerators import load_accelerator
from edgeopt.errors import UsageError
from edgeopt.types import Artifact, Npu, OpTiming
from edgeopt.validation.prove import emulated_by


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one file: the whole in ms, None where nobody can tell, and its operators as far as they are known."""

    ms: float | None
    operators: tuple[OpTiming, ...]


def is_emulated(files: Sequence[Artifact], runtime: str) -> bool:
    """Whether timing these files here would time an emulator."""
    return any(emulated_by(artifact, runtime) is not None for artifact in files)


def estimate(artifact: Artifact, npu: Npu) -> Estimate:
    """Raises ConversionError where the accelerator's compiler refuses the file."""
    with TemporaryDirectory(prefix="edgeopt-estimate-") as folder:
        compiled = load_accelerator(artifact.format, npu.kind).compile(artifact, npu, Path(folder))
    total = next((m.value for m in compiled.measurements if m.name == "latency_ms"), None)
    operators = tuple(OpTiming(op.name, op.type, op.ms) for op in compiled.placement.ops if op.ms is not None)
    return Estimate(total, operators)


def known_ms(artifact: Artifact, npu: Npu) -> float:
    """The estimate in ms. Raises UsageError where nobody can tell."""
    ms = estimate(artifact, npu).ms
    if ms is None:
        raise UsageError(
            f"no tool on this machine can tell the latency on {npu.kind}",
            where="latency",
            fix="aim at macs, parameters or size",
        )
    return ms
