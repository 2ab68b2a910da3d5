"""Rewrites for the Edge TPU on files made by hand; each is run on the reference kernels before and after."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgeopt.errors import ConversionError
from edgeopt.exporter.litert_edge_tpu import EdgeTpuExporter, _write_in_form
from edgeopt.exporter.litert_edge_tpu_check import check_results
from edgeopt.exporter.litert_edge_tpu_editor import Editor
from edgeopt.exporter.litert_edge_tpu_fusion import fuse_activations
from edgeopt.exporter.litert_edge_tpu_pools import absorb_pool_paddings
from edgeopt.exporter.litert_edge_tpu_rewrites import rewrite
from edgeopt.formats.edge_tpu_form import check_form
from edgeopt.formats.edge_tpu_graph import FlatGraph
from edgeopt.types import Array, Dim, LayerRules, Model, Scheme, TensorSpec

STATIC = Scheme("w8a8", "static", io="int8")


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


def _rewritten(path: Path, exact: bool = True) -> tuple[list[str], dict[str, int], FlatGraph]:
    """Operators, what was done, and the graph, after checking form and results."""
    model = flatbuffer_utils.read_model(str(path))
    counts = dict(rewrite(model))
    after = path.with_name("after.tflite")
    flatbuffer_utils.write_model(model, str(after))
    assert check_form(after) == ()
    check_results(path, after, exact=exact)
    graph = FlatGraph(flatbuffer_utils.read_model(str(after)))
    return [f"{graph.kind(op)} {graph.version(op)}" for op in graph.graph.operators], counts, graph


def _run(path: Path, values: Array) -> Array:
    interpreter = litert.Interpreter(str(path), experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], values)
    interpreter.invoke()
    output: Array = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return output


def _relu(file: File, source: str, output: str) -> None:
    """Keeps a tensor from being a border of the graph."""
    tensor = file.graph.tensors[file.index[source]]
    file.tensor(output, tuple(tensor.shape), zero=tensor.quantization.zeroPoint[0])
    file.op("RELU", [source], output, version=2)


def _conv_options(**values: int) -> schema.Conv2DOptionsT:
    options = schema.Conv2DOptionsT()
    options.padding, options.strideH, options.strideW = schema.Padding.SAME, 1, 1
    vars(options).update(values)
    return options


def _random(*shape: int) -> Array:
    values: Array = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    return values


def test_padv2_with_the_zero_point_and_64_bit_paddings_become_plain_pad(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4, 4, 2), zero=7)
    file.ints("paddings", [[0, 0], [1, 1], [2, 0], [0, 0]], "INT64")
    file.tensor("value", (), data=np.array(7, np.int8), zero=7)
    file.tensor("y", (1, 6, 6, 2), zero=7)
    file.op("PADV2", ["x", "paddings", "value"], "y", schema.PadV2OptionsT())
    ops, counts, graph = _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))
    assert ops == ["PAD 2"]
    assert counts == {"int32 paddings": 1, "PADV2 as PAD": 1}
    assert graph.dtype(graph.inputs(graph.graph.operators[0])[1]) == "INT32"


def test_padv2_with_another_value_stays(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4))
    file.ints("paddings", [[0, 0], [1, 1]])
    file.tensor("value", (), data=np.array(5, np.int8))
    file.tensor("y", (1, 6))
    file.op("PADV2", ["x", "paddings", "value"], "y", schema.PadV2OptionsT())
    assert _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))[0] == ["PADV2 2"]


def _gather(file: File, order: list[int]) -> None:
    """x -> RESHAPE -> GATHER_ND -> RESHAPE -> y, as litert-torch writes a flattening."""
    file.tensor("x", (1, 2, 3))
    file.ints("flat", [6])
    file.tensor("a", (6,))
    file.op("RESHAPE", ["x", "flat"], "a", schema.ReshapeOptionsT())
    file.ints("indices", [[i] for i in order])
    file.tensor("b", (6,))
    file.op("GATHER_ND", ["a", "indices"], "b", schema.GatherNdOptionsT())
    file.ints("shape", [1, 2, 3])
    file.tensor("c", (1, 2, 3))
    file.op("RESHAPE", ["b", "shape"], "c", schema.ReshapeOptionsT())
    _relu(file, "c", "y")


def test_an_identity_gather_between_reshapes_goes_with_them(tmp_path: Path) -> None:
    file = File()
    _gather(file, [0, 1, 2, 3, 4, 5])
    ops, _, graph = _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))
    assert ops == ["RELU 2"]
    assert len(graph.graph.tensors) == 2
    assert len(graph.model.buffers) == 1


def test_a_gather_that_reorders_stays(tmp_path: Path) -> None:
    file = File()
    _gather(file, [1, 0, 2, 3, 4, 5])
    ops, _, _ = _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))
    assert ops == ["RESHAPE 1", "GATHER_ND 1", "RESHAPE 1", "RELU 2"]


def test_a_transpose_of_ones_becomes_a_reshape(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 1, 6, 3))
    file.ints("order", [0, 2, 1, 3])
    file.tensor("a", (1, 6, 1, 3))
    file.op("TRANSPOSE", ["x", "order"], "a", schema.TransposeOptionsT())
    file.ints("shape", [6, 3])
    file.tensor("y", (6, 3))
    file.op("RESHAPE", ["a", "shape"], "y", schema.ReshapeOptionsT())
    ops, counts, _ = _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))
    assert ops == ["RESHAPE 1"]
    assert counts == {"moves as reshapes": 1, "reshapes merged": 1, "operators without readers": 1}


def test_an_identity_in_front_of_an_output_leaves_the_output_its_name(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4))
    _relu(file, "x", "a")
    file.ints("shape", [1, 4])
    file.tensor("y", (1, 4))
    file.op("RESHAPE", ["a", "shape"], "y", schema.ReshapeOptionsT())
    ops, _, graph = _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))
    assert ops == ["RELU 2"]
    assert graph.tensor_name(int(graph.graph.outputs[0])) == "y"


def test_a_requantization_to_the_same_scale_is_an_identity_to_another_is_not(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4))
    file.tensor("a", (1, 4))
    file.op("QUANTIZE", ["x"], "a")
    file.tensor("b", (1, 4), scales=(0.25,))
    file.op("QUANTIZE", ["a"], "b")
    _relu(file, "b", "c")
    file.graph.tensors[file.index["c"]].quantization.scale = [0.25]
    assert _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["c"]))[0] == ["QUANTIZE 1", "RELU 2"]


@pytest.mark.parametrize(
    ("zero", "scale", "activation", "expected"),
    [
        (-128, 0.02, "RELU6", ["TRANSPOSE_CONV 2"]),
        (-128, 0.05, "RELU6", ["TRANSPOSE_CONV 2", "RELU6 2"]),
        (-128, 0.05, "RELU", ["TRANSPOSE_CONV 2"]),
        (-100, 0.02, "RELU", ["TRANSPOSE_CONV 2", "RELU 2"]),
    ],
)
def test_a_transposed_convolution_loses_its_fused_activation(
    tmp_path: Path, zero: int, scale: float, activation: str, expected: list[str]
) -> None:
    file = File()
    file.tensor("x", (1, 3, 3, 2), scales=(0.02,))
    file.ints("size", [1, 6, 6, 4])
    file.tensor("w", (4, 2, 2, 2), data=_random(4, 2, 2, 2), scales=(0.02,))
    file.tensor("y", (1, 6, 6, 4), scales=(scale,), zero=zero)
    options = schema.TransposeConvOptionsT()
    options.padding, options.strideH, options.strideW = schema.Padding.VALID, 2, 2
    options.fusedActivationFunction = getattr(schema.ActivationFunctionType, activation)
    file.op("TRANSPOSE_CONV", ["size", "w", "x"], "y", options, version=4)
    assert _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))[0] == expected


def test_a_grouped_convolution_becomes_one_per_group(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 5, 5, 6), scales=(0.02,), zero=3)
    scales = tuple(0.01 * (i + 1) for i in range(4))
    file.tensor("w", (4, 3, 3, 3), data=_random(4, 3, 3, 3), scales=scales)
    bias = np.array([50, -60, 70, -80], np.int32)
    file.tensor("b", (4,), "INT32", bias, scales=tuple(0.02 * s for s in scales))
    file.tensor("y", (1, 3, 3, 4), scales=(0.5,), zero=-10)
    options = _conv_options(strideH=2, strideW=2, fusedActivationFunction=schema.ActivationFunctionType.RELU)
    file.op("CONV_2D", ["x", "w", "b"], "y", options, version=6)
    ops, counts, _ = _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))
    assert ops == ["SPLIT 2", "CONV_2D 3", "CONV_2D 3", "CONCATENATION 2"]
    assert counts == {"groups as convolutions": 1, "operator versions": 2}


@pytest.mark.parametrize(("scales", "expected"), [((0.01, 0.03), "CONV_2D 3"), ((0.02,), "FULLY_CONNECTED 5")])
def test_products_with_a_scale_per_channel_become_convolutions(
    tmp_path: Path, scales: tuple[float, ...], expected: str
) -> None:
    file = File()
    file.tensor("x", (1, 3, 8), scales=(0.02,), zero=-4)
    file.tensor("w", (2, 8), data=_random(2, 8), scales=scales)
    file.tensor("b", (2,), "INT32", np.array([9, -9], np.int32), scales=tuple(0.02 * s for s in scales))
    file.tensor("fc", (1, 3, 2), scales=(0.1,))
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims, options.fusedActivationFunction = True, schema.ActivationFunctionType.RELU
    file.op("FULLY_CONNECTED", ["x", "w", "b"], "fc", options, version=5)
    ops, _, graph = _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["fc"]), exact=False)
    assert expected in ops
    assert ops.count("RESHAPE 1") == (2 if len(scales) > 1 else 0)
    assert {graph.name(op).partition(":")[0] for op in graph.graph.operators} == {"fc"}


def test_products_in_a_row_need_no_reshapes_between_them(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4), scales=(0.02,))
    for source, layer in (("x", "first"), ("first", "second")):
        file.tensor(f"{layer}/w", (4, 4), data=_random(4, 4), scales=(0.01, 0.02, 0.03, 0.04))
        file.tensor(layer, (1, 4), scales=(0.05,))
        options = schema.FullyConnectedOptionsT()
        file.op("FULLY_CONNECTED", [source, f"{layer}/w"], layer, options, version=6)
    ops, _, _ = _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["second"]), exact=False)
    assert ops == ["RESHAPE 1", "CONV_2D 3", "CONV_2D 3", "RESHAPE 1"]


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_of_every_int8_number_is_that_of_the_kernel(tmp_path: Path, approximate: bool) -> None:
    file = File()
    file.tensor("x", (1, 256), scales=(0.05,), zero=10)
    file.tensor("y", (1, 256), scales=(0.03,), zero=-120)
    options = schema.GeluOptionsT()
    options.approximate = approximate
    file.op("GELU", ["x"], "y", options, version=2)
    path = file.write(tmp_path / "m.tflite", ["x"], ["y"])
    ops, _, _ = _rewritten(path, exact=False)
    assert not [op for op in ops if op.startswith("GELU")]
    every = np.arange(-128, 128, dtype=np.int8)[None]
    np.testing.assert_array_equal(_run(path, every), _run(tmp_path / "after.tflite", every))


def test_float_gelu_is_as_exact_as_float32(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 2001), "FLOAT32")
    file.tensor("y", (1, 2001), "FLOAT32")
    file.op("GELU", ["x"], "y", schema.GeluOptionsT())
    file.tensor("q", (1, 2001))
    file.op("QUANTIZE", ["y"], "q")
    path = file.write(tmp_path / "m.tflite", ["x"], ["y", "q"])
    _rewritten(path, exact=False)
    x = np.linspace(-10, 10, 2001, dtype=np.float32)[None]
    exact = np.array([v / 2 * math.erfc(-v / math.sqrt(2)) for v in x[0].tolist()])
    assert np.abs(_run(tmp_path / "after.tflite", x)[0] - exact).max() < 2e-6


def test_codes_are_those_that_are_used_and_custom_operators_keep_theirs(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4))
    _relu(file, "x", "a")
    file.graph.operators.clear()
    file.op("RELU", ["x"], "a", version=9)
    file.tensor("y", (1, 4))
    file.op("CUSTOM", ["a"], "y")
    file.model.operatorCodes[-1].customCode = "TFLite_Detection_PostProcess"
    model = flatbuffer_utils.read_model(str(file.write(tmp_path / "m.tflite", ["x"], ["y"])))
    assert rewrite(model) == {"operator versions": 1}
    codes = [(code.builtinCode, code.version, code.customCode) for code in model.operatorCodes]
    custom = schema.BuiltinOperator.CUSTOM
    assert codes == [(schema.BuiltinOperator.RELU, 2, None), (custom, 1, b"TFLite_Detection_PostProcess")]


def test_only_what_applications_read_is_left_of_the_metadata(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4))
    file.ints("unused", [1, 2, 3])
    _relu(file, "x", "y")
    file.model.metadata = []
    for name in (b"min_runtime_version", b"TFLITE_METADATA"):
        buffer, entry = schema.BufferT(), schema.MetadataT()
        buffer.data = np.frombuffer(name, np.uint8)
        file.model.buffers.append(buffer)
        entry.name, entry.buffer = name, len(file.model.buffers) - 1
        file.model.metadata.append(entry)
    _, _, graph = _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))
    (entry,) = graph.model.metadata
    assert (entry.name, bytes(graph.model.buffers[entry.buffer].data)) == (b"TFLITE_METADATA", b"TFLITE_METADATA")
    assert (len(graph.graph.tensors), len(graph.model.buffers)) == (2, 2)


def _mean_of_moved(file: File, order: list[int], axes: list[int]) -> None:
    """x [1, 1, 6, 3] -> TRANSPOSE -> RESHAPE without ones -> MEAN -> y, as litert-torch ends a 1-D network."""
    file.tensor("x", (1, 1, 6, 3))
    moved = tuple((1, 1, 6, 3)[axis] for axis in order)
    file.ints("order", order)
    file.tensor("a", moved)
    file.op("TRANSPOSE", ["x", "order"], "a", schema.TransposeOptionsT())
    flat = (1, *(size for size in moved if size > 1))
    file.ints("shape", flat)
    file.tensor("b", flat)
    file.op("RESHAPE", ["a", "shape"], "b", schema.ReshapeOptionsT())
    file.ints("axes", axes)
    file.tensor("y", tuple(size for axis, size in enumerate(flat) if axis not in axes and axis - 3 not in axes))
    file.op("MEAN", ["b", "axes"], "y", schema.ReducerOptionsT())


@pytest.mark.parametrize(("axes", "expected"), [([2], [2]), ([-2], [3]), ([1, 2], [2, 3])])
def test_a_mean_of_moved_axes_needs_no_transpose(tmp_path: Path, axes: list[int], expected: list[int]) -> None:
    file = File()
    _mean_of_moved(file, [0, 3, 1, 2], axes)
    ops, _, graph = _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))
    assert ops == ["MEAN 2", "RESHAPE 1"]
    found = graph.constant(graph.inputs(graph.graph.operators[0])[1])
    assert found is not None
    assert found.tolist() == expected


def test_a_mean_whose_result_would_be_in_another_order_keeps_its_transpose(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 2, 6, 3))
    file.ints("order", [0, 3, 2, 1])
    file.tensor("a", (1, 3, 6, 2))
    file.op("TRANSPOSE", ["x", "order"], "a", schema.TransposeOptionsT())
    file.ints("axes", [2])
    file.tensor("y", (1, 3, 2))
    file.op("MEAN", ["a", "axes"], "y", schema.ReducerOptionsT())
    assert _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))[0] == ["TRANSPOSE 2", "MEAN 2"]


@pytest.mark.parametrize(
    ("padding", "stride", "kernel", "expected"),
    [
        ("SAME", 1, 3, ["RESHAPE 1", "PAD 2", "CONV_2D 3"]),
        ("SAME", 2, 4, ["RESHAPE 1", "PAD 2", "CONV_2D 3"]),
        ("SAME", 1, 1, ["RESHAPE 1", "CONV_2D 3"]),
        ("VALID", 2, 3, ["RESHAPE 1", "CONV_2D 3"]),
    ],
)
def test_a_channel_first_signal_is_convolved_without_a_transpose(
    tmp_path: Path, padding: str, stride: int, kernel: int, expected: list[str]
) -> None:
    file = File()
    file.tensor("x", (1, 5, 11), scales=(0.02,), zero=9)
    file.ints("shape", [1, 5, 1, 11])
    file.tensor("a", (1, 5, 1, 11), scales=(0.02,), zero=9)
    file.op("RESHAPE", ["x", "shape"], "a", schema.ReshapeOptionsT())
    file.ints("order", [0, 2, 3, 1])
    file.tensor("b", (1, 1, 11, 5), scales=(0.02,), zero=9)
    file.op("TRANSPOSE", ["a", "order"], "b", schema.TransposeOptionsT())
    scales = (0.01, 0.02, 0.03, 0.04)
    file.tensor("w", (4, 1, kernel, 5), data=_random(4, 1, kernel, 5), scales=scales)
    bias = np.array([50, -60, 70, -80], np.int32)
    file.tensor("bias", (4,), "INT32", bias, scales=tuple(0.02 * s for s in scales))
    length = -(-11 // stride) if padding == "SAME" else (11 - kernel) // stride + 1
    file.tensor("y", (1, 1, length, 4), scales=(0.2,), zero=-10)
    options = _conv_options(padding=getattr(schema.Padding, padding), strideW=stride, strideH=stride)
    file.op("CONV_2D", ["b", "w", "bias"], "y", options)
    assert _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))[0] == expected


def test_a_padding_behind_the_transpose_moves_in_front_of_it(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 5, 1, 11), zero=9)
    file.ints("order", [0, 2, 3, 1])
    file.tensor("a", (1, 1, 11, 5), zero=9)
    file.op("TRANSPOSE", ["x", "order"], "a", schema.TransposeOptionsT())
    file.ints("paddings", [[0, 0], [0, 0], [2, 1], [0, 0]])
    file.tensor("b", (1, 1, 14, 5), zero=9)
    file.op("PAD", ["a", "paddings"], "b", schema.PadOptionsT())
    file.tensor("w", (4, 1, 3, 5), data=_random(4, 1, 3, 5))
    file.tensor("bias", (4,), "INT32", np.zeros(4, np.int32), scales=(0.25,))
    file.tensor("y", (1, 1, 6, 4), scales=(9.0,))
    options = _conv_options(padding=schema.Padding.VALID, strideW=2)
    file.op("CONV_2D", ["b", "w", "bias"], "y", options)
    ops, counts, _ = _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))
    assert ops == ["PAD 2", "RESHAPE 1", "CONV_2D 3"]
    assert counts["paddings before moves"] == counts["channels as rows"] == 1


@pytest.mark.parametrize(("kernel", "expected"), [((1, 3), [2, 2]), ((3, 1), [1, 1]), ((3, 3), [1, 2])])
def test_dilation_is_the_same_on_both_axes_where_it_may_be(
    tmp_path: Path, kernel: tuple[int, int], expected: list[int]
) -> None:
    file = File()
    file.tensor("x", (1, 6, 9, 2))
    file.tensor("w", (4, *kernel, 2), data=_random(4, *kernel, 2))
    file.tensor("bias", (4,), "INT32", np.zeros(4, np.int32), scales=(0.25,))
    file.tensor("y", (1, 6, 9, 4), scales=(9.0,))
    file.op("CONV_2D", ["x", "w", "bias"], "y", _conv_options(dilationHFactor=1, dilationWFactor=2))
    _, _, graph = _rewritten(file.write(tmp_path / "m.tflite", ["x"], ["y"]))
    options = graph.options(graph.graph.operators[0])
    assert [options["dilationHFactor"], options["dilationWFactor"]] == expected


def _pool(size: int, before: int, after: int, kernel: int, stride: int, positive: bool) -> File:
    """A float max-pooling as litert-torch writes PyTorch's."""
    file = File()
    file.tensor("x", (1, size, size, 2), "FLOAT32")
    source = "x"
    if positive:
        file.tensor("relu", (1, size, size, 2), "FLOAT32")
        file.op("RELU", ["x"], "relu")
        source = "relu"
    file.ints("paddings", [[0, 0], [before, after], [before, after], [0, 0]])
    file.tensor("value", (), "FLOAT32", np.array(-np.inf, np.float32))
    padded, out = size + before + after, (size + before + after - kernel) // stride + 1
    file.tensor("padded", (1, padded, padded, 2), "FLOAT32")
    file.op("PADV2", [source, "paddings", "value"], "padded", schema.PadV2OptionsT())
    file.tensor("y", (1, out, out, 2), "FLOAT32")
    options = schema.Pool2DOptionsT()
    options.padding, options.strideH, options.strideW = schema.Padding.VALID, stride, stride
    options.filterHeight = options.filterWidth = kernel
    file.op("MAX_POOL_2D", ["padded"], "y", options)
    return file


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ((8, 1, 1, 3, 1, False), ["MAX_POOL_2D"]),
        ((7, 1, 1, 3, 2, False), ["MAX_POOL_2D"]),
        ((8, 1, 1, 3, 2, True), ["RELU", "PAD", "MAX_POOL_2D"]),
        ((8, 1, 1, 3, 2, False), ["MAX_POOL_2D", "MAX_POOL_2D"]),
        ((9, 2, 2, 5, 3, False), ["MAX_POOL_2D", "MAX_POOL_2D"]),
        ((8, 1, 1, 2, 2, False), ["PADV2", "MAX_POOL_2D"]),
    ],
)
def test_padded_max_pooling_without_minus_infinity(
    tmp_path: Path, pool: tuple[int, int, int, int, int, bool], expected: list[str]
) -> None:
    path = _pool(*pool).write(tmp_path / "m.tflite", ["x"], ["y"])
    ops = _prepared(path, absorb_pool_paddings)
    assert ops == expected


def _prepared(path: Path, function: Callable[[Editor], int]) -> list[str]:
    editor = Editor(flatbuffer_utils.read_model(str(path)))
    function(editor)
    editor.sweep()
    after = path.with_name("after.tflite")
    flatbuffer_utils.write_model(editor.model, str(after))
    check_results(path, after, exact=True)
    return [editor.kind(op) for op in editor.graph.operators]


@pytest.mark.parametrize(("shared", "expected"), [(False, ["ADD"]), (True, ["ADD", "RELU6", "MUL"])])
def test_an_activation_is_fused_where_nobody_else_reads_its_input(
    tmp_path: Path, shared: bool, expected: list[str]
) -> None:
    file = File()
    for name in ("x", "a", "b", "y"):
        file.tensor(name, (1, 4), "FLOAT32")
    file.op("ADD", ["x", "x"], "a", schema.AddOptionsT())
    file.op("RELU6", ["a"], "b" if shared else "y")
    if shared:
        file.op("MUL", ["a", "b"], "y", schema.MulOptionsT())
    assert _prepared(file.write(tmp_path / "m.tflite", ["x"], ["y"]), fuse_activations) == expected


def test_other_results_are_an_error(tmp_path: Path) -> None:
    paths = []
    for kind in ("RELU", "RELU6"):
        file = File()
        file.tensor("x", (1, 64), zero=-40, scales=(0.1,))
        file.tensor("y", (1, 64), zero=-40, scales=(0.1,))
        file.op(kind, ["x"], "y", version=2)
        paths.append(file.write(tmp_path / f"{kind}.tflite", ["x"], ["y"]))
    for exact in (True, False):
        with pytest.raises(ConversionError, match="computes something else"):
            check_results(paths[0], paths[1], exact=exact)


def test_an_operator_without_an_older_form_is_named_with_its_layer(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4))
    file.tensor("head.act:1", (1, 4))
    file.op("EXP", ["x"], "head.act:1", schema.ExpOptionsT(), version=2)
    path = file.write(tmp_path / "m.tflite", ["x"], ["head.act:1"])
    with pytest.raises(ConversionError, match=r"^layer 'head.act': .* EXP needs version 2, .*keep-float") as error:
        _write_in_form(path, tmp_path / "out.tflite")
    assert error.value.exit_code == 4


def test_a_file_with_several_graphs_is_refused(tmp_path: Path) -> None:
    file = File()
    file.tensor("x", (1, 4))
    _relu(file, "x", "y")
    file.model.subgraphs.append(schema.SubGraphT())
    file.model.subgraphs[1].tensors = file.model.subgraphs[1].operators = []
    file.model.subgraphs[1].inputs = file.model.subgraphs[1].outputs = []
    with pytest.raises(ConversionError, match=r"^out.tflite: .*has 2 subgraphs"):
        _write_in_form(file.write(tmp_path / "m.tflite", ["x"], ["y"]), tmp_path / "out.tflite")


@pytest.mark.parametrize(
    ("scheme", "told"),
    [
        (Scheme("w8a16", "static"), "not in w8a16 with static ranges"),
        (Scheme("w8a8", "dynamic"), "not in w8a8 with dynamic ranges"),
        (Scheme("fp16", "none"), "take w8a8 with static activations"),
        (Scheme("w8a8", "static", weight_symmetric=False), "zero point of 0 only"),
    ],
)
def test_schemes_that_no_edge_tpu_takes(scheme: Scheme, told: str) -> None:
    assert told in str(EdgeTpuExporter().unsupported(scheme, LayerRules()))


def test_layers_may_stay_float_or_get_16_bits() -> None:
    rules = LayerRules(keep_float=("head",), int16_activations=("stem",))
    assert EdgeTpuExporter().unsupported(STATIC, rules) is None


def test_dynamic_dimensions_are_refused_before_any_work(tmp_path: Path) -> None:
    spec = TensorSpec("image", (Dim("batch", 1, 8), 3, 8, 8), "float32", "NCHW")
    example = {"image": np.zeros((1, 3, 8, 8), np.float32)}
    model = Model("net", None, None, (spec,), (), example, None, (), (), "0" * 64)
    with pytest.raises(ConversionError, match="input 'image': the dimension 'batch' is dynamic"):
        EdgeTpuExporter().export_float(model, tmp_path)
