"""Work of .onnx files against counts done by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.errors import UsageError
from edgeopt.prediction.count import count


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    given: tuple[str, list[int | str]],
    made: tuple[str, list[int | str] | None],
    constants: dict[str, np.ndarray],
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(given[0], TensorProto.FLOAT, given[1])],
        [helper.make_tensor_value_info(made[0], TensorProto.FLOAT, made[1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def test_float_operators_and_what_is_fused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="stem/Conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["a"], ["b"], name="stem/Relu"),
        helper.make_node("Conv", ["b", "d"], ["c"], name="dw/Conv", group=16, pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "g"], ["y"], name="head", transB=1),
    ]
    constants = {"w": zeros(16, 3, 3, 3), "d": zeros(16, 1, 3, 3), "g": zeros(10, 16)}
    work = count(save(tmp_path / "m.onnx", nodes, ("x", ["n", 3, 8, 8]), ("y", None), constants), "onnx")
    assert work.assumed == ("x: 1x3x8x8",)
    assert [(op.type, op.kind, op.macs) for op in work.ops] == [
        ("Conv", "conv", 4 * 4 * 16 * 27),
        ("Conv", "depthwise", 4 * 4 * 16 * 9),
        ("GlobalAveragePool", "pool", 4 * 4 * 16),
        ("Flatten", "free", 0),
        ("Gemm", "matmul", 160),
    ]
    assert (work.ops[0].name, work.ops[0].channels, work.ops[0].weight_bytes) == ("stem/Conv", 16, 16 * 27 * 4)


def test_conversions_around_integer_kernels_are_part_of_them(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="in"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["xd"], name="in/DQ"),
        helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["wd"], name="w/DQ"),
        helper.make_node("Conv", ["xd", "wd"], ["a"], name="conv"),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["aq"], name="out/Q"),
        helper.make_node("DequantizeLinear", ["aq", "s", "z"], ["y"], name="out/DQ"),
    ]
    constants = {
        "s": np.float32(0.1), "z": np.uint8(0), "wz": np.int8(0), "w": zeros(8, 4, 1, 1, dtype=np.int8),
    }  # fmt: skip
    work = count(save(tmp_path / "m.onnx", nodes, ("x", [1, 4, 6, 6]), ("y", [1, 8, 6, 6]), constants), "onnx")
    assert [op.name for op in work.ops] == ["in", "conv", "out/DQ"]
    conv = work.ops[1]
    assert (conv.arithmetic, conv.macs, conv.weight_bytes) == ("int8", 36 * 8 * 4, 32)
    assert conv.activation_bytes == 36 * (4 + 8)


def test_matrix_products_of_activations(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1], name="t"),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="scores"),
    ]
    work = count(save(tmp_path / "m.onnx", nodes, ("x", [2, 5, 7]), ("y", [2, 5, 5]), {}), "onnx")
    assert [(op.kind, op.macs) for op in work.ops] == [("movement", 0), ("matmul", 2 * 5 * 5 * 7)]


def test_a_shape_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mystery", ["x"], ["a"], name="m", domain="acme"),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="head"),
    ]
    path = save(tmp_path / "m.onnx", nodes, ("x", [1, 4]), ("y", [1, 3]), {"w": zeros(4, 3)})
    with pytest.raises(UsageError, match="operator 'head': the shape of its input can't be told"):
        count(path, "onnx")


def test_operators_of_onnx_runtime_itself(tmp_path: Path) -> None:
    """ONNX's own shape inference stops at each of them."""
    sizes = {"K": 32, "N": 24, "bits": 4, "block_size": 32}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "w", "s"], ["a"], name="a", domain="com.microsoft", **sizes),
        helper.make_node("FastGelu", ["a"], ["b"], name="b", domain="com.microsoft"),
        helper.make_node("MatMulNBits", ["x", "w", "s"], ["c"], "c", domain="com.microsoft", accuracy_level=4, **sizes),
        helper.make_node("MatMul", ["b", "v"], ["y"], name="y"),
    ]
    constants = {"w": zeros(24, 1, 16, dtype=np.uint8), "s": zeros(24), "v": zeros(24, 5)}
    work = count(save(tmp_path / "m.onnx", nodes, ("x", [1, 7, 32]), ("y", None), constants), "onnx")
    assert [(op.name, op.kind, op.arithmetic, op.macs) for op in work.ops] == [
        ("a", "matmul", "fp32", 7 * 32 * 24),
        ("b", "transcendental", "fp32", 0),
        ("c", "matmul", "int8", 7 * 32 * 24),
        ("y", "matmul", "fp32", 7 * 24 * 5),
    ]
    assert work.ops[0].weight_bytes == 24 * 16 + 24 * 4


def test_loops_are_not_counted(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])],
        "b",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1])],
    )
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
    work = count(save(tmp_path / "m.onnx", nodes, ("x", [1]), ("y", [1]), {"c": np.array(True)}), "onnx")
    assert "as it runs (If)" in (work.unsupported or "")


@pytest.mark.parametrize("name", [b"Relu", b"hidden"])
def test_names_that_are_not_text(tmp_path: Path, name: bytes) -> None:
    """Protobuf gives those as bytes; two of them broke the list of unknown operators."""
    relu, neg = helper.make_node("Relu", ["x"], ["hidden"]), helper.make_node("Neg", ["hidden"], ["y"])
    path = save(tmp_path / "m.onnx", [relu, neg], ("x", [4]), ("y", [4]), {})
    path.write_bytes(path.read_bytes().replace(name, b"\xff" * len(name)))
    with pytest.raises(UsageError, match=r"m\.onnx: is damaged: names in it are not text"):
        count(path, "onnx")
