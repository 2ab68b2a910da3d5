"""Files that break one rule each of the Edge TPU compiler's form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgeopt.errors import UsageError
from edgeopt.formats.edge_tpu_form import check_form
from edgeopt.formats.edge_tpu_versions import KNOWN_VERSIONS, OpSignature, TensorType, needed_version
from edgeopt.types import Array

CORAL = Path(__file__).parents[2].parent / "shared" / "data" / "coral"


class File:
    """A .tflite file made by hand: one graph, tensors by name."""

    def __init__(self) -> None:
        self.model, self.graph = schema.ModelT(), schema.SubGraphT()
        self.model.version, self.model.subgraphs, self.model.buffers = 3, [self.graph], [schema.BufferT()]
        self.model.operatorCodes, self.graph.tensors, self.graph.operators = [], [], []
        self.index: dict[str, int] = {}

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: str = "INT8",
        data: Array | None = None,
        scales: tuple[float, ...] = (0.5,),
        zero: int = 0,
        axis: int = 0,
    ) -> str:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type = name.encode(), list(shape), getattr(schema.TensorType, kind)
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            tensor.buffer = len(self.model.buffers) - 1
        if kind in ("INT8", "INT16") or (kind == "INT32" and scales != (0.5,)):
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale, tensor.quantization.zeroPoint = list(scales), [zero] * len(scales)
            tensor.quantization.quantizedDimension = axis
        self.index[name] = len(self.graph.tensors)
        self.graph.tensors.append(tensor)
        return name

    def ints(self, name: str, values: object, kind: str = "INT32") -> str:
        data = np.array(values, kind.lower())
        return self.tensor(name, data.shape, kind, data)

    def op(self, kind: str, inputs: list[str], output: str, options: object | None = None, version: int = 1) -> None:
        code, operator = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), version
        self.model.operatorCodes.append(code)
        operator.opcodeIndex = len(self.model.operatorCodes) - 1
        operator.inputs, operator.outputs = [self.index[i] for i in inputs], [self.index[output]]
        if options is not None:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
            operator.builtinOptions = options
        self.graph.operators.append(operator)

    def write(self, path: Path, inputs: list[str], outputs: list[str]) -> Path:
        self.graph.inputs, self.graph.outputs = [self.index[i] for i in inputs], [self.index[i] for i in outputs]
        path.write_bytes(bytes(flatbuffer_utils.convert_object_to_bytearray(self.model)))
        return path


def _relu(file: File, source: str, output: str, **tensor: int) -> None:
    file.tensor(output, tuple(file.graph.tensors[file.index[source]].shape), **tensor)
    file.op("RELU", [source], output, version=2)


def _violations(file: File, path: Path, output: str = "y") -> list[tuple[str, str, str]]:
    path = file.write(path / "m.tflite", ["x"], [output])
    return [(v.rule, v.where, v.effect) for v in check_form(path)]


def test_a_file_in_form_has_no_violations(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4))
    _relu(file, "x", "y")
    assert _violations(file, tmp_path) == []


def test_paddings_of_64_bits_are_misread(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4))
    file.ints("paddings", [[0, 0], [1, 1]], "INT64")
    file.tensor("y", (1, 6))
    file.op("PAD", ["x", "paddings"], "y", schema.PadOptionsT(), version=2)
    assert _violations(file, tmp_path) == [("int32-paddings", "y", "misread")]


@pytest.mark.parametrize(("value", "zero", "expected"), [(3, 3, ["pad-not-padv2"]), (3, 0, [])])
def test_padv2_is_told_where_pad_would_do(tmp_path: Path, value: int, zero: int, expected: list[str]) -> None:
    file = File()
    file.tensor("x", (1, 4), zero=zero)
    file.ints("paddings", [[0, 0], [1, 1]])
    file.tensor("value", (), data=np.array(value, np.int8), zero=zero)
    file.tensor("y", (1, 6), zero=zero)
    file.op("PADV2", ["x", "paddings", "value"], "y", schema.PadV2OptionsT(), version=2)
    assert [rule for rule, _, _ in _violations(file, tmp_path)] == expected


def test_versions_beyond_the_parser_are_refused(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4))
    _relu(file, "x", "a")
    file.graph.operators.clear()
    file.op("EXP", ["x"], "a", schema.ExpOptionsT(), version=2)
    file.tensor("y", (1, 4))
    file.op("GELU", ["a"], "y", schema.GeluOptionsT(), version=2)
    path = file.write(tmp_path / "m.tflite", ["x"], ["y"])
    assert [(v.rule, v.where, v.problem) for v in check_form(path)] == [
        ("operator-version", "a", "EXP needs version 2, the compiler knows up to 1"),
        ("operator-version", "y", "GELU is newer than the compiler"),
    ]


def test_a_lower_version_than_needed_does_not_hide_a_new_kernel(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4, 4, 4))
    file.tensor("w", (4, 1, 1, 2), data=np.ones((4, 1, 1, 2), np.int8))
    file.tensor("y", (1, 4, 4, 4))
    file.op("CONV_2D", ["x", "w"], "y", schema.Conv2DOptionsT(), version=1)
    assert _violations(file, tmp_path) == [("operator-version", "y", "refused")]


def test_products_with_a_scale_per_channel_are_misread(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4))
    file.tensor("w", (2, 4), data=np.ones((2, 4), np.int8), scales=(0.1, 0.2))
    file.tensor("y", (1, 2))
    file.op("FULLY_CONNECTED", ["x", "w"], "y", schema.FullyConnectedOptionsT(), version=6)
    assert _violations(file, tmp_path) == [("per-tensor-products", "y", "misread")]


def test_idle_moves_and_channel_first_inputs_cost_the_cpu(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 3, 4, 4))
    file.ints("order", [0, 2, 3, 1])
    file.tensor("a", (1, 4, 4, 3))
    file.op("TRANSPOSE", ["x", "order"], "a", schema.TransposeOptionsT(), version=2)
    file.ints("none", [1, 0, 2, 3])
    file.tensor("y", (4, 1, 4, 3))
    file.op("TRANSPOSE", ["a", "none"], "y", schema.TransposeOptionsT(), version=2)
    assert _violations(file, tmp_path) == [("channel-last", "a", "on-cpu"), ("reshape-not-move", "y", "on-cpu")]


def test_dynamic_shapes_several_graphs_and_float_files_are_refused(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4), "FLOAT32")
    file.graph.tensors[0].shapeSignature = [-1, 4]
    file.tensor("y", (1, 4), "FLOAT32")
    file.op("RELU", ["x"], "y")
    file.model.subgraphs.append(schema.SubGraphT())
    file.model.subgraphs[1].tensors = file.model.subgraphs[1].operators = []
    file.model.subgraphs[1].inputs = file.model.subgraphs[1].outputs = []
    rules = [rule for rule, _, _ in _violations(file, tmp_path)]
    assert rules == ["one-subgraph", "static-shapes", "quantized"]


def test_buffers_outside_the_flatbuffer_are_found_before_all_else(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4))
    file.ints("paddings", [[0, 0], [1, 1]], "INT64")
    file.tensor("y", (1, 6))
    file.op("PAD", ["x", "paddings"], "y", schema.PadOptionsT(), version=2)
    buffer = file.model.buffers[1]
    data, buffer.data = bytes(buffer.data), None
    buffer.offset, buffer.size = 1 << 20, len(data)
    path = file.write(tmp_path / "m.tflite", ["x"], ["y"])
    buffer.offset = path.stat().st_size
    file.write(path, ["x"], ["y"])
    path.write_bytes(path.read_bytes() + data)
    assert [v.rule for v in check_form(path)] == ["inline-buffers"]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\0\0\0\0TFL3", b"\xff\xff\xff\x7fTFL3" + b"\xff" * 64])
def test_what_is_no_file_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"m\.tflite"):
        check_form(path)


@pytest.mark.skipif(not CORAL.is_dir(), reason=f"needs {CORAL}")
def test_what_the_compiler_took_is_in_form_and_what_it_wrote_is_told() -> None:
    for path in sorted(CORAL.glob("*.tflite")):
        rules = [violation.rule for violation in check_form(path)]
        assert rules == (["not-compiled"] if path.stem.endswith("_edgetpu") else []), path.name


INT8, FLOAT, INT16 = (TensorType(kind, (1, 4, 4, 8), (0.5,)) for kind in ("INT8", "FLOAT32", "INT16"))


@pytest.mark.parametrize(
    ("kind", "inputs", "options", "version"),
    [
        ("CONV_2D", (INT8, TensorType("INT8", (8, 1, 1, 8), (0.1,))), {}, 3),
        ("CONV_2D", (INT8, TensorType("INT8", (8, 1, 1, 4), (0.1,))), {}, 6),
        ("CONV_2D", (FLOAT, TensorType("INT8", (8, 1, 1, 8), (0.1, 0.2))), {}, 5),
        ("DEPTHWISE_CONV_2D", (FLOAT, FLOAT), {"dilationWFactor": 2}, 2),
        ("DEPTHWISE_CONV_2D", (INT8, INT8), {"dilationWFactor": 2}, 3),
        ("FULLY_CONNECTED", (INT8, INT8), {}, 6),
        ("FULLY_CONNECTED", (INT8, INT8, INT8), {"keepNumDims": True}, 5),
        ("FULLY_CONNECTED", (INT8, INT8, INT8), {}, 4),
        ("TRANSPOSE_CONV", (None, INT8, INT8), {}, 2),
        ("TRANSPOSE_CONV", (None, INT8, INT8, INT8), {}, 3),
        ("TRANSPOSE_CONV", (None, INT8, INT8, INT8), {"fusedActivationFunction": 1}, 4),
        ("ADD", (INT8, INT8), {"potScaleInt16": True}, 2),
        ("ADD", (INT16, INT16), {}, 3),
        ("MUL", (INT8, INT8), {}, 2),
        ("RESIZE_NEAREST_NEIGHBOR", (INT8,), {"halfPixelCenters": True}, 3),
        ("RESIZE_BILINEAR", (INT8,), {}, 2),
        ("QUANTIZE", (FLOAT,), {}, 1),
        ("DEQUANTIZE", (INT8,), {}, 2),
        ("SPLIT", (None, INT8), {}, 2),
        ("MEAN", (INT8,), {}, 2),
        ("EXP", (FLOAT,), {}, 1),
        ("RESHAPE", (INT8,), {}, 1),
        ("SVDF", (INT8,), {}, None),
    ],
)
def test_the_oldest_version_that_fits(
    kind: str, inputs: tuple[TensorType | None, ...], options: dict[str, int], version: int | None
) -> None:
    output = FLOAT if kind == "DEQUANTIZE" else INT8
    assert needed_version(OpSignature(kind, inputs, (output,), options)) == version


def test_a_product_that_scales_up_needs_its_own_version() -> None:
    fine, coarse = TensorType("INT8", (1,), (0.5,)), TensorType("INT8", (1,), (0.01,))
    assert needed_version(OpSignature("MUL", (fine, fine), (coarse,), {})) == 3


def test_the_observed_limits_of_the_compiler() -> None:
    observed = {"CONV_2D": 6, "QUANTIZE": 3, "TRANSPOSE_CONV": 4, "EXP": 2}
    assert all(KNOWN_VERSIONS[kind] == refused - 1 for kind, refused in observed.items())
    newest = max(getattr(schema.BuiltinOperator, kind) for kind in KNOWN_VERSIONS)
    assert newest < schema.BuiltinOperator.GELU == 150
