"""What is said of Qualcomm's HTP without the vendor's library: names, reasons, refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from edgeopt.accelerators import hexagon, hexagon_sdk
from edgeopt.accelerators.hexagon import HexagonAccelerator
from edgeopt.accelerators.hexagon_sdk import ExecuTorchHexagonAccelerator, LiteRTHexagonAccelerator
from edgeopt.errors import ConversionError, MissingError
from edgeopt.exporter.executorch_hexagon import HexagonExporter
from edgeopt.formats.onnx import read_signature
from edgeopt.types import Artifact, Hexagon, LayerRules, Npu, Scheme

PHONE = Hexagon("v75", 57, 8)
LOG = (
    "2026 [V:onnxruntime:, qnn.cc:1 LogNodeSupport] Validation FAILED for 3 nodes in OrtNodeUnit (MatMul) :\n"
    "\tOperator type: DequantizeLinear Node name: a_dq Node index: 1\n"
    "\tOperator type: MatMul Node name: attn/MatMul_token_4 Node index: 2\n"
    "\tOperator type: QuantizeLinear Node name: y_q Node index: 3\n"
    "\tREASON : Failed to add fused Matmul node.\n\n"
    "Validation PASSED for 1 nodes in OrtNodeUnit (Conv) :\n"
    "Validation FAILED for 1 nodes in OrtNodeUnit (Erf) :\n"
    "\tOperator type: Erf Node name: act/Erf Node index: 5\n"
    "\tREASON : Operators of type `Erf` are not supported by QNN EP.Erf node `act/Erf` will not be assigned.\n"
)


def network(*names: str) -> onnx.ModelProto:
    kinds = [("Relu", "x", "a"), ("MatMul", "a", "b"), ("Erf", "b", "c"), ("Sigmoid", "c", "y")]
    nodes = [
        helper.make_node(kind, [i, "w"] if kind == "MatMul" else [i], [o], name=name)
        for (kind, i, o), name in zip(kinds, names, strict=True)
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in ("x", "y")]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0, 0.0, 0.0, 1.0])
    made = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def artifact(folder: Path, proto: onnx.ModelProto) -> Artifact:
    path = folder / "model.onnx"
    onnx.save(proto, str(path))
    return Artifact(path, "onnx", "w8a8", read_signature(proto), 1, "0" * 64, (), {}, ())


def pretend(monkeypatch: pytest.MonkeyPatch, process: type) -> None:
    monkeypatch.setattr(hexagon, "missing", lambda: None)
    monkeypatch.setattr(hexagon, "version", lambda _: "2.7.0")
    monkeypatch.setattr(hexagon, "HtpProcess", process)


class Partitioned:
    assignment = (
        ("QNNExecutionProvider", "stem/Relu", "Relu"),
        ("CPUExecutionProvider", "attn/MatMul_token_4", "MatMul"),
        ("CPUExecutionProvider", "act/Erf", "Erf"),
        ("CPUExecutionProvider", "y_q", "QuantizeLinear"),
        ("CPUExecutionProvider", "head/Sigmoid", "Sigmoid"),
    )

    def __init__(self, path: Path, npu: Npu, session: dict[str, str], verbose: bool) -> None:
        assert verbose
        assert npu == PHONE
        assert path.is_file()
        Path(session["ep.context_file_path"]).write_bytes(b"context")

    def log(self) -> str:
        return LOG

    def close(self) -> None: ...


def test_every_operator_of_the_file_is_placed_with_layer_and_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, Partitioned)
    file = artifact(tmp_path, network("stem/Relu", "attn/MatMul", "act/Erf", "head/Sigmoid"))
    compiled = HexagonAccelerator().compile(file, PHONE, tmp_path)
    found = [(op.layer, op.type, op.on, op.reason) for op in compiled.placement.ops]
    assert found == [
        ("stem", "Relu", "accelerator", None),
        ("attn", "MatMul", "cpu", "HTP has no kernel for it with these types and sizes"),
        ("act", "Erf", "cpu", "QNN has no such operator"),
        ("head", "Sigmoid", "cpu", "its neighbours are on the CPU"),
    ]
    assert compiled.placement.accelerator == "Hexagon v75"
    assert not compiled.placement.predicted
    assert compiled.measurements == (), "an emulator's times and cycles are no device's"
    assert [path.name for path in compiled.extra_files] == ["model_qnn_ctx.onnx"]
    assert compiled.artifact is file


def test_nodes_without_names_get_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seeing(Partitioned):
        assignment = (("CPUExecutionProvider", "Erf_2", "Erf"),)

        def __init__(self, path: Path, npu: Npu, session: dict[str, str], verbose: bool) -> None:
            super().__init__(path, npu, session, verbose)
            assert [n.name for n in onnx.load(str(path)).graph.node] == ["Relu_0", "MatMul_1", "Erf_2", "Sigmoid_3"]

    pretend(monkeypatch, Seeing)
    compiled = HexagonAccelerator().compile(artifact(tmp_path, network("", "", "", "")), PHONE, tmp_path)
    assert [op.type for op in compiled.placement.on_cpu] == ["Erf"]


def test_a_refused_graph_names_operator_and_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConversionError("QNN refuses the file: Node 'attn/MatMul_token_1' OpType:MatMul was not selected")

    monkeypatch.setattr(hexagon, "missing", lambda: None)
    monkeypatch.setattr(hexagon, "HtpProcess", refuse)
    file = artifact(tmp_path, network("stem/Relu", "attn/MatMul", "act/Erf", "head/Sigmoid"))
    with pytest.raises(ConversionError, match=r"layer 'attn': HTP takes no graph with this MatMul"):
        HexagonAccelerator().compile(file, PHONE, tmp_path)


def test_what_is_missing_is_told_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hexagon, "missing", lambda: "the package onnxruntime-qnn is not installed")
    file = artifact(tmp_path, network("a", "b", "c", "d"))
    with pytest.raises(MissingError, match="onnxruntime-qnn"):
        HexagonAccelerator().compile(file, PHONE, tmp_path)
    assert HexagonAccelerator().unavailable() is not None


def test_executorch_route_needs_the_sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    told = ExecuTorchHexagonAccelerator().unavailable() or ""
    assert "QNN_SDK_ROOT is not set" in told or "no Qualcomm backend" in told
    monkeypatch.setattr(hexagon_sdk, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    assert "has no lib/x86_64-linux-clang/libQnnHtp.so" in (ExecuTorchHexagonAccelerator().unavailable() or "")
    library = tmp_path / "lib" / "x86_64-linux-clang" / "libQnnHtp.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert ExecuTorchHexagonAccelerator().unavailable() is None


def test_executorch_route_takes_one_scheme() -> None:
    exporter = HexagonExporter()
    assert exporter.unsupported(Scheme("w8a8", "static"), LayerRules()) is None
    assert exporter.unsupported(Scheme("w8a16", "static"), LayerRules()) is not None
    assert exporter.unsupported(Scheme("w8a8", "static"), LayerRules(("head",))) is not None


def test_litert_route_needs_the_sdk_and_a_chip_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = tmp_path / "litert" / "vendors" / "qualcomm" / "compiler" / "libLiteRtCompilerPlugin_Qualcomm.so"
    plugin.parent.mkdir(parents=True)
    plugin.touch()
    places = {"ai_edge_litert": str(tmp_path / "litert")}

    def find(name: str) -> SimpleNamespace | None:
        return SimpleNamespace(submodule_search_locations=[places[name]]) if name in places else None

    monkeypatch.setattr(hexagon_sdk, "find_spec", find)
    accelerator = LiteRTHexagonAccelerator()
    assert "ai-edge-litert-sdk-qualcomm" in (accelerator.unavailable() or "")
    sdk = tmp_path / "sdk" / "lib"
    sdk.mkdir(parents=True)
    places["ai_edge_litert_sdk_qualcomm"] = str(sdk.parent)
    assert accelerator.unavailable() is not None, "the package without its libraries is not enough"
    (sdk / "libQnnHtp.so").touch()
    assert accelerator.unavailable() is None
    with pytest.raises(ConversionError, match="LiteRT compiles for none but SM8350"):
        accelerator.compile(artifact(tmp_path, network("a", "b", "c", "d")), Hexagon("v68", 93, 2), tmp_path)
    plugin.unlink()
    assert "no compiler plugin" in (accelerator.unavailable() or "")
