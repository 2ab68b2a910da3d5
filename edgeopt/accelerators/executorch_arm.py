"""A .pte file on an Arm Ethos-U or a GPU with neural graphics: what its delegates took, and what that costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from edgeopt.accelerators.base import SUBJECT, Compiled
from edgeopt.accelerators.ethos_u_config import title
from edgeopt.accelerators.ethos_u_vela import PACKAGE, tool
from edgeopt.accelerators.executorch_arm_vela import Estimate, estimate
from edgeopt.errors import ConfigError, ConversionError, MissingError, UsageError
from edgeopt.formats.executorch import ProgramOp, read_program
from edgeopt.formats.executorch_blocks import BlockTables, read_tables
from edgeopt.runtimes.tosa_program import tosa_graphs
from edgeopt.types import Artifact, Check, EthosU, Finding, Measurement, Npu, OpPlacement, Placement, Vgf

#: Delegate that each kind of accelerator runs.
_BACKENDS = {"vgf": "VgfBackend", "ethos-u55": "EthosUBackend", "ethos-u65": "EthosUBackend",
             "ethos-u85": "EthosUBackend"}  # fmt: skip
_SRAM_ADVICE = "a smaller input, fewer channels in the first layers, or a memory mode with activations in DRAM"
_STORAGE_ADVICE = "prune or factorize the network, or take a smaller one"


class ArmAccelerator:
    """See `edgeopt.accelerators.base.Accelerator`. The exporter has compiled the file; here it is read."""

    def unavailable(self) -> str | None:
        if find_spec("executorch") is None:
            return "reading .pte files needs the package 'executorch'; pip install executorch"
        if find_spec("ethosu") is None:
            return MissingError.extra(PACKAGE, "ethos-u", "an Ethos-U file").line()
        return None

    def compile(self, artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
        if not isinstance(npu, EthosU | Vgf):
            raise ConfigError(f"ExecuTorch's Arm backend makes no files for {npu.kind}")
        placement = place(artifact.path, npu)
        if isinstance(npu, Vgf):
            return Compiled(artifact, placement)
        if find_spec("ethosu") is None:
            raise MissingError.extra(PACKAGE, "ethos-u", "an Ethos-U file")
        if artifact.emulation is None:
            told = "it has no TOSA form beside it, so nothing here can tell its cycles and memory"
            return Compiled(artifact, placement, findings=(Finding("no-estimate", artifact.path.name, told),))
        cost = estimate(tosa_graphs(artifact.emulation), npu, directory)
        storage = max(artifact.size_bytes, cost.external_bytes)
        return Compiled(
            artifact=artifact,
            placement=placement,
            measurements=tuple(_measurements(cost, storage)),
            checks=(
                _check("sram_bytes", cost.sram_bytes, npu.sram_bytes, _SRAM_ADVICE),
                _check("storage_bytes", storage, npu.storage_bytes, _STORAGE_ADVICE),
            ),
            findings=tuple(_findings(placement)),
        )


class VgfAccelerator(ArmAccelerator):
    """Needs no Vela: the GPU's driver compiles."""

    def unavailable(self) -> str | None:
        if find_spec("model_converter") is None:
            return MissingError.extra("ai-ml-sdk-model-converter", "vgf", "a VGF file").line()
        return None


def place(path: Path, npu: EthosU | Vgf) -> Placement:
    """Every operator of a .pte file, in file order.

    Inside a delegate of a file that edgeopt has not made, nothing can be told apart: it is one operator.

    Raises:
        UsageError: the file is damaged.
        ConversionError: its delegates are another accelerator's.
    """
    program = read_program(path)
    try:
        tables = read_tables(path.read_bytes())
    except ValueError as error:
        raise UsageError("has a damaged table of operators", where=str(path), fix="export it again") from error
    others = sorted({name for name in program.delegates if name != _BACKENDS[npu.kind]})
    if others:
        raise ConversionError(f"is for {', '.join(others)}, not for {_BACKENDS[npu.kind]}", where=str(path))
    return Placement(
        accelerator=title(npu) if isinstance(npu, EthosU) else "VGF",
        told_by=f"ExecuTorch {version('executorch')}",
        predicted=False,
        ops=tuple(_placed(program.ops, tables)),
    )


def _placed(ops: tuple[ProgramOp, ...], tables: BlockTables | None) -> Iterator[OpPlacement]:
    counts: Counter[str] = Counter()
    blocks = iter(tables.blocks if tables is not None else ())
    refusals = tables.refusals if tables is not None else {}
    for op in ops:
        if op.info.delegate is None:
            reason = refusals.get(op.instruction, "the delegate did not take it; the file does not say why")
            yield OpPlacement(op.info.name, op.info.type, "cpu", op.layer or None, reason, _fix(op, reason))
            continue
        for type_, layer in next(blocks, ((op.info.type, ""),)):
            number = counts[type_]
            counts[type_] += 1
            name = f"{layer}/{type_}_{number}" if layer else f"{type_}_{number}"
            yield OpPlacement(name, type_, "accelerator", layer or None)


def _fix(op: ProgramOp, reason: str) -> str | None:
    if "quantize_per" in op.info.type:
        return 'take io = "int8", the app then converts; or quantize the float operators next to it'
    if "not quantized" in reason:
        return "quantize that layer"
    if "int64" in reason:
        return "give the model int32 inputs"
    if "U55" in reason:
        return "the Ethos-U85 may have it"
    return None


def _measurements(cost: Estimate, storage: int) -> Iterator[Measurement]:
    def told(name: str, value: float, unit: str) -> Measurement:
        return Measurement(name, SUBJECT, float(value), unit, "estimated", tool())

    yield told("sram_bytes", cost.sram_bytes, "bytes")
    yield told("storage_bytes", storage, "bytes")
    yield told("sram_traffic_bytes", cost.sram_traffic_bytes, "bytes")
    yield told("storage_traffic_bytes", cost.storage_traffic_bytes, "bytes")
    if cost.cycles:
        yield told("latency_ms", cost.latency_ms, "ms")
        yield told("cycles", cost.cycles, "cycles")
        yield told("macs", cost.macs, "MACs")


def _check(name: str, measured: int, limit: int, advice: str) -> Check:
    fits = measured <= limit
    return Check(name, float(measured), float(limit), "<=", "bytes", fits, None if fits else advice)


def _findings(placement: Placement) -> Iterator[Finding]:
    if placement.on_cpu:
        told = f"Vela's estimate leaves out the {len(placement.on_cpu)} operators that the CPU runs"
        yield Finding("npu-time-only", placement.accelerator, told)
