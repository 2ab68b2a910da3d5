"""A weight that a graph reads in two forms is stored once, and computes what it did."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.exporter.onnx_embedding import quantize_embeddings
from edgeopt.exporter.onnx_products import to_block_products
from edgeopt.exporter.onnx_shared import store_once, with_own_copies
from edgeopt.types import Array, Scheme

ROWS, WIDTH = 80, 64
TABLE = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)


def tied(product: Array | None = None) -> onnx.ModelProto:
    """ids -> rows of a table -> their products with all rows of it."""
    weights = {"head": TABLE.T.copy() if product is None else product, "table": TABLE}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], name="embed/Gather", axis=0),
        helper.make_node("MatMul", ["rows", "head"], ["logits"], name="head/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "main_graph",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [2, weights["head"].shape[1]])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(proto: onnx.ModelProto) -> Array:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    logits: Array = session.run(None, {"ids": np.array([5, 79])})[0]
    return logits


def stored(proto: onnx.ModelProto) -> list[str]:
    return sorted(tensor.name for tensor in proto.graph.initializer)


def never(_: onnx.NodeProto) -> bool:
    return False


def test_the_transpose_of_a_table_is_made_from_the_table() -> None:
    proto = tied()
    before, size = run(proto), proto.ByteSize()
    store_once(proto)
    onnx.checker.check_model(proto)
    assert stored(proto) == ["table"]
    assert proto.ByteSize() < 0.6 * size
    np.testing.assert_array_equal(run(proto), before)


def test_who_rewrites_the_graph_finds_the_weights_again() -> None:
    proto = tied()
    before = run(proto)
    store_once(proto)
    restored = with_own_copies(proto)
    assert stored(restored) == ["head", "table"]
    assert [node.op_type for node in restored.graph.node] == ["Gather", "MatMul"]
    np.testing.assert_array_equal(run(restored), before)


def test_what_only_looks_alike_stays() -> None:
    other = TABLE.T.copy()
    other[3, 4] += 1
    proto = tied(other)
    store_once(proto)
    assert stored(proto) == ["head", "table"]


def test_a_symmetric_matrix_is_not_its_own_source() -> None:
    symmetric = np.ones((WIDTH, WIDTH), np.float32)
    proto = tied(symmetric)
    store_once(proto)
    assert stored(proto) == ["head", "table"]


def test_a_constant_that_leaves_the_graph_stays_one() -> None:
    proto = tied()
    proto.graph.output.append(helper.make_tensor_value_info("head", TensorProto.FLOAT, [WIDTH, ROWS]))
    store_once(proto)
    assert "head" in stored(proto)


def test_weights_and_scales_that_a_graph_computes_are_let_be() -> None:
    """Regression: a product whose blocks, or a lookup whose scale, is no constant raised KeyError."""
    scheme = Scheme("8da4w", "dynamic", "per-group")
    for kind, place in (("MatMulNBits", 1), ("MatMulNBits", 2), ("GatherBlockQuantized", 2)):
        proto = to_block_products(quantize_embeddings(tied(), never, scheme), never, scheme)
        [node] = [node for node in proto.graph.node if node.op_type == kind]
        proto.graph.node.insert(0, helper.make_node("Identity", [node.input[place]], ["computed"]))
        [node] = [node for node in proto.graph.node if node.op_type == kind]
        node.input[place] = "computed"
        before = run(proto)
        store_once(proto)
        np.testing.assert_array_equal(run(proto), before)


@pytest.mark.parametrize(
    "scheme", [Scheme("8da4w", "dynamic", "per-group"), Scheme("8da4w", "dynamic"), Scheme("w4", "none", "per-group")]
)
def test_four_bit_rows_are_made_from_the_blocks_of_the_product(scheme: Scheme) -> None:
    proto = to_block_products(quantize_embeddings(tied(), never, scheme), never, scheme)
    before = run(proto)
    store_once(proto)
    onnx.checker.check_model(proto)
    assert [node.op_type for node in proto.graph.node].count("Reshape") == 1
    assert "table_blocks4" not in stored(proto)
    np.testing.assert_allclose(run(proto), before, rtol=1e-5, atol=1e-5)
