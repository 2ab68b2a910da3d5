"""Weights are kept out of a graph while it is simplified, and come back as they were."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.exporter import onnx_aside
from edgeopt.exporter.onnx_aside import put_back, set_aside


@pytest.fixture(autouse=True)
def every_graph_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_aside, "LARGE", 1)


def _graph() -> onnx.ModelProto:
    """table -> rows -> product with a transposed weight -> scaled; the scale is a large constant of a Mul."""
    generator = np.random.default_rng(0)
    arrays = {"table": (300, 128), "weight": (256, 128), "scale": (200, 256), "small": (1,)}
    constants = [numpy_helper.from_array(generator.normal(size=s).astype(np.float32), n) for n, s in arrays.items()]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "turned"], ["product"]),
        helper.make_node("Mul", ["product", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "small"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [200])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [200, 256])],
        constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], producer_name="test")
    onnx.checker.check_model(proto)
    return proto


def _run(proto: onnx.ModelProto) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    (out,) = ReferenceEvaluator(proto).run(None, {"ids": np.arange(200)})
    return np.asarray(out)


def test_only_weights_that_no_simplification_looks_at_leave() -> None:
    proto = _graph()
    light, weights = set_aside(proto)
    assert set(weights) == {"table", "weight"}  # a Mul's constant may be folded into something
    assert {i.name for i in light.graph.initializer} == {"scale", "small"}
    assert [i.name for i in light.graph.input] == ["ids", "table", "weight"]
    assert light.ByteSize() < proto.ByteSize() / 1.5
    assert (light.producer_name, light.opset_import[0].version) == ("test", 18)
    onnx.checker.check_model(light)


def test_they_come_back_transposed_where_the_graph_transposes_them() -> None:
    proto = _graph()
    expected = _run(proto)
    light, weights = set_aside(proto)
    put_back(light, weights)
    onnx.checker.check_model(light)
    assert [i.name for i in light.graph.input] == ["ids"]
    assert "Transpose" not in {node.op_type for node in light.graph.node}
    assert {i.name for i in light.graph.initializer} == {"table", "turned", "scale", "small"}
    assert not weights
    np.testing.assert_array_equal(_run(light), expected)


def test_a_weight_that_an_output_or_an_input_is_stays() -> None:
    proto = _graph()
    proto.graph.output.append(helper.make_tensor_value_info("table", TensorProto.FLOAT, [300, 128]))
    assert set(set_aside(proto)[1]) == {"weight"}


def test_a_weight_that_nothing_reads_is_dropped() -> None:
    """Of a part of a larger network, which brings all of its weights: as an input it would stay."""
    proto = _graph()
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((200, 200), np.float32), "unread"))
    light, weights = set_aside(proto)
    assert "unread" not in {*weights, *(i.name for i in light.graph.initializer), *(i.name for i in light.graph.input)}


def test_what_the_body_of_a_branch_reads_stays() -> None:
    proto = _graph()
    body = helper.make_graph(
        [helper.make_node("Identity", ["weight"], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [256, 128])],
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    proto.graph.node.append(helper.make_node("If", ["always"], ["other"], then_branch=body, else_branch=body))
    assert set(set_aside(proto)[1]) == {"table"}


def test_a_small_graph_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_aside, "LARGE", 1 << 28)
    proto = _graph()
    light, weights = set_aside(proto)
    assert light is proto
    assert not weights
