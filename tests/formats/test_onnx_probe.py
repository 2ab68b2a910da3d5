"""Instrumented .onnx files: the same answers, and inner tensors beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.errors import UsageError
from edgeopt.formats import summarize
from edgeopt.formats.probe import Probed, add_probes
from edgeopt.runtimes.onnxruntime import OnnxRuntime
from edgeopt.types import Array, QuantParams

RANDOM = np.random.default_rng(0)
W1, B1 = RANDOM.standard_normal((8, 3, 3, 3), np.float32), RANDOM.standard_normal(8, np.float32)
W2, B2 = RANDOM.standard_normal((6, 8, 1, 1), np.float32), RANDOM.standard_normal(6, np.float32)
IMAGE = RANDOM.standard_normal((1, 3, 8, 8), np.float32)


def save(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, Array], shape: list[int]) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def float_net(path: Path) -> Path:
    """conv -> relu -> head/conv, and y."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], name="stem.conv/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"], name="stem.act/Relu"),
        helper.make_node("Conv", ["r", "w2", "b2"], ["y"], name="head/Conv"),
    ]
    return save(path, nodes, {"w1": W1, "b1": B1, "w2": W2, "b2": B2}, [1, 3, 8, 8])


def qdq_net(path: Path, out: str = "y") -> Path:
    """The same in int8: QuantizeLinear/DequantizeLinear around both convolutions, the Relu done by saturation."""
    nodes, constants = [], {"z0": np.uint8(0), "z128": np.uint8(128), "zw": np.int8(0)}

    def quantize(name: str, scale: float, zero: str) -> str:
        constants[f"{name}_s"] = np.float32(scale)
        nodes.append(helper.make_node("QuantizeLinear", [name, f"{name}_s", zero], [f"{name}_q"]))
        result = out if name == "c" else f"{name}_dq"
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s", zero], [result]))
        return result

    def conv(data: str, weight: Array, bias: Array, scale_in: float, name: str, result: str, pad: int) -> None:
        scale = np.float32(np.abs(weight).max() / 127)
        constants[f"{result}_w"] = np.rint(weight / scale).astype(np.int8)
        constants[f"{result}_ws"] = scale
        constants[f"{result}_b"] = np.rint(bias / (scale * np.float32(scale_in))).astype(np.int32)
        constants[f"{result}_bs"] = np.float32(scale * np.float32(scale_in))
        constants[f"{result}_bz"] = np.int32(0)
        for part, zero in (("w", "zw"), ("b", f"{result}_bz")):
            inputs = [f"{result}_{part}", f"{result}_{part}s", zero]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{result}_{part}d"]))
        inputs = [data, f"{result}_wd", f"{result}_bd"]
        nodes.append(helper.make_node("Conv", inputs, [result], name=name, pads=[pad] * 4))

    conv(quantize("x", 0.03, "z128"), W1, B1, 0.03, "stem.conv/Conv", "a", 1)
    conv(quantize("a", 0.1, "z0"), W2, B2, 0.1, "head/Conv", "c", 0)
    quantize("c", 0.4, "z128")
    return save(path, nodes, constants, [1, 3, 8, 8])


def probe(path: Path) -> Probed:
    return add_probes(path, summarize(path).signature, path.with_name("probed.onnx"))


def run(probed: Probed, values: Array) -> dict[str, Array]:
    with OnnxRuntime().open(probed.path, probed.signature) as session:
        return session.run({"x": values})


def answers(path: Path, values: Array) -> Array:
    with OnnxRuntime().open(path, summarize(path).signature) as session:
        return session.run({"x": values})["y"]


def kernels(path: Path) -> list[str]:
    """What ONNX Runtime makes of a file, transpositions for the kernels' own layout apart."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath)
    return sorted(node.op_type for node in optimized.graph.node if node.op_type != "Transpose")


def test_float_layers_are_seen_after_their_activation(tmp_path: Path) -> None:
    probed = probe(float_net(tmp_path / "m.onnx"))
    assert [(p.layer, p.type, p.tensor.native_name, p.inputs) for p in probed.points] == [
        ("stem.conv", "Conv", "r", ()),
        ("head", "Conv", "y", (0,)),
    ]
    assert [t.name for t in probed.signature.outputs] == ["y", "probe:0", "probe:1"]
    outputs = run(probed, IMAGE)
    assert outputs["probe:0"].min() == 0
    np.testing.assert_array_equal(outputs["probe:1"], outputs["y"])


def test_int8_layers_are_seen_as_the_integers_that_leave_the_kernel(tmp_path: Path) -> None:
    path = qdq_net(tmp_path / "m.onnx")
    probed = probe(path)
    first, second = probed.points
    assert (first.layer, first.tensor.native_name, first.tensor.dtype) == ("stem.conv", "a_q", "uint8")
    assert first.tensor.quantization == QuantParams((float(np.float32(0.1)),), (0,))
    assert (second.layer, second.inputs) == ("head", (0,))
    outputs = run(probed, IMAGE)
    np.testing.assert_array_equal(outputs["y"], answers(path, IMAGE))
    assert outputs["probe:0"].dtype == np.float32
    np.testing.assert_array_equal(outputs["probe:1"], outputs["y"])


def test_probes_do_not_change_the_kernels(tmp_path: Path) -> None:
    path = qdq_net(tmp_path / "m.onnx")
    assert kernels(probe(path).path) == kernels(path)
    assert "QLinearConv" in kernels(path)


def test_integers_are_taken_behind_moves_that_onnx_runtime_pulls_the_quantizer_through(tmp_path: Path) -> None:
    weight = RANDOM.integers(-127, 127, (6, 4)).astype(np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["m"], name="query/MatMul"),
        helper.make_node("Transpose", ["m"], ["t"], name="Transpose", perm=[0, 2, 1]),
        helper.make_node("QuantizeLinear", ["t", "s", "z"], ["tq"]),
        helper.make_node("DequantizeLinear", ["tq", "s", "z"], ["y"]),
    ]
    constants = {"s": np.float32(0.05), "z": np.uint8(128), "w": weight, "ws": np.float32(0.01), "wz": np.int8(0)}
    path = save(tmp_path / "m.onnx", nodes, constants, [1, 5, 6])
    probed = probe(path)
    assert [p.tensor.native_name for p in probed.points] == ["tq"]
    assert kernels(probed.path) == kernels(path)


def test_sixteen_bit_activations_leave_as_reals(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], name="conv/Conv"),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["aq"], domain="com.microsoft"),
        helper.make_node("DequantizeLinear", ["aq", "s", "z"], ["y"], domain="com.microsoft"),
    ]
    constants = {"w1": W1, "b1": B1, "s": np.float32(0.001), "z": np.uint16(32768)}
    path = save(tmp_path / "m.onnx", nodes, constants, [1, 3, 8, 8])
    proto = onnx.load(path)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(proto, path)
    (point,) = probe(path).points
    assert (point.tensor.native_name, point.tensor.dtype, point.tensor.quantization) == ("y", "float32", None)


def test_dynamically_quantized_products_are_seen_as_reals(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("Mul", ["xs", "ws"], ["scale"], name="fc/MatMul_quant_scales_mul"),
        helper.make_node("MatMulInteger", ["xq", "w", "xz"], ["i"], name="fc/MatMul_quant"),
        helper.make_node("Cast", ["i"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["c", "scale"], ["p"], name="fc/MatMul_quant_output_scale_mul"),
        helper.make_node("Add", ["p", "b"], ["y"], name="fc/MatMul_bias"),
    ]
    constants = {
        "w": RANDOM.integers(-127, 127, (6, 4)).astype(np.int8),
        "ws": np.float32(0.01),
        "b": np.zeros(4, np.float32),
    }
    path = save(tmp_path / "m.onnx", nodes, constants, [1, 6])
    probed = probe(path)
    assert [(p.layer, p.type, p.tensor.native_name) for p in probed.points] == [("fc", "MatMulInteger", "y")]
    assert kernels(probed.path) == kernels(path)


def test_embeddings_are_kernels_and_lookups_of_shapes_are_not(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="Shape"),
        helper.make_node("Gather", ["shape", "zero"], ["rows"], name="Gather"),
        helper.make_node("Cast", ["x"], ["ids"], name="Cast", to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "ids"], ["y"], name="words/Gather"),
    ]
    constants = {"table": RANDOM.standard_normal((5, 4), np.float32), "zero": np.array(0)}
    path = save(tmp_path / "m.onnx", nodes, constants, [1, 2])
    assert [p.layer for p in probe(path).points] == ["words"]


def test_nodes_without_layers_give_points_without_names(tmp_path: Path) -> None:
    path = float_net(tmp_path / "m.onnx")
    proto = onnx.load(path)
    for i, node in enumerate(proto.graph.node):
        node.name = f"node_{i}"
    onnx.save(proto, path)
    assert [p.layer for p in probe(path).points] == ["", ""]


def test_instrumenting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    path = qdq_net(tmp_path / "m.onnx")
    assert probe(path).path.read_bytes() == probe(path).path.read_bytes()


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = float_net(tmp_path / "m.onnx")
    with pytest.raises(
        UsageError, match=r"is not a model file that can be looked into; give one of .tflite, .onnx, .pte"
    ):
        add_probes(tmp_path / "m.bin", summarize(path).signature, tmp_path / "p.bin")
