"""Work of .tflite files, made by hand, against counts done by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgeopt.errors import UsageError
from edgeopt.prediction.count import count

FLOAT, INT8, INT16 = schema.TensorType.FLOAT32, schema.TensorType.INT8, schema.TensorType.INT16
#: A tensor: name, type, shape, whether it is constant. An operator: type, inputs, outputs.
Tensor = tuple[str, int, list[int], bool]


def write(path: Path, tensors: list[Tensor], operators: list[tuple[str, list[int], list[int]]]) -> Path:
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, graph.tensors = 3, [schema.BufferT()], []
    for name, dtype, shape, constant in tensors:
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.shape = name.encode(), dtype, np.array([abs(d) for d in shape], np.int32)
        if any(d < 0 for d in shape):
            tensor.shapeSignature = np.array([-1 if d < 0 else d for d in shape], np.int32)
        tensor.buffer = 0
        if constant:
            buffer = schema.BufferT()
            width = {FLOAT: 4, INT16: 2}.get(dtype, 1)
            buffer.data = np.zeros(int(np.prod(shape)) * width, np.uint8)
            tensor.buffer = len(model.buffers)
            model.buffers.append(buffer)
        graph.tensors.append(tensor)
    kinds = sorted({kind for kind, _, _ in operators})
    model.operatorCodes, graph.operators = [], []
    for kind in kinds:
        code = schema.OperatorCodeT()
        number = getattr(schema.BuiltinOperator, kind, schema.BuiltinOperator.CUSTOM)
        code.builtinCode, code.deprecatedBuiltinCode = number, min(number, 127)
        if number == schema.BuiltinOperator.CUSTOM:
            code.customCode = kind.encode()
        model.operatorCodes.append(code)
    for kind, inputs, outputs in operators:
        operator = schema.OperatorT()
        operator.opcodeIndex = kinds.index(kind)
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        graph.operators.append(operator)
    graph.inputs = np.array([0], np.int32)
    graph.outputs = np.array(operators[-1][2], np.int32)
    model.subgraphs = [graph]
    flatbuffer_utils.write_model(model, str(path))
    return path


def test_convolutions(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.tflite",
        [
            ("x", INT8, [1, 8, 8, 3], False), ("w", INT8, [16, 3, 3, 3], True), ("y", INT8, [1, 4, 4, 16], False),
            ("d", INT8, [1, 5, 5, 16], True), ("z", INT8, [1, 4, 4, 16], False),
        ],
        [("CONV_2D", [0, 1, -1], [2]), ("DEPTHWISE_CONV_2D", [2, 3, -1], [4])],
    )  # fmt: skip
    conv, depthwise = count(path, "litert").ops
    assert (conv.kind, conv.arithmetic, conv.channels) == ("conv", "int8", 16)
    assert conv.macs == 4 * 4 * 16 * 3 * 3 * 3
    assert (conv.weight_bytes, conv.activation_bytes) == (16 * 27, 8 * 8 * 3 + 4 * 4 * 16)
    assert (depthwise.kind, depthwise.macs, depthwise.weight_bytes) == ("depthwise", 4 * 4 * 16 * 25, 25 * 16)


def test_products(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.tflite",
        [
            ("x", FLOAT, [2, 6, 8], False), ("w", INT8, [10, 8], True), ("y", FLOAT, [2, 6, 10], False),
            ("v", FLOAT, [2, 10, 4], False), ("z", FLOAT, [2, 6, 4], False),
        ],
        [("FULLY_CONNECTED", [0, 1, -1], [2]), ("BATCH_MATMUL", [2, 3], [4])],
    )  # fmt: skip
    dense, product = count(path, "litert").ops
    assert (dense.macs, dense.arithmetic, dense.weight_bytes) == (2 * 6 * 10 * 8, "int8", 80)
    assert (product.macs, product.arithmetic, product.weight_bytes) == (2 * 6 * 4 * 10, "fp32", 0)
    assert dense.activation_bytes == 4 * (2 * 6 * 8 + 2 * 6 * 10)


def test_transposed_convolution_multiplies_its_input(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.tflite",
        [
            ("x", FLOAT, [1, 4, 4, 8], False), ("w", FLOAT, [5, 3, 3, 8], True), ("s", FLOAT, [4], True),
            ("y", FLOAT, [1, 8, 8, 5], False),
        ],
        [("TRANSPOSE_CONV", [2, 1, 0], [3])],
    )  # fmt: skip
    (op,) = count(path, "litert").ops
    assert op.macs == 4 * 4 * 5 * 9 * 8


def test_weights_that_are_decoded_on_loading_cost_nothing(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.tflite",
        [
            ("x", FLOAT, [1, 8], False), ("h", schema.TensorType.FLOAT16, [4, 8], True), ("w", FLOAT, [4, 8], False),
            ("y", FLOAT, [1, 4], False),
        ],
        [("DEQUANTIZE", [1], [2]), ("FULLY_CONNECTED", [0, 2, -1], [3])],
    )  # fmt: skip
    (dense,) = count(path, "litert").ops
    assert (dense.type, dense.macs, dense.weight_bytes) == ("FULLY_CONNECTED", 32, 4 * 32)


def test_a_table_is_read_by_the_row(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.tflite",
        [
            ("i", schema.TensorType.INT32, [1, 3], False),
            ("t", FLOAT, [1000, 16], True),
            ("y", FLOAT, [1, 3, 16], False),
        ],
        [("GATHER", [1, 0], [2])],
    )
    (gather,) = count(path, "litert").ops
    assert (gather.kind, gather.weight_bytes, gather.activation_bytes) == ("movement", 0, 2 * 3 * 16 * 4)


def test_dynamic_sizes_are_told(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.tflite",
        [("x", FLOAT, [-1, 8], False), ("y", FLOAT, [-1, 8], False)],
        [("RELU", [0], [1])],
    )
    assert count(path, "litert").assumed == ("x: 1x8",)


def test_what_nothing_can_be_told_of(tmp_path: Path) -> None:
    custom = write(
        tmp_path / "c.tflite", [("x", FLOAT, [1, 8], False), ("y", FLOAT, [1, 8], False)], [("MyOp", [0], [1])]
    )
    assert [op.kind for op in count(custom, "litert").ops] == ["unknown"]
    wide = write(
        tmp_path / "w.tflite",
        [("x", INT16, [1, 8], False), ("w", INT8, [4, 8], True), ("y", INT16, [1, 4], False)],
        [("FULLY_CONNECTED", [0, 1, -1], [2])],
    )
    assert "reference kernels" in (count(wide, "litert").unsupported or "")
    loop = write(
        tmp_path / "l.tflite", [("x", FLOAT, [1, 8], False), ("y", FLOAT, [1, 8], False)], [("WHILE", [0], [1])]
    )
    assert "as it runs" in (count(loop, "litert").unsupported or "")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = write(
        tmp_path / "m.tflite", [("x", FLOAT, [1, 8], False), ("y", FLOAT, [1, 8], False)], [("RELU", [0], [1])]
    )
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(whole.read_bytes()[:64])
    with pytest.raises(UsageError, match=r"cut\.tflite: "):
        count(cut, "litert")


def test_core_ml_decides_on_the_device(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="decides on the device"):
        count(tmp_path / "m.mlpackage", "coreml")
