"""A .tflite file on an Arm Ethos-U, by way of Vela."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from edgeopt.accelerators.base import SUBJECT, Compiled
from edgeopt.accelerators.ethos_u_config import arena_in_dram, title, weights_in_sram
from edgeopt.accelerators.ethos_u_placement import peak, place
from edgeopt.accelerators.ethos_u_vela import PACKAGE, VelaRun, arena_bytes, run_vela, tool
from edgeopt.errors import ConfigError, MissingError
from edgeopt.formats.files import sha256_of, size_of
from edgeopt.types import Artifact, Check, EthosU, Finding, Measurement, Npu, Placement, StepRecord


class VelaAccelerator:
    """See `edgeopt.accelerators.base.Accelerator`. All three families go through the same compiler."""

    def unavailable(self) -> str | None:
        if find_spec("ethosu") is None:
            return MissingError.extra(PACKAGE, "ethos-u", "an Ethos-U file").line()
        return None

    def compile(self, artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
        if not isinstance(npu, EthosU):
            raise ConfigError(f"Vela compiles for the Ethos-U, not for {npu.kind}")
        run = run_vela(artifact.path, npu, directory)
        placement = place(artifact.path, npu, run)
        memory = {"sram_bytes": _sram(npu, run), "storage_bytes": _storage(npu, run)}
        return Compiled(
            artifact=_compiled(artifact, npu, run),
            placement=placement,
            measurements=tuple(_measurements(run, placement, memory)),
            checks=(
                _check("sram_bytes", memory["sram_bytes"], npu.sram_bytes, _SRAM_ADVICE),
                _check("storage_bytes", memory["storage_bytes"], npu.storage_bytes, _STORAGE_ADVICE),
            ),
            findings=tuple(_findings(artifact, npu, run, placement, memory["sram_bytes"])),
        )


_SRAM_ADVICE = "a smaller input, fewer channels in the first layers, or a memory mode with activations in DRAM"
_STORAGE_ADVICE = "prune or factorize the network, or take a smaller one"


def _compiled(artifact: Artifact, npu: EthosU, run: VelaRun) -> Artifact:
    step = StepRecord(
        "compile",
        {
            "compiler": tool(),
            "accelerator": title(npu),
            "mhz": npu.mhz,
            "system_config": npu.system_config,
            "memory_mode": npu.memory_mode,
            "arena_cache_size": arena_bytes(artifact.path, npu),
        },
    )
    return replace(
        artifact,
        path=run.path,
        size_bytes=size_of(run.path),
        sha256=sha256_of(run.path),
        history=(*artifact.history, step),
        tools={**artifact.tools, PACKAGE: version(PACKAGE)},
        emulation=artifact.runnable,
    )


def _sram(npu: EthosU, run: VelaRun) -> int:
    """On-chip bytes: of activations and of weights on their way to the NPU, or of all weights where they live there."""
    return run.summary.sram + (run.summary.on_chip_flash if weights_in_sram(npu) else 0)


def _storage(npu: EthosU, run: VelaRun) -> int:
    """Bytes of flash or DRAM: the file, which also holds what the CPU runs; or, where activations are in DRAM too,
    what Vela counts there if that is more."""
    told = run.summary.dram + run.summary.off_chip_flash
    return max(size_of(run.path), told if arena_in_dram(npu) else 0)


def _measurements(run: VelaRun, placement: Placement, memory: dict[str, int]) -> list[Measurement]:
    summary = run.summary

    def estimate(name: str, value: float, unit: str) -> Measurement:
        return Measurement(name, SUBJECT, float(value), unit, "estimated", tool())

    found = [
        *(estimate(name, value, "bytes") for name, value in memory.items()),
        estimate("sram_traffic_bytes", summary.sram_traffic, "bytes"),
        estimate("storage_traffic_bytes", summary.other_traffic, "bytes"),
    ]
    if any(op.on == "accelerator" for op in placement.ops):
        # A network that stays on the CPU has an "inference time" of nothing here.
        found += [
            estimate("latency_ms", summary.inference_ms, "ms"),
            estimate("cycles", summary.cycles, "cycles"),
            estimate("macs", summary.macs, "MACs"),
        ]
    return found


def _check(name: str, measured: int, limit: int, advice: str) -> Check:
    fits = measured <= limit
    return Check(name, float(measured), float(limit), "<=", "bytes", fits, None if fits else advice)


def _findings(artifact: Artifact, npu: EthosU, run: VelaRun, placement: Placement, sram: int) -> list[Finding]:
    found = []
    where = placement.accelerator
    if placement.on_cpu:
        told = f"Vela's estimate leaves out the {len(placement.on_cpu)} operators that the CPU runs"
        found.append(Finding("npu-time-only", where, told))
    busiest = peak(artifact.path, run)
    if sram > npu.sram_bytes and busiest is not None:
        told = f"{sram} bytes of SRAM are in use here, {npu.sram_bytes} are there"
        found.append(Finding("sram-peak", busiest, told))
    if weights_in_sram(npu):
        told = f"{npu.memory_mode}: weights count as SRAM, and the file must be stored elsewhere besides"
        found.append(Finding("memory-mode", where, told))
    elif arena_in_dram(npu):
        told = f"{npu.memory_mode}: SRAM caches for the NPU alone; activations are in DRAM and count as storage"
        found.append(Finding("memory-mode", where, told))
    return found
