"""Counting zero weights in exported files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils
from onnx import TensorProto, helper, numpy_helper

from edgeopt.errors import UsageError
from edgeopt.formats.sparsity import FileZeros, TensorZeros, zeros_of

TYPES = schema.TensorType


def _tflite(path: Path, *tensors: tuple[str, int, np.ndarray, tuple[int, ...], list[int], int]) -> Path:
    """Constants only: name, type, stored values, shape, zero points, their axis."""
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, model.operatorCodes, model.subgraphs = 3, [schema.BufferT()], [], [graph]
    graph.tensors, graph.operators = [], []
    for name, kind, values, shape, zero_points, axis in tensors:
        tensor, buffer = schema.TensorT(), schema.BufferT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        model.buffers.append(buffer)
        tensor.name, tensor.type, tensor.buffer = name.encode(), kind, len(model.buffers) - 1
        tensor.shape = np.array(shape, np.int32)
        if zero_points:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = np.ones(len(zero_points), np.float32)
            tensor.quantization.zeroPoint, tensor.quantization.quantizedDimension = np.array(zero_points), axis
        graph.tensors.append(tensor)
    graph.inputs = graph.outputs = np.array([], np.int32)
    flatbuffer_utils.write_model(model, str(path))
    return path


def test_tflite_counts_what_stands_for_zero(tmp_path: Path) -> None:
    path = _tflite(
        tmp_path / "m.tflite",
        ("float", TYPES.FLOAT32, np.array([0, 1, -0.0, 2], np.float32), (2, 2), [], 0),
        ("half", TYPES.FLOAT16, np.array([0, 0, 0, 2], np.float16), (2, 2), [], 0),
        ("bias", TYPES.FLOAT32, np.zeros(4, np.float32), (4,), [], 0),
        ("shape", TYPES.INT32, np.zeros(4, np.int32), (2, 2), [], 0),
        ("symmetric", TYPES.INT8, np.array([0, 0, 7, -7], np.int8), (2, 2), [0], 0),
        ("channels", TYPES.UINT8, np.array([3, 0, 9, 3], np.uint8), (2, 2), [3, 9], 0),
        ("packed", TYPES.INT4, np.array([0x01, 0xF0], np.uint8), (1, 3), [0], 0),
    )
    assert zeros_of(path) == FileZeros(
        (
            TensorZeros("float", 4, 2),
            TensorZeros("half", 4, 3),
            TensorZeros("symmetric", 4, 2),
            TensorZeros("channels", 4, 2),
            TensorZeros("packed", 3, 2),
        )
    )
    assert zeros_of(path).share == pytest.approx(11 / 19)
    assert zeros_of(path).tensors[1].share == 0.75


def test_zeros_that_a_sparse_tensor_does_not_store_count(tmp_path: Path) -> None:
    path = _tflite(tmp_path / "m.tflite", ("sparse", TYPES.FLOAT32, np.ones(3, np.float32), (4, 5), [], 0))
    model = flatbuffer_utils.read_model(str(path))
    model.subgraphs[0].tensors[0].sparsity = schema.SparsityParametersT()
    flatbuffer_utils.write_model(model, str(path))
    assert zeros_of(path).tensors == (TensorZeros("sparse", 20, 17),)


def _onnx(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray | TensorProto]) -> Path:
    tensors = [v if isinstance(v, TensorProto) else numpy_helper.from_array(v, n) for n, v in constants.items()]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", [value], [result], tensors)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def test_onnx_floats_and_quantized_weights(tmp_path: Path) -> None:
    path = _onnx(
        tmp_path / "m.onnx",
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["b"], axis=0),
            helper.make_node("DequantizeLinear", ["g", "gs", "gz"], ["c"], axis=1, block_size=2),
            helper.make_node("Sum", ["a", "b", "c", "bias"], ["y"]),
        ],
        {
            "w": np.array([[0, 1], [0, 0]], np.float32),
            "q": np.array([[3, 0], [9, 3]], np.uint8),
            "s": np.ones(2, np.float32),
            "z": np.array([3, 9], np.uint8),
            "g": np.array([[1, 1, 2, 0], [5, 5, 5, 6]], np.int8),
            "gs": np.ones((2, 2), np.float32),
            "gz": np.array([[1, 2], [5, 6]], np.int8),
            "bias": np.zeros(2, np.float32),
        },
    )
    counts = {t.name: t for t in zeros_of(path).tensors}
    assert counts["w"] == TensorZeros("w", 4, 3)
    assert counts["q"] == TensorZeros("q", 4, 2)
    assert counts["g"] == TensorZeros("g", 8, 6)
    assert "bias" not in counts


@pytest.mark.parametrize("asymmetric", [False, True])
def test_onnx_four_bit_blocks(asymmetric: bool, tmp_path: Path) -> None:
    # One row of 20 in two blocks of 16: the rest of the second block is padding.
    zero_point = np.array([[0x52]], np.uint8) if asymmetric else None  # 2 of the first block, 5 of the second
    values = np.full(32, 7, np.uint8)
    values[:3], values[16:18] = (2, 5) if asymmetric else (8, 8)
    values[24:] = 5 if asymmetric else 8
    constants = {"w": (values[0::2] | values[1::2] << 4).reshape(1, 2, 8), "s": np.ones((1, 2), np.float32)}
    if zero_point is not None:
        constants["z"] = zero_point
    node = helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", bits=4, block_size=16, K=20, N=1
    )
    assert {t.name: t for t in zeros_of(_onnx(tmp_path / "m.onnx", [node], constants)).tensors}["w"] == TensorZeros(
        "w", 20, 5
    )


def test_what_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        zeros_of(tmp_path / "absent.onnx")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(UsageError, match="is not a model file"):
        zeros_of(tmp_path / "weights.bin")
    for name in ("text.tflite", "text.onnx", "text.pte"):
        (tmp_path / name).write_text("not a model, whatever it is called")
        with pytest.raises(UsageError):
            zeros_of(tmp_path / name)
    good = _tflite(tmp_path / "m.tflite", ("w", TYPES.FLOAT32, np.zeros(400, np.float32), (20, 20), [], 0))
    good.write_bytes(good.read_bytes()[:200])
    with pytest.raises(UsageError, match="corrupt or truncated"):
        zeros_of(good)


def test_a_file_without_weights(tmp_path: Path) -> None:
    path = _tflite(tmp_path / "m.tflite")
    assert zeros_of(path) == FileZeros(())
    assert zeros_of(path).share == 0
