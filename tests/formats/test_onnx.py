from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.errors import UsageError
from edgeopt.formats import summarize
from edgeopt.formats.onnx import source_layer
from edgeopt.types import QuantParams


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: object,
    outputs: object,
    constants: dict[str, object],
    opset: int = 18,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
        [helper.make_tensor_value_info(n, t, s) for n, t, s in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), str(path))
    return path


def qdq(path: Path, op: str = "Conv", name: str = "stem.0/Conv") -> Path:
    """uint8 in -> DQ -> op -> Q -> uint8 out, with an int8 weight where the op is a convolution."""
    nodes = [helper.make_node("DequantizeLinear", ["x", "s", "z"], ["xd"], name="in")]
    data = ["xd"]
    constants = {"s": np.float32(0.5), "z": np.uint8(3)}
    if op == "Conv":
        constants |= {"w": np.ones((4, 3, 1, 1), np.int8), "ws": np.ones(4, np.float32), "wz": np.zeros(4, np.int8)}
        nodes.append(helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0, name="w"))
        data.append("wd")
    nodes.append(helper.make_node(op, data, ["y"], name=name))
    nodes.append(helper.make_node("QuantizeLinear", ["y", "s", "z"], ["q"], name="out"))
    return save(path, nodes, [("x", TensorProto.UINT8, ["n", 3, 2, 2])], [("q", TensorProto.UINT8, None)], constants)


def test_qdq_convolution_is_int8_and_owns_its_weight(tmp_path: Path) -> None:
    summary = summarize(qdq(tmp_path / "m.onnx"))
    conv = next(op for op in summary.ops if op.type == "Conv")
    assert (conv.name, conv.dtype, conv.weight_bytes) == ("stem.0/Conv", "int8", 12 + 16 + 4)
    assert [op.type for op in summary.ops] == ["DequantizeLinear", "Conv", "QuantizeLinear"]


@pytest.mark.parametrize(("kind", "dtype"), [(np.uint16, "int16"), (np.int16, "int16"), (np.uint8, "int8")])
def test_the_width_of_quantized_operators(tmp_path: Path, kind: type, dtype: str) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="in"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="out"),
        helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["wd"], name="weight"),
        helper.make_node("MatMul", ["d", "wd"], ["y"], name="fc/MatMul"),
    ]
    constants = {"s": np.float32(1), "z": kind(0), "w": np.ones((4, 4), np.int8), "wz": np.int8(0)}
    values = [[(name, TensorProto.FLOAT, [1, 4])] for name in "xy"]
    path = save(tmp_path / "m.onnx", nodes, *values, constants, opset=21)
    assert [op.dtype for op in summarize(path).ops] == [dtype] * 3


@pytest.mark.parametrize("bits", [4, 8, None])
def test_block_products_compute_with_as_many_bits_as_they_say(tmp_path: Path, bits: int | None) -> None:
    given = {} if bits is None else {"bits": bits}
    node = helper.make_node("MatMulNBits", ["x", "w"], ["y"], domain="com.microsoft", name="fc/MatMulNBits", **given)
    values = [[(name, TensorProto.FLOAT, [1, 4])] for name in "xy"]
    path = save(tmp_path / "m.onnx", [node], *values, {"w": np.ones((4, 1, 16), np.uint8)})
    assert [op.dtype for op in summarize(path).ops] == [f"int{bits or 4}"]


def stored_weight(shared: bool = False) -> list[onnx.NodeProto]:
    """A codebook's weight: codes -> Cast -> GatherElements(table) -> Reshape -> MatMul."""
    return [
        helper.make_node("Cast", ["codes"], ["indices"], to=TensorProto.INT32, name="w/Cast"),
        helper.make_node("GatherElements", ["table", "indices"], ["flat"], axis=1, name="w/GatherElements"),
        helper.make_node("Reshape", ["flat", "shape"], ["w"], name="w/Reshape"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="fc/MatMul"),
        *([helper.make_node("MatMul", ["y", "w"], ["z"], name="again/MatMul")] if shared else []),
    ]


CODES = {"codes": np.zeros((1, 16), np.int8), "table": np.ones((1, 16), np.float32), "shape": np.array([4, 4])}


def test_what_decodes_a_weight_belongs_to_its_reader(tmp_path: Path) -> None:
    values = [[(name, TensorProto.FLOAT, [1, 4])] for name in "xy"]
    summary = summarize(save(tmp_path / "m.onnx", stored_weight(), *values, CODES))
    assert [(op.name, op.dtype, op.weight_bytes) for op in summary.ops] == [("fc/MatMul", "float32", 16 + 64 + 16)]


def test_a_decoded_weight_of_two_readers_belongs_to_neither(tmp_path: Path) -> None:
    values = [[(name, TensorProto.FLOAT, [1, 4])] for name in "xz"]
    summary = summarize(save(tmp_path / "m.onnx", stored_weight(shared=True), *values, CODES))
    assert [(op.name, op.weight_bytes) for op in summary.ops] == [("fc/MatMul", 0), ("again/MatMul", 0)]


def test_arithmetic_on_activations_and_outputs_is_no_decoding(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "c"], ["y"], name="scale/Mul"),
        helper.make_node("Mul", ["c", "c"], ["z"], name="constant/Mul"),
    ]
    outputs = [("y", TensorProto.FLOAT, [4]), ("z", TensorProto.FLOAT, [4])]
    path = save(tmp_path / "m.onnx", nodes, [("x", TensorProto.FLOAT, [4])], outputs, {"c": np.ones(4, np.float32)})
    assert [op.name for op in summarize(path).ops] == ["scale/Mul", "constant/Mul"]


def test_operator_without_int8_kernel_is_float_between_a_pair(tmp_path: Path) -> None:
    summary = summarize(qdq(tmp_path / "m.onnx", "Tanh", "head/Tanh"))
    assert next(op for op in summary.ops if op.type == "Tanh").dtype == "float32"


def test_quantized_signature(tmp_path: Path) -> None:
    signature = summarize(qdq(tmp_path / "m.onnx")).signature
    tensor = signature.inputs[0]
    assert (tensor.dtype, tensor.model_dtype, tensor.shape) == ("uint8", "float32", ("n", 3, 2, 2))
    assert tensor.quantization == QuantParams((0.5,), (3,))
    assert signature.outputs[0].quantization == QuantParams((0.5,), (3,))


def test_integer_signature_without_a_pair_is_not_called_quantized(tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["x"], ["y"], name="")
    path = save(tmp_path / "m.onnx", [node], [("x", TensorProto.INT8, [2])], [("y", TensorProto.INT8, [2])], {})
    tensor = summarize(path).signature.inputs[0]
    assert (tensor.model_dtype, tensor.quantization) == ("int8", None)


def test_integer_operators_and_unnamed_nodes(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMulInteger", ["a", "b"], ["c"]), helper.make_node("MatMulInteger", ["a", "b"], ["d"])]
    path = save(
        tmp_path / "m.onnx",
        nodes,
        [("a", TensorProto.UINT8, [2, 2]), ("b", TensorProto.INT8, [2, 2])],
        [("c", TensorProto.INT32, [2, 2]), ("d", TensorProto.INT32, [2, 2])],
        {},
    )
    assert [(op.name, op.dtype) for op in summarize(path).ops] == [
        ("MatMulInteger", "int8"),
        ("MatMulInteger_1", "int8"),
    ]


def test_comparison_of_reals_computes_no_reals(tmp_path: Path) -> None:
    node = helper.make_node("IsNaN", ["x"], ["y"], name="guard/IsNaN")
    path = save(tmp_path / "m.onnx", [node], [("x", TensorProto.FLOAT, [2])], [("y", TensorProto.BOOL, [2])], {})
    assert summarize(path).ops[0].dtype == "bool"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("features.0.conv/Conv", "features.0.conv"),
        ("/features/features.0/features.0.conv/Conv", "features.0.conv"),
        ("/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        ("Conv_12", ""),
        ("", ""),
    ],
)
def test_layer_from_node_name(name: str, layer: str) -> None:
    assert source_layer(helper.make_node("Conv", ["x"], ["y"], name=name)) == layer


@pytest.mark.parametrize(
    ("value", "layer"),
    [
        ("['', 'stem', 'stem.0', 'conv2d']", "stem.0"),
        ("['_empty_nn_module_stack_from_metadata_hook', 'sym_size']", ""),
        ("['add']", ""),
        ("__import__('os').abort()", "stem"),
    ],
)
def test_layer_from_dynamo_metadata(value: str, layer: str) -> None:
    node = helper.make_node("Conv", ["x"], ["y"], name="stem/Conv")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=value)
    assert source_layer(node) == layer


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not an onnx file at all", b"\x08\x0a\x3a\xff\xff"])
def test_corrupt_file_is_a_usage_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"broken\.onnx"):
        summarize(path)


def test_truncated_file_is_a_usage_error(tmp_path: Path) -> None:
    path = qdq(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UsageError, match="not an ONNX file, or is cut short"):
        summarize(path)
