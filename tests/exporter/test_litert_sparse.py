"""Which 1x1 convolutions XNNPACK's sparse kernels take, and how they are stored; files are made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgeopt.errors import UsageError
from edgeopt.exporter.litert_sparse import write_sparse
from edgeopt.formats import summarize

KINDS, OPTIONS, SAME, VALID = schema.BuiltinOperator, schema.BuiltinOptions, schema.Padding.SAME, schema.Padding.VALID


class Builder:
    """A .tflite graph, operator by operator. Images are (1, H, W, C)."""

    def __init__(self) -> None:
        self.model, self.graph = schema.ModelT(), schema.SubGraphT()
        self.model.version, self.model.buffers, self.model.operatorCodes = 3, [schema.BufferT()], []
        self.model.subgraphs = [self.graph]
        self.graph.tensors, self.graph.operators = [], []
        self._random = np.random.default_rng(0)

    def tensor(self, shape: tuple[int, ...], data: np.ndarray | None = None, name: str = "") -> int:
        tensor, types = schema.TensorT(), schema.TensorType
        tensor.name, tensor.shape = (name or f"t{len(self.graph.tensors)}").encode(), np.array(shape, np.int32)
        tensor.type = types.FLOAT32
        tensor.buffer = 0
        if data is not None:
            tensor.type = {"int32": types.INT32, "float16": types.FLOAT16}.get(data.dtype.name, types.FLOAT32)
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data.tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            tensor.buffer = len(self.model.buffers) - 1
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def constant(self, values: object, dtype: str = "float32") -> int:
        data = np.asarray(values, dtype)
        return self.tensor(data.shape, data)

    def operator(
        self, kind: int, inputs: list[int], shape: tuple[int, ...], options: object = None, name: str = ""
    ) -> int:
        codes = [code.builtinCode for code in self.model.operatorCodes]
        if kind not in codes:
            code = schema.OperatorCodeT()
            code.builtinCode, code.deprecatedBuiltinCode, code.version = kind, min(kind, 127), 1
            self.model.operatorCodes.append(code)
            codes.append(kind)
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs = codes.index(kind), np.array(inputs, np.int32)
        if options is not None:
            operator.builtinOptionsType = getattr(OPTIONS, type(options).__name__.removesuffix("T"))
            operator.builtinOptions = options
        output = self.tensor(shape, name=name)
        operator.outputs = np.array([output], np.int32)
        self.graph.operators.append(operator)
        return output

    def shape(self, tensor: int) -> tuple[int, ...]:
        return tuple(int(n) for n in self.graph.tensors[tensor].shape)

    def conv(
        self, x: int, outputs: int, kernel: int, *, stride: int = 1, padding: int = SAME, zeros: float = 0.0,
        name: str = "", weights: int | None = None, half: bool = False, depthwise: bool = False,
    ) -> int:  # fmt: skip
        _, height, width, channels = self.shape(x)
        if weights is None:
            shape = (1, kernel, kernel, channels) if depthwise else (outputs, kernel, kernel, channels)
            values = self._random.normal(size=shape) * (2 / (kernel * kernel * channels)) ** 0.5
            values[self._random.random(shape) < zeros] = 0
            weights = self.constant(values, "float16" if half else "float32")
            if half:
                weights = self.operator(KINDS.DEQUANTIZE, [weights], shape)
        options = schema.DepthwiseConv2DOptionsT() if depthwise else schema.Conv2DOptionsT()
        options.padding, options.strideH, options.strideW = padding, stride, stride
        if isinstance(options, schema.DepthwiseConv2DOptionsT):
            options.depthMultiplier = 1
        cut = kernel - 1 if padding == VALID else 0
        size = (1, -(-(height - cut) // stride), -(-(width - cut) // stride), outputs)
        kind = KINDS.DEPTHWISE_CONV_2D if depthwise else KINDS.CONV_2D
        return self.operator(kind, [x, weights, self.constant(np.zeros(outputs))], size, options, name)

    def pad(self, x: int, margin: int) -> int:
        _, height, width, channels = self.shape(x)
        amounts = self.constant([[0, 0], [margin, margin], [margin, margin], [0, 0]], "int32")
        size = (1, height + 2 * margin, width + 2 * margin, channels)
        return self.operator(KINDS.PAD, [x, amounts], size, schema.PadOptionsT())

    def add(self, left: int, right: int) -> int:
        return self.operator(KINDS.ADD, [left, right], self.shape(left), schema.AddOptionsT())

    def mean(self, x: int, axes: tuple[int, ...] = (1, 2)) -> int:
        shape = tuple(n for axis, n in enumerate(self.shape(x)) if axis not in axes)
        return self.operator(KINDS.MEAN, [x, self.constant(axes, "int32")], shape, schema.ReducerOptionsT())

    def dense(self, x: int, outputs: int) -> int:
        weights = self.constant(self._random.normal(size=(outputs, self.shape(x)[1])))
        inputs = [x, weights, self.constant(np.zeros(outputs))]
        return self.operator(KINDS.FULLY_CONNECTED, inputs, (1, outputs), schema.FullyConnectedOptionsT(), "head")

    def write(self, path: Path, inputs: list[int], outputs: list[int]) -> Path:
        self.graph.inputs, self.graph.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        flatbuffer_utils.write_model(self.model, str(path))
        return path


def _stem(b: Builder, padding: str = "explicit") -> tuple[int, int]:
    image = b.tensor((1, 32, 32, 3), name="image")
    if padding == "explicit":
        return image, b.conv(b.pad(image, 1), 16, 3, stride=2, padding=VALID, name="stem")
    return image, b.conv(image, 16, 3, stride=2, name="stem")


def _network(
    path: Path, *, zeros: float = 0.85, stem: str = "explicit", half: bool = False,
    middle: Callable[[Builder, int], int] | None = None, pooled: Callable[[Builder, int], int] = Builder.mean,
) -> Path:  # fmt: skip
    """A stem, two 1x1 convolutions with a depthwise one between, a residual, pooling, a dense classifier."""
    b = Builder()
    image, x = _stem(b, stem)
    x = b.conv(x, 64, 1, zeros=zeros, name="expand", half=half)
    if middle:
        x = middle(b, x)
    y = b.conv(b.conv(x, 64, 3, depthwise=True, name="depthwise"), 64, 1, zeros=zeros, name="project", half=half)
    x = pooled(b, b.add(x, y))
    return b.write(path, [image], [b.dense(x, 10)])


def _run(path: Path) -> np.ndarray:
    interpreter = litert.Interpreter(str(path))
    interpreter.allocate_tensors()
    image = np.random.default_rng(1).normal(size=(1, 32, 32, 3)).astype(np.float32)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
    interpreter.invoke()
    result: np.ndarray = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return result


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_a_network_that_fits_is_stored_sparse_and_computes_the_same(half: bool, tmp_path: Path) -> None:
    source = _network(tmp_path / "dense.tflite", half=half)
    layers = write_sparse(source, tmp_path / "sparse.tflite")
    assert [(layer.name, layer.elements, layer.refusal) for layer in layers] == [
        ("expand", 16 * 64, None),
        ("project", 64 * 64, None),
    ]
    assert all(0.8 < layer.zeros < 0.9 for layer in layers)
    np.testing.assert_allclose(_run(tmp_path / "sparse.tflite"), _run(source), rtol=1e-3, atol=1e-4)
    dense, sparse = summarize(source), summarize(tmp_path / "sparse.tflite")
    assert sparse.signature == dense.signature
    types = [op.type for op in sparse.ops]
    assert types.count("DENSIFY") == 2
    # Else XNNPACK would count the classifier's dense weights among those of the 1x1 convolutions.
    assert types[types.index("MEAN") + 1] == "RESHAPE"
    assert sparse.size_bytes < dense.size_bytes


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    source = _network(tmp_path / "dense.tflite")
    for name in "ab":
        write_sparse(source, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_values_and_indices_are_those_of_the_weights(tmp_path: Path) -> None:
    source = _network(tmp_path / "dense.tflite")
    write_sparse(source, tmp_path / "sparse.tflite")
    dense, sparse = (flatbuffer_utils.read_model(str(tmp_path / f"{n}.tflite")) for n in ("dense", "sparse"))
    before = {t.name: t for t in dense.subgraphs[0].tensors}
    found = [t for t in sparse.subgraphs[0].tensors if t.sparsity is not None]
    assert len(found) == 2
    for tensor in found:
        weights = np.frombuffer(
            bytes(dense.buffers[before[tensor.name.removesuffix(b":sparse")].buffer].data), np.float32
        )
        values = np.frombuffer(bytes(sparse.buffers[tensor.buffer].data), np.float32)
        rows = tensor.sparsity.dimMetadata[3]
        starts, columns = np.array(rows.arraySegments.values, int), np.array(rows.arrayIndices.values, int)
        restored = np.zeros(tuple(tensor.shape), np.float32)
        for row in range(tensor.shape[0]):
            part = slice(starts[row], starts[row + 1])
            restored[row, 0, 0, columns[part]] = values[part]
        np.testing.assert_array_equal(restored.ravel(), weights)


def _wide_conv(b: Builder, x: int) -> int:
    return b.conv(x, 64, 3, name="wide")


def _strided_same(b: Builder, x: int) -> int:
    return b.conv(x, 64, 3, stride=2, depthwise=True, name="down")


def _strided_padded(b: Builder, x: int) -> int:
    return b.conv(b.pad(x, 1), 64, 3, stride=2, padding=VALID, depthwise=True, name="down")


def _seven(b: Builder, x: int) -> int:
    return b.conv(x, 64, 7, depthwise=True, name="seven")


def _over_width(b: Builder, x: int) -> int:
    options = schema.SoftmaxOptionsT()
    options.beta = 1.0
    return b.operator(KINDS.SOFTMAX, [x], b.shape(x), options, "softmax")


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (_wide_conv, "CONV_2D in 'wide': a full convolution that is not 3x3 with stride 2 on three channels"),
        (_strided_same, "DEPTHWISE_CONV_2D in 'down': needs 1 zeros on every side; TensorFlow's SAME padding"),
        (_seven, "DEPTHWISE_CONV_2D in 'seven': kernels are for 3x3 and 5x5"),
        (_over_width, "SOFTMAX in 'softmax': XNNPACK has no NCHW kernel for it"),
    ],
)
def test_one_misfit_takes_its_neighbours_out_and_is_named(
    middle: Callable[[Builder, int], int], reason: str, tmp_path: Path
) -> None:
    layers = write_sparse(_network(tmp_path / "dense.tflite", middle=middle), tmp_path / "sparse.tflite")
    assert [reason in (layer.refusal or "") for layer in layers] == [True, True]
    assert not (tmp_path / "sparse.tflite").exists()


def test_a_merged_pad_fits(tmp_path: Path) -> None:
    source = _network(tmp_path / "dense.tflite", middle=_strided_padded)
    layers = write_sparse(source, tmp_path / "sparse.tflite")
    assert [layer.refusal for layer in layers] == [None, None]


def test_a_stem_with_same_padding_is_the_reason(tmp_path: Path) -> None:
    layers = write_sparse(_network(tmp_path / "dense.tflite", stem="same"), tmp_path / "sparse.tflite")
    assert all("CONV_2D in 'stem': needs 1 zeros on every side" in (layer.refusal or "") for layer in layers)


def test_too_few_zeros(tmp_path: Path) -> None:
    layers = write_sparse(_network(tmp_path / "dense.tflite", zeros=0.5), tmp_path / "sparse.tflite")
    assert all("of all 1x1 weights around it are zero; XNNPACK wants over 67 %" in str(la.refusal) for la in layers)
    assert not (tmp_path / "sparse.tflite").exists()


def test_a_layer_below_the_callers_share_stays_dense(tmp_path: Path) -> None:
    layers = write_sparse(_network(tmp_path / "dense.tflite"), tmp_path / "sparse.tflite", min_zeros=0.99)
    assert all("of its weights are zero, less than 99%" in str(layer.refusal) for layer in layers)


def test_no_pooling_at_the_end(tmp_path: Path) -> None:
    b = Builder()
    image, x = _stem(b)
    x = b.conv(x, 64, 1, zeros=0.9, name="expand")
    source = b.write(tmp_path / "dense.tflite", [image], [x])
    (layer,) = write_sparse(source, tmp_path / "sparse.tflite")
    assert layer.refusal == "the result of 'expand' is an output of the model"


def test_a_feature_that_is_also_an_output(tmp_path: Path) -> None:
    b = Builder()
    image, x = _stem(b)
    x = b.conv(x, 64, 1, zeros=0.9, name="expand")
    y = b.conv(x, 64, 1, zeros=0.9, name="project")
    source = b.write(tmp_path / "dense.tflite", [image], [b.dense(b.mean(y), 10), x])
    layers = write_sparse(source, tmp_path / "sparse.tflite")
    assert {layer.refusal for layer in layers} == {"the result of 'expand' is an output of the model"}


def test_no_stem(tmp_path: Path) -> None:
    b = Builder()
    features = b.tensor((1, 8, 8, 32), name="features")
    x = b.conv(features, 64, 1, zeros=0.9, name="expand")
    source = b.write(tmp_path / "dense.tflite", [features], [b.dense(b.mean(x), 10)])
    (layer,) = write_sparse(source, tmp_path / "sparse.tflite")
    assert layer.refusal == "no 3x3 stride-2 convolution comes before 'expand'"


def test_pooling_over_other_axes(tmp_path: Path) -> None:
    def across_channels(b: Builder, x: int) -> int:
        mean = b.mean(x, (2, 3))
        return b.operator(KINDS.RESHAPE, [mean, b.constant([1, 16], "int32")], (1, 16), schema.ReshapeOptionsT())

    layers = write_sparse(_network(tmp_path / "dense.tflite", pooled=across_channels), tmp_path / "sparse.tflite")
    assert all("pools over other than height and width" in str(layer.refusal) for layer in layers)


def test_shared_weights_stay_dense(tmp_path: Path) -> None:
    b = Builder()
    image, x = _stem(b)
    values = np.random.default_rng(0).normal(size=(16, 1, 1, 16))
    values[np.abs(values) < 1.5] = 0
    weights = b.constant(values)
    for number in range(2):
        x = b.conv(x, 16, 1, weights=weights, name=f"twice{number}")
    source = b.write(tmp_path / "dense.tflite", [image], [b.dense(b.mean(x), 10)])
    layers = write_sparse(source, tmp_path / "sparse.tflite")
    assert [layer.refusal for layer in layers] == ["its weights are shared with another operator"] * 2


def test_weights_that_xnnpack_can_not_count_rule_the_file_out(tmp_path: Path) -> None:
    b = Builder()
    image, x = _stem(b)
    x = b.mean(b.conv(x, 64, 1, zeros=0.9, name="expand"))
    computed = b.tensor((10, 64), name="computed")
    inputs = [x, computed, b.constant(np.zeros(10))]
    y = b.operator(KINDS.FULLY_CONNECTED, inputs, (1, 10), schema.FullyConnectedOptionsT(), "product")
    source = b.write(tmp_path / "dense.tflite", [image, computed], [y])
    (layer,) = write_sparse(source, tmp_path / "sparse.tflite")
    assert layer.refusal == "FULLY_CONNECTED in 'product' has weights that are not float constants"


def test_no_convolution_at_all(tmp_path: Path) -> None:
    b = Builder()
    x = b.tensor((1, 8), name="x")
    assert write_sparse(b.write(tmp_path / "d.tflite", [x], [b.dense(x, 3)]), tmp_path / "s.tflite") == ()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a share"):
        write_sparse(_network(tmp_path / "dense.tflite"), tmp_path / "sparse.tflite", min_zeros=0)
    (tmp_path / "text.tflite").write_text("no model")
    with pytest.raises(UsageError, match="not a LiteRT file"):
        write_sparse(tmp_path / "text.tflite", tmp_path / "sparse.tflite")
