"""Which operators are mapped: single operators against published compiler logs, then whole graphs."""

from __future__ import annotations

import os
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from edgeopt.accelerators.edge_tpu import graph as graphs
from edgeopt.accelerators.edge_tpu import predict
from edgeopt.accelerators.edge_tpu.compiled import parameter_bytes as compiled_parameter_bytes
from edgeopt.accelerators.edge_tpu.parameters import parameter_bytes
from edgeopt.accelerators.edge_tpu.workload import work_of
from edgeopt.errors import UsageError

CORAL = Path(os.environ.get("EDGEOPT_DATA", Path(__file__).parents[3] / "../shared/data")) / "coral"
TYPES = {"float32": 0, "int32": 2, "uint8": 3, "int64": 4, "int16": 7, "int8": 9}


class Builder:
    """A small .tflite file; tensors are int8 activations unless told otherwise."""

    def __init__(self) -> None:
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.buffers = [schema.BufferT()]
        self.model.operatorCodes = []
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators, self.graph.inputs, self.graph.outputs = [], [], [], []
        self.model.subgraphs = [self.graph]

    def tensor(self, *shape: int, dtype: str = "int8", values: object = None, name: str | None = None) -> int:
        tensor = schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer = list(shape), TYPES[dtype], 0
        tensor.name = (name or f"t{len(self.graph.tensors)}").encode()
        if values is not None:
            buffer = schema.BufferT()
            array = np.broadcast_to(np.asarray(values, dtype=dtype), shape)
            buffer.data = np.frombuffer(array.tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            tensor.buffer = len(self.model.buffers) - 1
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def feed(self, *shape: int, dtype: str = "int8") -> int:
        index = self.tensor(*shape, dtype=dtype)
        self.graph.inputs.append(index)
        return index

    def add(
        self, kind: str, inputs: list[int], *shape: int, dtype: str = "int8", version: int = 1, **options: int
    ) -> int:
        code = schema.OperatorCodeT()
        number = getattr(schema.BuiltinOperator, kind, schema.BuiltinOperator.CUSTOM)
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), version
        if number == schema.BuiltinOperator.CUSTOM:
            code.customCode = kind.encode()
        self.model.operatorCodes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self.model.operatorCodes) - 1
        output = self.tensor(*shape, dtype=dtype)
        operator.inputs, operator.outputs = inputs, [output]
        if options:
            name, fields = OPTIONS[kind]
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            operator.builtinOptions = getattr(schema, f"{name}T")()
            for field, value in zip(fields, options.values(), strict=False):
                assert field in options
                setattr(operator.builtinOptions, field, value)
        self.graph.operators.append(operator)
        return output

    def convolve(self, data: int, *shape: int, depth: int, version: int = 3, **options: int) -> int:
        weights = self.tensor(shape[-1], 3, 3, depth, values=1)
        bias = self.tensor(shape[-1], dtype="int32", values=0)
        return self.add("CONV_2D", [data, weights, bias], *shape, version=version, **options)

    def axes(self, *values: int, dtype: str = "int32") -> int:
        return self.tensor(len(values), dtype=dtype, values=values)

    def save(self, path: Path, *outputs: int) -> Path:
        self.graph.outputs = list(outputs)
        builder = flatbuffers.Builder()
        builder.Finish(self.model.Pack(builder), b"TFL3")
        path.write_bytes(bytes(builder.Output()))
        return path


OPTIONS = {
    "CONV_2D": ("Conv2DOptions", ("dilationWFactor", "dilationHFactor", "fusedActivationFunction")),
    "MAX_POOL_2D": ("Pool2DOptions", ("fusedActivationFunction",)),
    "STRIDED_SLICE": ("StridedSliceOptions", ("newAxisMask",)),
    "PACK": ("PackOptions", ("axis",)),
}


def one(path: Path, kind: str, inputs: tuple[int, ...], output: tuple[int, ...], *extra: object, **options: int):
    """Placement of a file of one operator with one computed input; `extra`: constants (values of an int32 vector)."""
    builder = Builder()
    data = builder.feed(*inputs)
    constants = [builder.axes(*values) for values in extra]  # type: ignore[misc]
    written = builder.add(kind, [data, *constants], *output, **options)
    return predict(builder.save(path / "one.tflite", written)).ops[0]


# (operator, input, output, constants, options, whether it is mapped, where that is told)
LOGS = [
    ("TRANSPOSE", (1, 196, 3, 85), (1, 3, 196, 85), ((0, 2, 1, 3),), {}, True, "#512, input of 224"),
    ("TRANSPOSE", (1, 256, 3, 85), (1, 3, 256, 85), ((0, 2, 1, 3),), {}, False, "#512, inputs of 256 and 512"),
    ("TRANSPOSE", (1, 784, 3, 85), (1, 3, 784, 85), ((0, 2, 1, 3),), {}, False, "#512, input of 224"),
    ("TRANSPOSE", (1, 3, 224, 224), (1, 224, 224, 3), ((0, 2, 3, 1),), {}, False, "#433"),
    ("MEAN", (1, 64, 128, 3), (1, 3), ((1, 2),), {}, True, "#461"),
    ("MEAN", (1, 256, 128, 3), (1, 3), ((1, 2),), {}, False, "#461"),
    ("MEAN", (1, 7, 7, 1280), (1, 1280), ((1, 2),), {}, True, "study, efficientnet_lite0"),
    ("MEAN", (2, 7, 7, 8), (7, 7, 8), ((0,),), {}, False, "table, no batch"),
    ("MEAN", (1, 7, 7, 6), (1, 7, 7), ((3,),), {}, False, "table, multiples of 4 channels"),
    ("MEAN", (1, 7, 7, 8), (1, 7, 7), ((-1,),), {}, True, "table"),
    ("SUM", (1, 20, 20, 72), (1, 1, 1, 72), ((1, 2),), {}, True, "study, ssdlite_mobilenetv3"),
    ("SOFTMAX", (1, 1001), (1, 1001), (), {}, True, "coral pairs"),
    ("SOFTMAX", (1, 576, 4, 16), (1, 576, 4, 16), (), {}, True, "yolov9"),
    ("SOFTMAX", (32, 50, 50), (32, 50, 50), (), {}, False, "study, clip_rn50"),
    ("SOFTMAX", (1, 16001), (1, 16001), (), {}, False, "table"),
    ("RESHAPE", (1, 40, 40, 810), (1, 14400, 90), (), {}, True, "logs of efficientdet_lite0"),
    ("RESHAPE", (1, 80, 80, 546), (1, 38400, 91), (), {}, False, "#356"),
    ("RESHAPE", (1, 10, 10, 128), (1, 10, 1, 10, 1, 128), (), {}, False, "#537, rank"),
    ("RESIZE_BILINEAR", (1, 64, 64, 32), (1, 128, 128, 32), (), {}, True, "#31"),
    ("RESIZE_BILINEAR", (1, 256, 256, 32), (1, 512, 512, 32), (), {}, False, "#31"),
    ("RESIZE_BILINEAR", (1, 33, 33, 21), (1, 513, 513, 21), (), {}, False, "libredgetpu, end of DeepLab"),
    ("RESIZE_BILINEAR", (1, 1, 1, 256), (1, 33, 33, 256), (), {}, False, "libredgetpu, DeepLab's image pooling"),
    ("RESIZE_NEAREST_NEIGHBOR", (1, 48, 48, 192), (1, 96, 96, 192), (), {}, True, "study, w96"),
    ("LEAKY_RELU", (1, 8, 8, 8), (1, 8, 8, 8), (), {}, False, "#272"),
    ("HARD_SWISH", (1, 8, 8, 8), (1, 8, 8, 8), (), {}, False, "#272"),
    ("GATHER", (1, 8, 8, 8), (1, 4, 8, 8), ((0, 1, 2, 3),), {}, False, "yolov9"),
    ("MAXIMUM", (1, 8, 8, 8), (1, 8, 8, 8), (), {}, True, "yolov9"),
    ("LOGISTIC", (1, 320, 320, 16), (1, 320, 320, 16), (), {}, True, "yolov8 logs"),
    ("SQUARED_DIFFERENCE", (1, 64, 128, 3), (1, 64, 128, 3), (), {}, True, "#461"),
    ("PAD", (1, 8, 8, 8), (1, 9, 9, 8), ((0, 0, 0, 1, 0, 1, 0, 0),), {}, True, "table"),
    ("PAD", (1, 8, 8, 8), (2, 8, 8, 8), ((0, 1, 0, 0, 0, 0, 0, 0),), {}, False, "table, no batch"),
    ("PADV2", (1, 8, 8, 8), (1, 9, 9, 8), ((0, 0, 0, 1, 0, 1, 0, 0),), {}, False, "study, efficientdet"),
    ("STRIDED_SLICE", (1, 8, 8, 8), (1, 8, 8, 4), ((0,) * 4, (1, 8, 8, 4), (1,) * 4), {}, True, "yolov9"),
    ("STRIDED_SLICE", (1, 8, 8, 8), (1, 4, 4, 8), ((0,) * 4, (1, 8, 8, 8), (1, 2, 2, 1)), {}, False, "status list"),
    ("STRIDED_SLICE", (1, 8, 8, 8), (1, 1, 8, 8, 8), ((0,) * 4, (1, 8, 8, 8), (1,) * 4), {"newAxisMask": 1}, False,
     "table"),
    ("SQUEEZE", (1, 1, 1, 1001), (1, 1001), (), {}, True, "coral pairs"),
    ("SQUEEZE", (1, 5, 1, 10), (1, 5, 10), (), {}, False, "table"),
    ("MAX_POOL_2D", (1, 8, 8, 8), (1, 4, 4, 8), (), {"fusedActivationFunction": 0}, True, "table"),
    ("MAX_POOL_2D", (1, 8, 8, 8), (1, 4, 4, 8), (), {"fusedActivationFunction": 1}, False, "table"),
    ("ADD", (2, 8, 8, 8), (2, 8, 8, 8), (), {}, False, "table, three inner dimensions"),
    ("ADD", (1, 1, 8, 8, 8), (1, 1, 8, 8, 8), (), {}, True, "table, three inner dimensions"),
    ("UNPACK", (1, 8, 8), (1, 8), (), {}, False, "table: absent"),
    ("DEPTH_TO_SPACE", (1, 8, 8, 8), (1, 16, 16, 2), (), {}, False, "table: absent"),
    ("SPACE_TO_DEPTH", (1, 8, 8, 8), (1, 4, 4, 32), (), {}, True, "table"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "read", "written", "constants", "options", "mapped", "_source"), LOGS)
def test_operators_as_the_compiler_places_them(
    tmp_path: Path, kind: str, read: tuple[int, ...], written: tuple[int, ...], constants: tuple[tuple[int, ...], ...],
    options: dict[str, int], mapped: bool, _source: str,
) -> None:  # fmt: skip
    op = one(tmp_path, kind, read, written, *constants, **options)
    assert (op.on == "accelerator") is mapped
    assert (op.reason is None) is mapped


def test_reasons_are_the_compilers_words_with_a_detail_and_a_fix(tmp_path: Path) -> None:
    op = one(tmp_path, "STRIDED_SLICE", (1, 8, 8, 8), (1, 4, 4, 8), (0,) * 4, (1, 8, 8, 8), (1, 2, 2, 1))
    assert op.reason == "Only Strided-Slice with unitary strides supported"
    assert op.fix is not None
    assert "step 1" in op.fix
    op = one(tmp_path, "ADD", (2, 8, 8, 8), (2, 8, 8, 8))
    assert op.reason == "Tensor has unsupported rank (up to 3 innermost dimensions mapped) ('t0' is 2x8x8x8)"
    assert op.fix == "export with batch 1"
    op = one(tmp_path, "LEAKY_RELU", (1, 8), (1, 8))
    assert (op.reason, op.fix) == ("Operation not supported", "PReLU with one slope per channel")


@pytest.mark.parametrize("rows", [1, 50])
def test_a_fully_connected_layer_writes_one_row(tmp_path: Path, rows: int) -> None:
    builder = Builder()
    weights = builder.tensor(6144, 2048, values=1)
    written = builder.add("FULLY_CONNECTED", [builder.feed(rows, 2048), weights, -1], rows, 6144)
    op = predict(builder.save(tmp_path / "m.tflite", written)).ops[0]
    assert (op.on == "accelerator") is (rows == 1)


def test_weights_have_to_be_constants_inside_the_flatbuffer(tmp_path: Path) -> None:
    builder = Builder()
    written = builder.add("CONV_2D", [builder.feed(1, 8, 8, 8), builder.feed(8, 3, 3, 8)], 1, 8, 8, 8)
    op = predict(builder.save(tmp_path / "computed.tflite", written)).ops[0]
    assert op.reason is not None
    assert op.reason.startswith("Filter, bias, or other param is not constant at compile-time")

    builder = Builder()
    written = builder.convolve(builder.feed(1, 8, 8, 8), 1, 8, 8, 8, depth=8)
    builder.model.buffers[1].data = None
    builder.model.buffers[1].offset, builder.model.buffers[1].size = 4096, 576
    op = predict(builder.save(tmp_path / "behind.tflite", written)).ops[0]
    assert op.reason is not None
    assert "lies behind the FlatBuffer" in op.reason
    assert op.fix == "store buffers inside the FlatBuffer"


def test_paddings_of_int64_are_misread(tmp_path: Path) -> None:
    builder = Builder()
    paddings = builder.axes(0, 0, 1, 1, 1, 1, 0, 0, dtype="int64")
    written = builder.add("PAD", [builder.feed(1, 8, 8, 8), paddings], 1, 10, 10, 8)
    op = predict(builder.save(tmp_path / "m.tflite", written)).ops[0]
    assert (op.on, op.fix) == ("cpu", "store the paddings as int32")


@pytest.mark.parametrize(("dtype", "mapped"), [("int8", True), ("uint8", True), ("int16", False), ("float32", False)])
def test_only_8_bits_are_taken(tmp_path: Path, dtype: str, mapped: bool) -> None:
    builder = Builder()
    written = builder.add("RELU", [builder.feed(1, 8, dtype=dtype)], 1, 8, dtype=dtype)
    op = predict(builder.save(tmp_path / "m.tflite", written)).ops[0]
    assert (op.on == "accelerator") is mapped
    assert mapped or "unsupported data type" in str(op.reason)


def test_a_constant_is_joined_only_when_it_is_zero(tmp_path: Path) -> None:
    placed = []
    for value in (0, 1):
        builder = Builder()
        constant = builder.tensor(1, 8, 8, 4, values=value)
        written = builder.add("CONCATENATION", [builder.feed(1, 8, 8, 4), constant], 1, 8, 8, 8)
        placed.append(predict(builder.save(tmp_path / "m.tflite", written)).ops[0].on)
    assert placed == ["accelerator", "cpu"]


@pytest.mark.parametrize(
    ("kind", "version"), [("CONV_2D", 6), ("QUANTIZE", 3), ("TRANSPOSE_CONV", 4), ("TRANSPOSE", 6), ("GELU", 1)]
)
def test_operators_that_the_parser_does_not_know_stop_the_whole_file(tmp_path: Path, kind: str, version: int) -> None:
    builder = Builder()
    hidden = builder.add("RELU", [builder.feed(1, 8)], 1, 8)
    written = builder.add(kind, [hidden], 1, 8, version=version)
    first, second = predict(builder.save(tmp_path / "m.tflite", written)).ops
    assert (first.on, second.on) == ("cpu", "cpu")
    assert str(first.reason).startswith(f"the compiler refuses the whole file: {kind}")


def test_everything_behind_an_unsupported_operator_stays_on_the_cpu_but_not_what_stands_beside_it(
    tmp_path: Path,
) -> None:
    builder = Builder()
    trunk = builder.convolve(builder.feed(1, 16, 16, 8), 1, 16, 16, 8, depth=8)
    left = builder.add("LEAKY_RELU", [trunk], 1, 16, 16, 8)
    left = builder.convolve(left, 1, 16, 16, 8, depth=8)
    right = builder.convolve(trunk, 1, 16, 16, 8, depth=8)  # later in the file, but independent of LEAKY_RELU
    placement = predict(builder.save(tmp_path / "m.tflite", left, right))
    assert [op.on for op in placement.ops] == ["accelerator", "cpu", "cpu", "accelerator"]
    behind = placement.ops[2]
    assert str(behind.reason).startswith("More than one subgraph is not supported (runs after LEAKY_RELU 't")
    assert str(behind.fix).startswith("bring LEAKY_RELU")
    assert placement.accelerated == 0.5


def test_float_inputs_and_outputs_are_converted_on_the_cpu_around_the_partition(tmp_path: Path) -> None:
    builder = Builder()  # the log of every model with float inputs and outputs
    quantized = builder.add("QUANTIZE", [builder.feed(1, 16, 16, 8, dtype="float32")], 1, 16, 16, 8)
    hidden = builder.convolve(quantized, 1, 16, 16, 8, depth=8)
    written = builder.add("DEQUANTIZE", [hidden], 1, 16, 16, 8, dtype="float32")
    placement = predict(builder.save(tmp_path / "m.tflite", written))
    assert [op.on for op in placement.ops] == ["cpu", "accelerator", "cpu"]
    assert "unspecified limitation" in str(placement.ops[0].reason)
    assert "unsupported data type" in str(placement.ops[2].reason)


def test_only_the_first_partition_counts(tmp_path: Path) -> None:
    builder = Builder()  # #433: a QUANTIZE is mapped, then a TRANSPOSE of the input is not, and 190 operators follow
    requantized = builder.add("QUANTIZE", [builder.feed(1, 3, 224, 224, dtype="uint8")], 1, 3, 224, 224)
    moved = builder.add("TRANSPOSE", [requantized, builder.axes(0, 2, 3, 1)], 1, 224, 224, 3)
    written = builder.convolve(moved, 1, 224, 224, 8, depth=3)
    placement = predict(builder.save(tmp_path / "m.tflite", written))
    assert [op.on for op in placement.ops] == ["accelerator", "cpu", "cpu"]


def test_detection_postprocessing_stays_on_the_cpu(tmp_path: Path) -> None:
    builder = Builder()
    boxes = builder.convolve(builder.feed(1, 16, 16, 8), 1, 16, 16, 8, depth=8)
    written = builder.add("TFLite_Detection_PostProcess", [boxes], 1, 10, 4, dtype="float32")
    placement = predict(builder.save(tmp_path / "m.tflite", written))
    assert [op.on for op in placement.ops] == ["accelerator", "cpu"]
    assert placement.ops[1].type == "TFLite_Detection_PostProcess"


def test_deeplab_is_cut_where_corals_compiled_file_is(tmp_path: Path) -> None:
    # What the file has beside the Edge TPU's operator, which writes 33x33x256 and 1x1x256 (libredgetpu/postprocess).
    left = ["RESIZE_BILINEAR", "QUANTIZE", "CONCATENATION", "CONV_2D", "CONV_2D", "RESIZE_BILINEAR", "RESIZE_BILINEAR"]
    builder = Builder()
    features = builder.convolve(builder.feed(1, 65, 65, 3, dtype="uint8"), 1, 33, 33, 320, depth=3)
    pooled = builder.add("AVERAGE_POOL_2D", [features], 1, 1, 1, 320, dtype="uint8")
    pooled = builder.convolve(pooled, 1, 1, 1, 256, depth=320)
    branch = builder.convolve(features, 1, 33, 33, 256, depth=320)
    size = builder.axes(33, 33)
    spread = builder.add("RESIZE_BILINEAR", [pooled, size], 1, 33, 33, 256)
    joined = builder.add("CONCATENATION", [builder.add("QUANTIZE", [spread], 1, 33, 33, 256), branch], 1, 33, 33, 512)
    logits = builder.convolve(builder.convolve(joined, 1, 33, 33, 256, depth=512), 1, 33, 33, 21, depth=256)
    logits = builder.add("RESIZE_BILINEAR", [logits, size], 1, 33, 33, 21)
    large = builder.add("RESIZE_BILINEAR", [logits, builder.axes(513, 513)], 1, 513, 513, 21)
    written = builder.add("ARG_MAX", [large, builder.axes(3)], 1, 513, 513, dtype="int64")
    placement = predict(builder.save(tmp_path / "m.tflite", written))
    assert [op.type for op in placement.on_cpu] == [*left, "ARG_MAX"]
    assert len(placement.ops) == 12


@pytest.mark.parametrize(
    ("decoder", "channels"), [("TFLite_Detection_PostProcess", (12, 273)), ("PosenetDecoderOp", (17, 34, 64))]
)
def test_all_heads_of_a_network_are_mapped_and_only_the_decoder_is_not(
    tmp_path: Path, decoder: str, channels: tuple[int, ...]
) -> None:
    # Outputs of Coral's compiled SSDLite MobileDet and PoseNet (docs/HARDWARE_ANALYSIS.md of LibrEdgeTPU).
    builder = Builder()
    features = builder.convolve(builder.feed(1, 40, 40, 3), 1, 20, 20, 64, depth=3)
    heads = [builder.convolve(features, 1, 20, 20, count, depth=64) for count in channels]
    heads = [
        builder.add("RESHAPE", [head, builder.axes(1, 1200, -1)], 1, 1200, count // 3)
        for head, count in zip(heads, channels, strict=True)
    ]
    placement = predict(builder.save(tmp_path / "m.tflite", builder.add(decoder, heads, 1, 10, 4, dtype="float32")))
    assert [op.type for op in placement.on_cpu] == [decoder]


def test_operators_that_share_a_name_are_numbered_and_keep_their_layer(tmp_path: Path) -> None:
    builder = Builder()
    data = builder.feed(1, 8)
    for _ in range(2):
        data = builder.add("RELU", [data], 1, 8)
        builder.graph.tensors[data].name = b"features.0"
    placement = predict(builder.save(tmp_path / "m.tflite", data))
    assert [(op.name, op.layer) for op in placement.ops] == [
        ("features.0", "features.0"),
        ("features.0:1", "features.0"),
    ]


def test_a_graph_without_operators_and_one_with_a_cycle_end(tmp_path: Path) -> None:
    builder = Builder()
    data = builder.feed(1, 8)
    assert predict(builder.save(tmp_path / "empty.tflite", data)).ops == ()
    written = builder.add("RELU", [1], 1, 8)
    assert [op.on for op in predict(builder.save(tmp_path / "cycle.tflite", written)).ops] == ["cpu"]


@pytest.mark.parametrize("content", [b"", b"\0\0\0\0TFL3", b"no such file at all"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(content)
    with pytest.raises(UsageError) as told:
        predict(path)
    assert "m.tflite" in told.value.line()


def test_numbers_of_tensors_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for spoil in ("inputs", "outputs", "graph"):
        builder = Builder()
        written = builder.add("RELU", [builder.feed(1, 8)], 1, 8)
        operator = builder.graph.operators[0]
        if spoil == "inputs":
            operator.inputs = [77]
        elif spoil == "outputs":
            operator.outputs = [-1]
        path = builder.save(tmp_path / "m.tflite", 77 if spoil == "graph" else written)
        with pytest.raises(UsageError, match="corrupt"):
            predict(path)


def test_shapes_that_no_operator_can_have_are_read_without_a_crash(tmp_path: Path) -> None:
    builder = Builder()
    scalar = builder.feed()
    written = [builder.add(kind, [scalar, builder.axes(0)]) for kind in ("MEAN", "TRANSPOSE")]
    written.append(builder.add("SPLIT", [builder.axes(0), scalar]))
    written.append(builder.add("CONV_2D", [scalar, builder.tensor(values=1)]))
    free = builder.feed(-1, 8)
    written.append(builder.add("RELU", [free], -1, 8))
    path = builder.save(tmp_path / "m.tflite", *written)
    assert len(predict(path).ops) == 5
    assert [t.elements for t in graphs.read(path).tensors if t.shape == (1, 8)] == [8, 8]
    builder.graph.tensors[free].shape = [2**31 - 1] * 40
    with pytest.raises(UsageError, match="corrupt"):
        predict(builder.save(path, *written))


def test_an_operator_newer_than_our_schema_is_told_by_its_number(tmp_path: Path) -> None:
    builder = Builder()
    written = builder.add("RELU", [builder.feed(1, 8)], 1, 8)
    builder.model.operatorCodes[0].builtinCode = 9999
    (op,) = predict(builder.save(tmp_path / "m.tflite", written)).ops
    assert (op.on, op.type) == ("cpu", "BUILTIN_9999")


def test_a_file_without_any_list_is_an_empty_graph(tmp_path: Path) -> None:
    builder = Builder()
    builder.graph.tensors = builder.graph.operators = builder.graph.inputs = None
    path = builder.save(tmp_path / "m.tflite")
    assert predict(path).ops == ()


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    builder = Builder()
    written = builder.convolve(builder.feed(1, 8, 8, 64), 1, 8, 8, 64, depth=64)
    whole = builder.save(tmp_path / "whole.tflite", written).read_bytes()
    cut = tmp_path / "cut.tflite"
    for size in (64, len(whole) // 2, len(whole) - 8):
        cut.write_bytes(whole[:size])
        with pytest.raises(UsageError):
            predict(cut)


def _pairs() -> list[Path]:
    return sorted(CORAL.glob("*_edgetpu.tflite"))


@pytest.mark.skipif(not _pairs(), reason=f"needs compiled models in {CORAL}")
def test_agreement_with_the_real_compiler() -> None:
    total = agree = 0
    for compiled in _pairs():
        source = compiled.with_name(compiled.name.replace("_edgetpu", ""))
        before, after = graphs.read(source), graphs.read(compiled)
        kept = {after.tensors[op.outputs[0]].name for op in after.operators if op.type != graphs.COMPILED}
        for op, placed in zip(before.operators, predict(source).ops, strict=True):
            truth = "cpu" if before.tensors[op.outputs[0]].name in kept else "accelerator"
            total, agree = total + 1, agree + (placed.on == truth)
    assert agree / total >= 0.95


@pytest.mark.skipif(not _pairs(), reason=f"needs compiled models in {CORAL}")
def test_bytes_of_parameters_are_those_in_the_compiled_file() -> None:
    for compiled in _pairs():
        source = graphs.read(compiled.with_name(compiled.name.replace("_edgetpu", "")))
        ours = sum(parameter_bytes(work_of(source, op)) for op in source.operators)
        assert ours == pytest.approx(compiled_parameter_bytes(compiled), rel=0.02)
        assert [op.on for op in predict(compiled).ops] == ["accelerator"]  # a compiled file is known as one


def test_a_file_that_was_not_compiled_has_no_compiled_parameters(tmp_path: Path) -> None:
    builder = Builder()
    path = builder.save(tmp_path / "m.tflite", builder.add("RELU", [builder.feed(1, 8)], 1, 8))
    with pytest.raises(UsageError, match="not compiled"):
        compiled_parameter_bytes(path)
    path.write_bytes(b"\x10\0\0\0DWN1" + b"\xff" * 16)
    with pytest.raises(UsageError, match="corrupt"):
        compiled_parameter_bytes(path)
