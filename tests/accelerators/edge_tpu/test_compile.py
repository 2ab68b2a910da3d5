"""The compile step: estimates without the compiler, and a stand-in for `edgetpu_compiler` on PATH."""

from __future__ import annotations

import stat
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from edgeopt.accelerators import load_accelerator
from edgeopt.accelerators.base import SUBJECT, Compiled
from edgeopt.accelerators.edge_tpu import EdgeTpuAccelerator, compiler, parameters
from edgeopt.accelerators.edge_tpu.figures import RATES
from edgeopt.accelerators.edge_tpu.latency import Load, total
from edgeopt.accelerators.edge_tpu.parameters import Activations
from edgeopt.accelerators.edge_tpu.work import Work
from edgeopt.errors import ConfigError, ConversionError
from edgeopt.types import Artifact, EdgeTpu, Signature, Vgf

NPU = EdgeTpu(8 * 2**20, "usb3")
UNSPECIFIED = "Operation is otherwise supported, but not mapped due to some unspecified limitation"
# As version 16 prints it (google-coral/edgetpu#512, motokimura/yolox-ti-lite_tflite#2).
REPORT = f"""Edge TPU Compiler version 16.0.384591198
Started a compilation timeout timer of 180 seconds.

Model compiled successfully in 1354 ms.

Input model: model.tflite
Input size: 5.10MiB
Output model: model_edgetpu.tflite
Output size: 6.28MiB
On-chip memory used for caching model parameters: 6.03MiB
On-chip memory remaining for caching model parameters: 1.21MiB
Off-chip memory used for streaming uncached model parameters: 49.62KiB
Number of Edge TPU subgraphs: 1
Total number of operations: 3
Operation log: model_edgetpu.log

Model successfully compiled but not all operations are supported by the Edge TPU.
Number of operations that will run on Edge TPU: 1
Number of operations that will run on CPU: 2

Operator                       Count      Status

CONV_2D                        1          Mapped to Edge TPU
LOGISTIC                       1          {UNSPECIFIED}
ELU                            1          Operation not supported
Compilation child process completed within timeout period.
Compilation succeeded!
"""


def write(path: Path, operators: list[tuple[str, str, str]], channels: int = 8) -> Path:
    """A chain of 16x16 feature maps: (operator, tensor that it reads, tensor that it writes)."""
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.subgraphs, model.operatorCodes = 3, [graph], []
    weights = schema.BufferT()
    weights.data = np.ones(channels * 9 * channels, np.uint8)
    model.buffers = [schema.BufferT(), weights]
    names = [operators[0][1], *(written for _, _, written in operators)]
    graph.tensors, graph.operators = [], []
    for name in names:
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.shape, tensor.buffer = name.encode(), 9, [1, 16, 16, channels], 0
        graph.tensors.append(tensor)
    kernel = schema.TensorT()
    kernel.name, kernel.type, kernel.shape, kernel.buffer = b"weights", 9, [channels, 3, 3, channels], 1
    graph.tensors.append(kernel)
    for kind, read, written in operators:
        code, operator = schema.OperatorCodeT(), schema.OperatorT()
        number = getattr(schema.BuiltinOperator, kind, schema.BuiltinOperator.CUSTOM)
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, number, 1
        code.customCode = kind.encode() if number == schema.BuiltinOperator.CUSTOM else None
        model.operatorCodes.append(code)
        operator.opcodeIndex = len(model.operatorCodes) - 1
        operator.inputs = [names.index(read), *([len(names)] if kind == "CONV_2D" else [])]
        operator.outputs = [names.index(written)]
        graph.operators.append(operator)
    graph.inputs, graph.outputs = [0], [len(names) - 1]
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


CHAIN = [("CONV_2D", "in", "a"), ("LOGISTIC", "a", "b"), ("ELU", "b", "c")]
#: What the stand-in leaves of it: LOGISTIC is on the CPU, too, against the published rules.
COMPILED = [("edgetpu-custom-op", "in", "a"), ("LOGISTIC", "a", "b"), ("ELU", "b", "c")]


def artifact(path: Path) -> Artifact:
    return Artifact(path, "litert", "w8a8", Signature((), ()), path.stat().st_size, "0", (), {"torch": "2"}, ())


def figures(result: Compiled) -> dict[str, float]:
    return {m.name: m.value for m in result.measurements}


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An otherwise empty PATH, whatever this machine has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(folder: Path, script: str) -> None:
    program = folder / "edgetpu_compiler"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def stand_in(tmp_path: Path, folder: Path) -> Path:
    """A compiler that checks its arguments, copies a prepared file and prints a report."""
    made = write(tmp_path / "made.tflite", COMPILED)
    (tmp_path / "report").write_text(REPORT)
    install(
        folder,
        f"""[ "$1" = --show_operations ] && [ "$4" = --out_dir ] || exit 9
        while IFS= read -r line; do printf '%s\\n' "$line"; done < {tmp_path}/report
        /bin/cp {made} "$5/model_edgetpu.tflite"
        printf 'Edge TPU Compiler version 16.0.384591198\\n' > "$5/model_edgetpu.log" """,
    )
    return made


def test_without_the_compiler_the_file_stays_and_everything_is_predicted(tmp_path: Path) -> None:
    given = artifact(write(tmp_path / "model.tflite", CHAIN))
    accelerator = load_accelerator("litert", "edge-tpu")
    assert isinstance(accelerator, EdgeTpuAccelerator)
    assert accelerator.unavailable() is None
    result = accelerator.compile(given, NPU, tmp_path / "out")
    assert result.artifact is given
    assert result.placement.predicted
    assert result.placement.told_by == "published operator rules"
    assert [op.on for op in result.placement.ops] == ["accelerator", "accelerator", "cpu"]
    (how,) = [f for f in result.findings if f.code == "edge-tpu-not-compiled"]
    assert "edgetpu-compiler" in how.message
    assert not (tmp_path / "out").exists()


def test_estimates_are_labelled_and_have_a_spread(tmp_path: Path) -> None:
    given = artifact(write(tmp_path / "model.tflite", CHAIN))
    result = EdgeTpuAccelerator().compile(given, NPU, tmp_path / "out")
    assert {m.provenance for m in result.measurements} == {"estimated"}
    assert {m.subject for m in result.measurements} == {SUBJECT}
    told = figures(result)
    assert told["macs"] == 16 * 16 * 8 * 9 * 8
    assert told["onchip_bytes"] == 64 * (72 + 10)
    assert told["offchip_bytes"] == 0
    assert told["transfer_bytes"] == 2 * 16 * 16 * 8  # the input, and what ELU reads on the CPU
    latency = result.measurements[0]
    assert latency.name == "latency_ms"
    assert latency.spread is not None
    assert latency.spread[0] < latency.value < latency.spread[1]
    spent = sum(op.ms or 0 for op in result.placement.ops)
    assert latency.value == pytest.approx(spent + 16 * 16 * 8 / 2**20 * (8.7 + 11.49))


def test_the_link_and_the_size_of_the_cache_matter(tmp_path: Path) -> None:
    given = artifact(write(tmp_path / "model.tflite", CHAIN[:2], channels=1024))  # 9 MiB of weights
    times = {
        link: figures(EdgeTpuAccelerator().compile(given, EdgeTpu(8 * 2**20, link), tmp_path))
        for link in ("usb2", "usb3", "pcie")
    }
    assert times["usb2"]["latency_ms"] > times["usb3"]["latency_ms"]
    assert times["pcie"]["latency_ms"] != times["usb3"]["latency_ms"]
    assert times["usb3"]["onchip_bytes"] == 0
    assert times["usb3"]["offchip_bytes"] == 1024 * (9 * 1024 + 10)
    cached = figures(EdgeTpuAccelerator().compile(given, EdgeTpu(16 * 2**20, "usb3"), tmp_path))
    assert cached["offchip_bytes"] == 0
    assert cached["latency_ms"] < times["usb3"]["latency_ms"]


def test_other_accelerators_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vgf is not an Edge TPU"):
        EdgeTpuAccelerator().compile(artifact(write(tmp_path / "model.tflite", CHAIN)), Vgf(), tmp_path)


def test_large_activations_and_a_free_batch_are_pointed_out(tmp_path: Path) -> None:
    given = artifact(write(tmp_path / "model.tflite", CHAIN))
    codes = {f.code for f in EdgeTpuAccelerator().compile(given, EdgeTpu(1024, "pcie"), tmp_path).findings}
    assert "edge-tpu-large-activations" in codes
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(given.path.read_bytes(), 0))
    model.subgraphs[0].tensors[0].shapeSignature = [-1, 16, 16, 8]
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    given.path.write_bytes(bytes(builder.Output()))
    result = EdgeTpuAccelerator().compile(given, NPU, tmp_path)
    assert "edge-tpu-dynamic-batch" in {f.code for f in result.findings}
    assert result.placement.ops[0].on == "accelerator"


def test_the_compilers_word_replaces_the_prediction(tmp_path: Path, no_compiler: Path) -> None:
    made = stand_in(tmp_path, no_compiler)
    given = artifact(write(tmp_path / "model.tflite", CHAIN))
    result = EdgeTpuAccelerator().compile(given, NPU, tmp_path / "out")
    shipped = result.artifact
    assert shipped.path == tmp_path / "out/model_edgetpu.tflite"
    assert shipped.path.read_bytes() == made.read_bytes()
    assert (shipped.emulation, shipped.size_bytes) == (given.path, made.stat().st_size)
    assert shipped.sha256 != given.sha256
    assert shipped.tools == {"torch": "2", "edgetpu_compiler": "16.0.384591198"}
    assert shipped.history[-1].config == {"compiler": "16.0.384591198"}
    placement = result.placement
    assert (placement.predicted, placement.told_by) == (False, "edgetpu_compiler 16.0.384591198")
    assert [op.on for op in placement.ops] == ["accelerator", "cpu", "cpu"]
    assert str(placement.ops[1].reason).endswith("unspecified limitation")
    assert placement.ops[2].reason == "Operation not supported"
    assert placement.ops[2].fix is not None
    (difference,) = [f for f in result.findings if f.code == "edge-tpu-prediction"]
    assert (difference.where, "1 on the CPU" in difference.message) == ("LOGISTIC", True)
    told = figures(result)
    assert told["onchip_bytes"] == pytest.approx(6.03 * 2**20, abs=1)
    assert told["offchip_bytes"] == pytest.approx(49.62 * 1024, abs=1)


def test_compiling_twice_gives_the_same(tmp_path: Path, no_compiler: Path) -> None:
    stand_in(tmp_path, no_compiler)
    given = artifact(write(tmp_path / "model.tflite", CHAIN))
    first = EdgeTpuAccelerator().compile(given, NPU, tmp_path / "out")
    assert EdgeTpuAccelerator().compile(given, NPU, tmp_path / "out") == first


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'Internal compiler error. Aborting!' >&2; exit 1", "Internal compiler error. Aborting!"),
        (
            "echo \"ERROR: Didn't find op for builtin opcode 'CONV_2D' version '6'\"; echo 'Failed.'; exit 1",
            "Didn't find op for builtin opcode 'CONV_2D' version '6'",
        ),
        ("exit 0", "no message"),
        (': > "$5/model_edgetpu.tflite"; echo done', "done"),
    ],
)
def test_a_refusal_is_one_line(tmp_path: Path, no_compiler: Path, script: str, told: str) -> None:
    install(no_compiler, script)
    given = artifact(write(tmp_path / "model.tflite", CHAIN))
    with pytest.raises(ConversionError) as error:
        EdgeTpuAccelerator().compile(given, NPU, tmp_path / "out")
    assert told in error.value.line()
    assert "model.tflite" in error.value.line()


def test_a_compiler_that_is_no_program_is_told(tmp_path: Path, no_compiler: Path) -> None:
    (no_compiler / "edgetpu_compiler").write_bytes(b"\x7fELF broken")
    (no_compiler / "edgetpu_compiler").chmod(0o755)
    given = artifact(write(tmp_path / "model.tflite", CHAIN))
    with pytest.raises(ConversionError, match="can't be started"):
        EdgeTpuAccelerator().compile(given, NPU, tmp_path / "out")


def test_a_compiler_that_does_not_end_is_stopped(
    tmp_path: Path, no_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(no_compiler, "exec /bin/sleep 60")
    monkeypatch.setattr(compiler, "_TIMEOUT_S", 0)
    monkeypatch.setattr(compiler, "_GRACE_S", 0.2)
    given = artifact(write(tmp_path / "model.tflite", CHAIN))
    with pytest.raises(ConversionError, match="did not end"):
        EdgeTpuAccelerator().compile(given, NPU, tmp_path / "out")


def test_reports_are_read_once_where_output_and_log_repeat_the_table() -> None:
    report = compiler.parse(REPORT + REPORT)
    assert report.version == "16.0.384591198"
    assert report.statuses["CONV_2D", "Mapped to Edge TPU"] == 1
    assert sum(report.statuses.values()) == 3
    empty = compiler.parse("")
    assert (empty.version, empty.onchip_bytes, sum(empty.statuses.values())) == ("unknown", None, 0)


def test_the_cache_is_filled_in_order() -> None:
    layer = Work("dense", 1, 1024, 1, 1024, 1024, 1024)  # 1 MiB and 10 KiB
    kept = parameters.place([(n, layer) for n in range(9)], Activations(0, 0), 8 * 2**20)
    assert kept.streamed == {7, 8}
    assert kept.onchip_bytes + kept.offchip_bytes == 9 * parameters.parameter_bytes(layer)
    crowded = parameters.place([(n, layer) for n in range(9)], Activations(3 * 2**20, 3 * 2**20), 8 * 2**20)
    assert len(crowded.streamed) == 5


def test_large_maps_at_the_start_are_tiled_but_a_decoder_keeps_them_whole() -> None:
    mebi = 2**20
    assert Activations(9 * mebi, 0).reserved_bytes == pytest.approx(3.4 * mebi, abs=1)
    assert Activations(9 * mebi, 0, depthwise=True).reserved_bytes < mebi
    assert Activations(9 * mebi, 5 * mebi, depthwise=True).reserved_bytes > 5 * mebi
    assert Activations(0, 0).reserved_bytes == pytest.approx(0.3 * mebi, abs=1)


def test_computing_hides_half_of_the_streaming_and_large_inputs_come_in_parts() -> None:
    rates = RATES["usb3"]
    assert total(Load(4.0, 0.0, 1.0, 0, 0), rates).ms == pytest.approx(5.0)
    assert total(Load(4.0, 10.0, 0.0, 0, 0), rates).ms == total(Load(10.0, 4.0, 0.0, 0, 0), rates).ms == 12.0
    quarter = total(Load(0.0, 0.0, 0.0, 2**18, 0), rates).ms
    assert quarter == pytest.approx(rates.upload / 4)
    assert total(Load(0.0, 0.0, 0.0, 2**20, 0), rates).ms == pytest.approx(quarter + 0.75 * rates.streaming)
    assert total(Load(0.0, 0.0, 0.0, 0, 2**20), rates).ms == pytest.approx(rates.download)


def test_idle_lanes_cost_time_but_no_macs() -> None:
    narrow = Work("dense", 100, 65, 9, 65, 0, 0)
    wide = Work("dense", 100, 65, 9, 128, 0, 0)
    assert narrow.padded_macs == wide.padded_macs == 100 * 65 * 9 * 128
    assert narrow.macs == 100 * 65 * 9 * 65
    image = Work("dense", 100, 32, 9, 3, 0, 0)  # the taps of a shallow kernel share the lanes
    assert image.padded_macs == 100 * 32 * 64
