"""Integer and coded weights: what ONNX Runtime computes with them is what `edgeopt.calibration` says they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibration.codebooks import code_weight
from edgeopt.calibration.weights import quantize_weight
from edgeopt.exporter.onnx_embedding import quantize_embeddings
from edgeopt.exporter.onnx_products import block_size, pack_halves, takes_blocks, to_block_products
from edgeopt.exporter.onnx_storage import expand_at_load
from edgeopt.formats.onnx import read_ops
from edgeopt.types import Scheme

W8, W4 = Scheme("w8", "none"), Scheme("w4", "none")
GROUPS, D4 = Scheme("w4", "none", "per-group"), Scheme("8da4w", "dynamic", "per-group")


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) + np.float32(0.2)


def graph(
    nodes: list[onnx.NodeProto], shape: list[int | str], constants: Mapping[str, np.ndarray], ids: bool = False
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64 if ids else TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(proto)


def node(kind: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes)


def run(proto: onnx.ModelProto, x: np.ndarray, optimized: Path | None = None) -> np.ndarray:
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def nothing(node: onnx.NodeProto) -> bool:
    del node
    return False


def everything(node: onnx.NodeProto) -> bool:
    del node
    return True


def stored_bytes(proto: onnx.ModelProto) -> int:
    return sum(len(i.raw_data) for i in proto.graph.initializer)


# --- products -----------------------------------------------------------------------------------------------------


def linear(inputs: int, outputs: int, kind: str = "MatMul") -> onnx.ModelProto:
    if kind == "MatMul":
        return graph([node("MatMul", ["x", "w"], "y")], ["n", inputs], {"w": values(inputs, outputs)})
    constants = {"w": values(outputs, inputs), "b": values(outputs)}
    return graph([node("Gemm", ["x", "w", "b"], "y", transB=1)], ["n", inputs], constants)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "scheme",
    [
        W4,
        replace(W4, weight_granularity="per-tensor"),
        GROUPS,
        replace(GROUPS, group_size=64, weight_estimator="hqq"),
        replace(GROUPS, group_size=48),
        replace(GROUPS, scale="power-of-two"),
    ],
)
@pytest.mark.parametrize("inputs", [96, 100, 7])
def test_float_activations_meet_exactly_the_grid(scheme: Scheme, symmetric: bool, inputs: int) -> None:
    scheme = replace(scheme, weight_symmetric=symmetric)
    proto = linear(inputs, 20)
    result = to_block_products(proto, nothing, scheme)
    assert [n.op_type for n in result.graph.node] == ["MatMulNBits"]
    x = values(3, inputs)
    expected = x @ quantize_weight(values(inputs, 20), scheme, 1).dequantize()
    np.testing.assert_allclose(run(result, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", [D4, replace(D4, weight_symmetric=False), Scheme("w8a8", "dynamic", "per-group")])
def test_dynamic_activations_have_eight_bits(scheme: Scheme) -> None:
    x = values(16, 128)
    result = to_block_products(linear(128, 64), nothing, scheme)
    exact = x @ quantize_weight(values(128, 64), scheme, 1).dequantize()
    noise = np.square(run(result, x) - exact).mean() / np.square(exact).mean()
    assert 1e-7 < noise < 1e-3  # quantized indeed, and to about 8 bits
    assert [op.dtype for op in read_ops(result)] == [f"int{scheme.weight_bits}"]


def test_gemm_keeps_its_bias_and_its_name() -> None:
    result = to_block_products(linear(64, 20, "Gemm"), nothing, GROUPS)
    assert [(n.name, n.op_type) for n in result.graph.node] == [("y/Gemm", "MatMulNBits"), ("y/Gemm_bias", "Add")]
    expected = values(3, 64) @ quantize_weight(values(20, 64).T, GROUPS, 1).dequantize() + values(20)
    np.testing.assert_allclose(run(result, values(3, 64)), expected, rtol=1e-4, atol=1e-4)


def test_shared_matrix_is_stored_once_and_an_exempt_product_is_left() -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "w"], "b"), node("MatMul", ["b", "w"], "y")]
    proto = graph(nodes, ["n", 64], {"w": values(64, 64)})
    result = to_block_products(proto, lambda n: n.name == "b/MatMul", GROUPS)
    assert [n.op_type for n in result.graph.node] == ["MatMulNBits", "MatMul", "MatMulNBits"]
    assert len(result.graph.initializer) == 3
    assert run(result, values(2, 64)).shape == (2, 64)
    # What follows an operator that ONNX does not know still has a type.
    assert [op.dtype for op in read_ops(result)] == ["int4", "float32", "int4"]


@pytest.mark.parametrize(
    ("scheme", "columns", "expected"),
    [
        (GROUPS, 768, 32),
        (replace(GROUPS, group_size=768), 1024, 256),
        (replace(GROUPS, group_size=24), 768, None),
        (replace(GROUPS, group_size=24), 10, 16),
        (W4, 768, 256),
        (W4, 100, 128),
        (W4, 10, 16),
    ],
)
def test_block_size(scheme: Scheme, columns: int, expected: int | None) -> None:
    assert block_size(scheme, columns) == expected


def test_which_schemes_multiply_in_blocks() -> None:
    assert takes_blocks(D4)
    assert takes_blocks(Scheme("w8a8", "dynamic", weight_symmetric=False))
    assert not takes_blocks(Scheme("w8a8", "dynamic"))
    assert not takes_blocks(W8)
    assert not takes_blocks(replace(W4, weight_values="k-means"))


def test_halves_are_packed_low_first() -> None:
    assert pack_halves(np.array([[1, 2, 15]])).tolist() == [[0x21, 0x0F]]


# --- embeddings ---------------------------------------------------------------------------------------------------


def lookup(rows: int, columns: int) -> tuple[onnx.ModelProto, np.ndarray]:
    table = (values(rows, columns) * np.geomspace(0.01, 10, rows)[:, None]).astype(np.float32)
    table[0] = 0  # padding
    return graph([node("Gather", ["t", "x"], "y")], ["n", 3], {"t": table}, ids=True), table


IDS = np.array([[0, 1, 199], [5, 5, 100]])


@pytest.mark.parametrize("columns", [32, 33, 96])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("w8a8", "static"),
        Scheme("w8a8", "static", "per-tensor"),
        Scheme("w8a8", "static", weight_symmetric=False),
        Scheme("w8", "none", "per-group"),
        W4,
        GROUPS,
        replace(GROUPS, weight_symmetric=False),
        replace(W4, weight_granularity="per-tensor"),
    ],
)
def test_embedding_gives_rows_of_the_grid(scheme: Scheme, columns: int) -> None:
    proto, table = lookup(200, columns)
    result = quantize_embeddings(proto, nothing, scheme)
    expected = quantize_weight(table, scheme, 0).dequantize()[IDS]
    np.testing.assert_allclose(run(result, IDS), expected, rtol=1e-5, atol=1e-6)
    assert stored_bytes(result) < 0.45 * stored_bytes(proto)


def test_embedding_is_left_alone() -> None:
    proto, _ = lookup(200, 64)
    assert quantize_embeddings(proto, everything, W4) == proto
    assert [n.op_type for n in quantize_embeddings(proto, nothing, replace(GROUPS, group_size=24)).graph.node] == [
        "Gather"
    ]
    small, _ = lookup(10, 8)
    assert quantize_embeddings(small, nothing, W4).graph.node[0].op_type == "Gather"


# --- storage ------------------------------------------------------------------------------------------------------

SCHEMES = [
    W8,
    replace(W8, weight_symmetric=False),
    replace(W8, weight_granularity="per-tensor"),
    W4,
    GROUPS,
    replace(GROUPS, weight_symmetric=False, group_size=24),
    replace(W4, weight_values="k-means", weight_granularity="per-tensor"),
    replace(GROUPS, weight_values="k-means", group_size=200),
    replace(W8, weight_values="logarithmic", weight_granularity="per-tensor"),
    replace(W4, weight_values="logarithmic"),
]


def conv(kind: str) -> tuple[onnx.ModelProto, np.ndarray, int]:
    """A convolution of 24 channels, its weight, and the axis of output channels."""
    w = values(24, 24, 3, 3)
    return graph([node(kind, ["x", "w"], "y", pads=[1] * 4)], [1, 24, 9, 9], {"w": w}), w, int(kind != "Conv")


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_convolution_is_expanded_at_load(scheme: Scheme, kind: str, tmp_path: Path) -> None:
    proto, w, axis = conv(kind)
    result = expand_at_load(proto, nothing, scheme)
    linear = scheme.weight_values == "linear"
    real = quantize_weight(w, scheme, axis).dequantize() if linear else code_weight(w, scheme, axis).expand()
    reference = onnx.ModelProto()
    reference.CopyFrom(proto)
    reference.graph.initializer[0].CopyFrom(numpy_helper.from_array(real, "w"))
    x = values(1, 24, 9, 9)
    found = run(result, x, tmp_path / "after.onnx")
    np.testing.assert_allclose(found, run(reference, x, tmp_path / "before.onnx"), rtol=1e-4, atol=1e-4)
    assert stored_bytes(result) < stored_bytes(proto) / 2
    # Nothing is left to do at run time: the same kernels as the float model's.
    kernels = [[n.op_type for n in onnx.load(tmp_path / name).graph.node] for name in ("before.onnx", "after.onnx")]
    assert kernels[0] == kernels[1]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("made", "shape", "axis"),
    [
        (node("Gemm", ["x", "w"], "y"), (96, 40), 1),
        (node("Gemm", ["x", "w"], "y", transB=1), (40, 96), 0),
        (node("MatMul", ["x", "w"], "y"), (2, 96, 40), 2),
        (node("MatMul", ["w", "x"], "y"), (60, 5), 0),
    ],
)
def test_stored_products_have_their_channels_right(
    scheme: Scheme, made: onnx.NodeProto, shape: tuple[int, ...], axis: int
) -> None:
    w = values(*shape)
    proto = graph([made], [5, 96], {"w": w})
    result = expand_at_load(proto, nothing, scheme)
    linear = scheme.weight_values == "linear"
    real = quantize_weight(w, scheme, axis).dequantize() if linear else code_weight(w, scheme, axis).expand()
    if stored_bytes(result) == stored_bytes(proto):
        real = w  # a scale or a table for each short channel saves nothing
    x = values(5, 96)
    expected = {"Gemm": lambda: x @ (real if axis else real.T), "MatMul": lambda: x @ real if axis else real @ x}
    np.testing.assert_allclose(run(result, x), expected[made.op_type](), rtol=1e-4, atol=1e-3)


def test_lstm_weights_are_stored_too() -> None:
    constants = {"w": values(1, 64, 16), "r": values(1, 64, 16)}
    lstm = helper.make_node("LSTM", ["x", "w", "r"], ["y"], name="y/LSTM", hidden_size=16)
    proto = graph([lstm], [3, 1, 16], constants)
    result = expand_at_load(proto, nothing, W8)
    assert stored_bytes(result) < stored_bytes(proto) / 2
    np.testing.assert_allclose(run(result, values(3, 1, 16)), run(proto, values(3, 1, 16)), atol=0.03)


def test_what_would_not_shrink_or_is_exempt_stays_as_it_is() -> None:
    proto, _, _ = conv("Conv")
    assert expand_at_load(proto, everything, W8) == proto
    small = graph([node("Conv", ["x", "w"], "y")], [1, 8, 4, 4], {"w": values(4, 8, 1, 1)})
    assert expand_at_load(small, nothing, W8) == small
    # A table of 256 values for each channel is larger than the channels.
    assert expand_at_load(proto, nothing, replace(W8, weight_values="k-means")) == proto


def test_shared_weight_is_stored_once() -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "w"], "y")]
    result = expand_at_load(graph(nodes, ["n", 64], {"w": values(64, 64)}), nothing, W8)
    assert [n.op_type for n in result.graph.node] == ["Cast", "Mul", "MatMul", "MatMul"]
