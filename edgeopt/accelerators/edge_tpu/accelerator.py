"""The Edge TPU's compile step: the real compiler where it is installed, our prediction in any case."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from edgeopt.accelerators.base import SUBJECT, Compiled
from edgeopt.accelerators.edge_tpu import compiler, figures, latency, parameters, predictor
from edgeopt.accelerators.edge_tpu import graph as graphs
from edgeopt.accelerators.edge_tpu.figures import RATES, USB3_MAXIMUM, Rates
from edgeopt.accelerators.edge_tpu.graph import COMPILED, Graph
from edgeopt.accelerators.edge_tpu.parameters import Parameters
from edgeopt.accelerators.edge_tpu.work import Work
from edgeopt.accelerators.edge_tpu.workload import work_of
from edgeopt.errors import ConfigError
from edgeopt.formats.files import sha256_of
from edgeopt.types import Artifact, EdgeTpu, Finding, Measurement, Npu, Placement, StepRecord

_LINKS = {"usb3": "USB 3", "usb2": "USB 2", "pcie": "PCIe"}
_HOW_TO_COMPILE = (
    "this file still has to go through Google's closed compiler, which is not on this machine: install the Debian "
    "package edgetpu-compiler (https://coral.ai/docs/edgetpu/compiler), here or in a Debian container on x86-64, and "
    "run `edgetpu_compiler -s FILE`; placement and latency are predicted"
)


class EdgeTpuAccelerator:
    """LiteRT files for Google's Edge TPU (Coral)."""

    def unavailable(self) -> str | None:
        return None  # without the compiler everything is predicted

    def compile(self, artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
        """Predict the placement, estimate the latency, and compile where `edgetpu_compiler` is on PATH.

        Raises:
            UsageError: the file is not a .tflite file, or it is corrupt.
            ConversionError: the compiler refuses the file.
        """
        if not isinstance(npu, EdgeTpu):
            raise ConfigError(f"{npu.kind} is not an Edge TPU", fix="take a device profile with an Edge TPU")
        graph = graphs.read(artifact.path)
        placement = predictor.placement(graph)
        if any(op.type == COMPILED for op in graph.operators):
            return Compiled(artifact, placement)
        program = compiler.installed()
        if program is None:
            findings = (Finding("edge-tpu-not-compiled", artifact.path.name, _HOW_TO_COMPILE), *_risks(graph, npu))
            return _with_estimates(Compiled(artifact, placement, findings=findings), graph, npu, None)
        compiled, report = compiler.run(program, artifact.path, directory)
        truth = _as_compiled(graph, placement, graphs.read(compiled), report)
        result = Compiled(_shipped(artifact, compiled, report), truth, findings=_differences(placement, truth))
        return _with_estimates(result, graph, npu, report)


def _shipped(artifact: Artifact, compiled: Path, report: compiler.Report) -> Artifact:
    return replace(
        artifact,
        path=compiled,
        size_bytes=compiled.stat().st_size,
        sha256=sha256_of(compiled),
        history=(*artifact.history, StepRecord("compile for the Edge TPU", {"compiler": report.version})),
        tools={**artifact.tools, compiler.PROGRAM: report.version},
        emulation=artifact.runnable,
    )


def _as_compiled(graph: Graph, predicted: Placement, compiled: Graph, report: compiler.Report) -> Placement:
    """The placement that the compiled file shows: what is still in it beside the Edge TPU's operator is on the CPU."""
    kept = Counter(
        (op.type, compiled.tensors[op.outputs[0]].name)
        for op in compiled.operators
        if op.type != COMPILED and op.outputs
    )
    ops = []
    for operator, guess in zip(graph.operators, predicted.ops, strict=True):
        key = (operator.type, graph.tensors[operator.outputs[0]].name) if operator.outputs else (operator.type, "")
        if not kept[key]:
            ops.append(replace(guess, on="accelerator", reason=None, fix=None))
            continue
        kept[key] -= 1
        # The table calls every custom operator CUSTOM.
        told = report.statuses_on_cpu("CUSTOM" if operator.is_custom else operator.type)
        agreed = guess.reason is not None and any(guess.reason.startswith(status) for status in told)
        reason = guess.reason if agreed else " or ".join(told) or "left to the CPU by the compiler"
        ops.append(replace(guess, on="cpu", reason=reason, fix=guess.fix if agreed else None))
    return Placement(predictor.NAME, f"{compiler.PROGRAM} {report.version}", predicted=False, ops=tuple(ops))


def _differences(predicted: Placement, truth: Placement) -> tuple[Finding, ...]:
    """One finding per operator type that the compiler placed otherwise than the published rules say."""
    wrong = Counter(
        (mine.type, theirs.on) for mine, theirs in zip(predicted.ops, truth.ops, strict=True) if mine.on != theirs.on
    )
    return tuple(
        Finding(
            "edge-tpu-prediction",
            kind,
            f"the compiler puts {count} on the {'CPU' if on == 'cpu' else 'Edge TPU'}, against the published rules",
        )
        for (kind, on), count in sorted(wrong.items())
    )


def _risks(graph: Graph, npu: EdgeTpu) -> tuple[Finding, ...]:
    """What the compiler may stop at, although every operator keeps the rules."""
    found = []
    for index in graph.inputs:
        tensor = graph.tensors[index]
        if tensor.signature[:1] == (-1,):
            message = "has a free batch dimension, with which the compiler fails for some models: export with batch 1"
            found.append(Finding("edge-tpu-dynamic-batch", tensor.name, message))
    for operator in graph.operators:
        size = sum(t.size for t in graph.activations_of(operator))
        if size > npu.cache_bytes:
            message = (
                f"moves {size / figures.MEBI:.1f} MiB of activations, more than the chip holds: the compiler may fail "
                "with 'large activation tensors in model'"
            )
            found.append(Finding("edge-tpu-large-activations", operator.name, message))
    return tuple(found)


def _with_estimates(compiled: Compiled, graph: Graph, npu: EdgeTpu, report: compiler.Report | None) -> Compiled:
    """Add times, bytes and MACs. Where the compiler told the bytes of parameters, those are taken."""
    works = [work_of(graph, op) for op in graph.operators]
    on_device = frozenset(n for n, op in enumerate(compiled.placement.ops) if op.on == "accelerator")
    activations = parameters.activations_of(graph, sorted(on_device))
    kept = parameters.place([(n, works[n]) for n in sorted(on_device)], activations, npu.cache_bytes)
    onchip, offchip = kept.onchip_bytes, kept.offchip_bytes
    if report is not None and report.onchip_bytes is not None and report.offchip_bytes is not None:
        onchip, offchip = report.onchip_bytes, report.offchip_bytes
    sent, received = _moved_bytes(graph, on_device)

    def estimate(rates: Rates) -> latency.Estimate:
        load = latency.Load(
            chip_ms=sum(latency.chip_ms(works[n], rates) for n in on_device),
            streaming_ms=offchip / figures.MEBI * rates.streaming,
            host_ms=sum(latency.host_ms(work, rates) for n, work in enumerate(works) if n not in on_device),
            sent_bytes=sent,
            received_bytes=received,
        )
        return latency.total(load, rates)

    rates = RATES[npu.link]
    told = estimate(rates)
    runtime = f"{predictor.NAME} ({_LINKS[npu.link]})"
    figures_ = (
        Measurement("latency_ms", SUBJECT, told.ms, "ms", "estimated", runtime, spread=told.spread),
        Measurement("macs", SUBJECT, sum(w.macs for w in works), "MACs", "estimated", runtime),
        Measurement("onchip_bytes", SUBJECT, onchip, "bytes", "estimated", runtime),
        Measurement("offchip_bytes", SUBJECT, offchip, "bytes", "estimated", runtime),
        Measurement("transfer_bytes", SUBJECT, sent + received, "bytes", "estimated", runtime),
    )
    times = _times(works, on_device, kept, rates)
    ops = tuple(replace(op, ms=ms) for op, ms in zip(compiled.placement.ops, times, strict=True))
    findings = compiled.findings
    if npu.link == "usb3":
        fast = estimate(USB3_MAXIMUM).ms
        message = f"the estimate is for libedgetpu1-std; with libedgetpu1-max (doubled clock) about {fast:.1f} ms"
        findings = (*findings, Finding("edge-tpu-clock", runtime, message))
    return replace(compiled, placement=replace(compiled.placement, ops=ops), measurements=figures_, findings=findings)


def _times(works: list[Work], on_device: frozenset[int], kept: Parameters, rates: Rates) -> list[float]:
    """Milliseconds per operator, each as if it were alone: their sum counts twice what happens at once."""
    times = []
    for number, work in enumerate(works):
        if number not in on_device:
            times.append(latency.host_ms(work, rates))
        else:
            streaming = latency.streaming_ms(work, rates) if number in kept.streamed else 0.0
            times.append(latency.chip_ms(work, rates) + streaming)
    return times


def _moved_bytes(graph: Graph, on_device: frozenset[int]) -> tuple[int, int]:
    """Activations that go to the chip and those that come back in one inference."""
    written = {i for n in on_device for i in graph.operators[n].outputs}
    read = {
        i
        for n in on_device
        for i in graph.operators[n].inputs
        if i is not None and graph.tensors[i].content == "activation"
    }
    wanted = set(graph.outputs) | {
        i for n, op in enumerate(graph.operators) if n not in on_device for i in op.inputs if i is not None
    }
    return sum(graph.tensors[i].size for i in read - written), sum(graph.tensors[i].size for i in written & wanted)
