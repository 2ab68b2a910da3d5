"""What OpenVINO says of a file: placement, float kernels under int8 ones, devices that are not here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgeopt.accelerators import load_accelerator
from edgeopt.accelerators.openvino import OpenVinoAccelerator
from edgeopt.errors import ConversionError
from edgeopt.exporter.base import make_artifact
from edgeopt.formats.onnx import summarize
from edgeopt.types import Artifact, OpenVino, Vulkan

pytest.importorskip("openvino", reason="needs openvino")


def artifact_of(path: Path) -> Artifact:
    return make_artifact(
        path, format_="onnx", precision="w8a8", signature=summarize(path).signature, history=(), tools=()
    )


def constant(name: str, value: object, dtype: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def quantized(path: Path, after: str) -> Path:
    """QDQ -> Conv 3x3 with int8 weights per channel -> QDQ -> `after` -> QDQ."""
    rng = np.random.default_rng(0)
    scales = {"s": constant("s", 0.05, "float32"), "z": constant("z", 128, "uint8")}
    weights = [
        constant("w_q", rng.integers(-127, 128, (16, 16, 3, 3)), "int8"),
        constant("w_s", np.full(16, 0.002), "float32"),
        constant("w_z", np.zeros(16), "int8"),
    ]

    def pair(source: str, name: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("QuantizeLinear", [source, "s", "z"], [f"{name}_q"], name=f"{name}/quantize"),
            helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_dq"], name=f"{name}/dequantize"),
        ]

    nodes = [
        *pair("x", "x"),
        helper.make_node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w"], name="w/dequantize", axis=0),
        helper.make_node("Conv", ["x_dq", "w"], ["h"], name="stem.0/Conv", pads=[1, 1, 1, 1]),
        *pair("h", "h"),
        helper.make_node(after, ["h_dq"], ["a"], name=f"stem.1/{after}"),
        *pair("a", "y"),
    ]
    nodes[-1].output[0] = "y"
    image = helper.make_tensor_value_info("x", 1, [1, 16, 8, 8])
    out = helper.make_tensor_value_info("y", 1, [1, 16, 8, 8])
    graph = helper.make_graph(nodes, "g", [image], [out], [*scales.values(), *weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def test_operators_with_layers_and_without_conversions(tmp_path: Path) -> None:
    artifact = artifact_of(quantized(tmp_path / "m.onnx", "Relu"))
    compiled = load_accelerator("onnx", "openvino").compile(artifact, OpenVino(("CPU",)), tmp_path)
    placement = compiled.placement
    assert [(op.type, op.layer, op.on) for op in placement.ops] == [
        ("Conv", "stem.0", "accelerator"),
        ("Relu", "stem.1", "accelerator"),
    ]
    assert placement.accelerator == "OpenVINO CPU"
    assert placement.told_by.startswith("openvino 20")
    assert not placement.predicted
    assert compiled.findings == ()
    assert compiled.artifact == artifact


def test_float_kernels_between_quantized_tensors_are_named(tmp_path: Path) -> None:
    artifact = artifact_of(quantized(tmp_path / "m.onnx", "Erf"))
    compiled = OpenVinoAccelerator().compile(artifact, OpenVino(("CPU",)), tmp_path)
    named = {op.name for op in compiled.artifact.unquantized_ops}
    # Whether an elementwise kernel reads int8 itself depends on the machine; the convolution is int8 on all.
    assert named <= {"stem.1/Erf"}
    assert [f.code for f in compiled.findings] == ["float-operators"] * bool(named)


def test_devices_that_are_not_here_are_said_to_be_unknown(tmp_path: Path) -> None:
    import openvino

    if {"NPU", "GPU"} & {name.partition(".")[0] for name in openvino.Core().available_devices}:
        pytest.skip("this machine has an NPU or a GPU that OpenVINO drives")
    artifact = artifact_of(quantized(tmp_path / "m.onnx", "Relu"))
    compiled = OpenVinoAccelerator().compile(artifact, OpenVino(("NPU", "GPU", "CPU")), tmp_path)
    assert compiled.placement.accelerator == "OpenVINO CPU"
    assert [(f.code, f.where) for f in compiled.findings] == [("not-executed", "NPU"), ("not-executed", "GPU")]
    assert "not known here" in compiled.findings[0].message


def test_own_form_computes_the_same_and_has_the_same_bytes(tmp_path: Path) -> None:
    import openvino

    path = quantized(tmp_path / "m.onnx", "Relu")
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        compiled = OpenVinoAccelerator().compile(artifact_of(path), OpenVino(("CPU",)), tmp_path / name)
        assert [file.name for file in compiled.extra_files] == ["m.xml", "m.bin"]
        contents.append([file.read_bytes() for file in compiled.extra_files])
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in contents[0][0]
    x = np.random.default_rng(1).standard_normal((1, 16, 8, 8)).astype(np.float32)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    results = [
        openvino.Core().compile_model(str(file), "CPU", settings)({"x": x})["y"]
        for file in (path, tmp_path / "one" / "m.xml")
    ]
    assert (results[0] == results[1]).all()


def test_a_file_that_openvino_does_not_know(tmp_path: Path) -> None:
    node = helper.make_node("Twist", ["a"], ["b"], name="layer.1/Twist", domain="com.example")
    tensors = [helper.make_tensor_value_info(name, 1, [2]) for name in ("a", "b")]
    graph = helper.make_graph([node], "g", tensors[:1], tensors[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    with pytest.raises(ConversionError, match="Twist"):
        OpenVinoAccelerator().compile(artifact_of(path), OpenVino(("CPU",)), tmp_path)


def test_another_accelerator(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vulkan"):
        OpenVinoAccelerator().compile(artifact_of(quantized(tmp_path / "m.onnx", "Relu")), Vulkan(), tmp_path)
