"""Regression tests: graphs that ONNX Runtime's float16 and dynamic int8 converters get wrong when left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.exporter.onnx_convert import to_dynamic_int8, to_float16
from edgeopt.types import Scheme

DYNAMIC = Scheme("w8a8", "dynamic")


def graph(nodes: list[onnx.NodeProto], shape: list[int], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in constants.items()],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(proto)


def node(kind: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_an_operator_without_a_float16_form_stays_float32() -> None:
    proto = graph(
        [node("MatMul", ["x", "w"], "a"), node("Celu", ["a"], "b"), node("MatMul", ["b", "w"], "y")],
        [2, 8],
        {"w": values(8, 8)},
    )
    half = to_float16(proto)
    np.testing.assert_allclose(run(half, values(2, 8)), run(proto, values(2, 8)), atol=0.05)


def test_operators_that_stay_float32_may_share_a_tensor() -> None:
    # Regression: the converter casts the tensor once for each, under one name, which makes an invalid file.
    resizes = [node("Resize", ["a", "", "scales"], name, mode="nearest") for name in ("b", "c")]
    proto = graph(
        [node("Relu", ["x"], "a"), *resizes, node("Add", ["b", "c"], "y")],
        [1, 2, 4, 4],
        {"scales": np.array([1, 1, 2, 2])},
    )
    half = to_float16(proto)
    onnx.checker.check_model(half)
    x = values(1, 2, 4, 4)
    np.testing.assert_allclose(run(half, x), run(proto, x), atol=0.05)


def test_layer_norm_has_a_float16_form() -> None:
    proto = graph([node("LayerNormalization", ["x", "w"], "y")], [2, 8], {"w": values(8)})
    half = to_float16(proto)
    assert {i.data_type for i in half.graph.initializer} == {TensorProto.FLOAT16}


@pytest.mark.parametrize("order", [[1, 0, 2], [1, 2, 0], [0, 2, 1], None])
def test_float16_attention_with_the_sequence_first_loads(order: list[int] | None) -> None:
    # In float16, ONNX Runtime 1.31 crashes the process on some of these.
    perm = {} if order is None else {"perm": order}
    proto = graph(
        [node("Transpose", ["x"], "t", **perm), node("MatMul", ["t", "w"], "y")], [8, 8, 8], {"w": values(8, 8)}
    )
    x = values(8, 8, 8)
    np.testing.assert_allclose(run(to_float16(proto), x), run(proto, x), atol=0.05)


def shared_weight() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w", "b"], "first", transB=1),
        node("Relu", ["first"], "clipped"),
        node("Gemm", ["clipped", "w"], "y", transB=1),
    ]
    return graph(nodes, [3, 16], {"w": values(16, 16), "b": values(16)})


def test_dynamic_int8_of_layers_that_share_a_weight() -> None:
    proto = shared_weight()
    expected, found = run(proto, values(3, 16)), run(to_dynamic_int8(proto, lambda _: False, DYNAMIC), values(3, 16))
    assert np.square(expected).sum() / np.square(expected - found).sum() > 1e3  # 30 dB


def test_dynamic_int8_leaves_an_exempted_gemm_float() -> None:
    proto = shared_weight()
    kept = to_dynamic_int8(proto, lambda n: n.name == "first/Gemm", DYNAMIC)
    kinds = {n.name: n.op_type for n in kept.graph.node}
    assert kinds["first/Gemm"] == "MatMul"
    assert "MatMulInteger" in kinds.values()


def test_dynamic_int8_with_every_layer_exempted_is_exact_and_keeps_no_spare_weight() -> None:
    proto = shared_weight()
    kept = to_dynamic_int8(proto, lambda _: True, DYNAMIC)
    np.testing.assert_allclose(run(kept, values(3, 16)), run(proto, values(3, 16)), rtol=1e-5)
    assert [list(i.dims) for i in kept.graph.initializer].count([16, 16]) == 1
