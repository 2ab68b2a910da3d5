"""Static quantization of hand-made graphs: what becomes integer, what stays float, and that results stay close."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibration.ranges import Range
from edgeopt.exporter.onnx_plan import Plan, Role
from edgeopt.exporter.onnx_qdq import quantize_graph
from edgeopt.exporter.onnx_rewrite import for_int8
from edgeopt.formats.onnx import read_ops
from edgeopt.types import Scheme

RNG = np.random.default_rng(0)


W8A8 = Scheme("w8a8", "static")


def node(kind: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes)


def graph(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, list[int | str]],
    outputs: list[str],
    constants: Mapping[str, object] | None = None,
    types: Mapping[str, int] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    kinds = types or {}
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), None) for n in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(proto)


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def run(proto: onnx.ModelProto, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)


def kernels(proto: onnx.ModelProto, tmp_path: Path) -> list[str]:
    """What ONNX Runtime makes of the graph."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]


def quantized(
    proto: onnx.ModelProto, feed: Mapping[str, np.ndarray], exempt: str = "", scheme: Scheme = W8A8
) -> tuple[Plan, onnx.ModelProto]:
    """Plan, ranges from one run, and the QDQ graph."""

    def stays(n: onnx.NodeProto) -> bool:
        return bool(exempt) and n.name.startswith(f"{exempt}/")

    prepared = for_int8(proto, stays)
    plan = Plan(prepared, stays, scheme)
    inner = [n for n in plan.observed if n not in feed]
    exposing = onnx.ModelProto()
    exposing.CopyFrom(prepared)
    del exposing.graph.output[:]
    exposing.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in inner)
    values = dict(feed) | (dict(zip(inner, run(exposing, feed), strict=True)) if inner else {})
    ranges = {n: Range(float(values[n].min()), float(values[n].max())) for n in plan.observed}
    result = quantize_graph(prepared, plan, ranges, scheme)
    onnx.checker.check_model(result, full_check=True)
    return plan, result


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    noise = float(((reference.astype(np.float64) - other) ** 2).sum())
    return 10 * np.log10(float((reference.astype(np.float64) ** 2).sum()) / max(noise, 1e-30))


IMAGE = {"x": RNG.standard_normal((1, 8, 10, 10)).astype(np.float32)}


def mobile_block() -> onnx.ModelProto:
    """conv -> hardswish -> depthwise conv -> squeeze-excite (hardsigmoid) -> conv -> residual add -> conv."""
    nodes = [
        node("Conv", ["x", "w0", "b0"], "expand"),
        node("HardSwish", ["expand"], "act"),
        node("Conv", ["act", "w1"], "depthwise", group=16, pads=[1, 1, 1, 1]),
        node("ReduceMean", ["depthwise", "axes"], "pool", keepdims=1),
        node("Conv", ["pool", "w2"], "squeeze"),
        node("Relu", ["squeeze"], "relu"),
        node("Conv", ["relu", "w3"], "excite"),
        node("HardSigmoid", ["excite"], "gate", alpha=1 / 6, beta=0.5),
        node("Mul", ["depthwise", "gate"], "gated"),
        node("Conv", ["gated", "w4"], "project"),
        node("Add", ["project", "x"], "sum"),
        node("Conv", ["sum", "w4b"], "out"),
    ]
    constants = {
        "w0": weight(16, 8, 1, 1), "b0": weight(16), "w1": weight(16, 1, 3, 3), "axes": np.array([-1, -2]),
        "w2": weight(4, 16, 1, 1), "w3": weight(16, 4, 1, 1), "w4": weight(8, 16, 1, 1), "w4b": weight(8, 8, 1, 1),
    }  # fmt: skip
    return graph(nodes, {"x": ["n", 8, 10, 10]}, ["out"], constants)


def test_mobile_block_runs_in_integer_kernels_only(tmp_path: Path) -> None:
    proto = mobile_block()
    _, result = quantized(proto, IMAGE, scheme=replace(W8A8, io="int8"))
    kinds = set(kernels(result, tmp_path))
    assert kinds <= {"QLinearConv", "QLinearMul", "QLinearAdd", "QLinearGlobalAveragePool", "Transpose"}


def test_mobile_block_stays_close_to_float() -> None:
    proto = mobile_block()
    _, result = quantized(proto, IMAGE)
    assert sqnr(run(proto, IMAGE)[0], run(result, IMAGE)[0]) > 25


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("w8a8", "static", weight_granularity="per-tensor"),
        Scheme("w8a8", "static", activation_symmetric=True),
        Scheme("w8a8", "static", weight_symmetric=False),
        Scheme("w8a8", "static", weight_estimator="mse"),
        Scheme("w8a8", "static", scale="power-of-two"),
    ],
)
def test_other_schemes_stay_close_too(scheme: Scheme) -> None:
    proto = mobile_block()
    _, result = quantized(proto, IMAGE, scheme=scheme)
    assert sqnr(run(proto, IMAGE)[0], run(result, IMAGE)[0]) > 20
    constants = {i.name: numpy_helper.to_array(i) for i in result.graph.initializer}
    scales = {name: values for name, values in constants.items() if "_scale" in name or name.startswith("scale_")}
    weight_scales = [values for name, values in scales.items() if name.endswith("_weight_scale")]
    assert any(values.ndim for values in weight_scales) == (scheme.weight_granularity == "per-channel")
    if scheme.activation_symmetric:
        # 0: the unit range of a gate
        assert {name for name in constants if name.startswith("zero_point_")} <= {"zero_point_128", "zero_point_0"}
    shifted = [name for name, values in constants.items() if name.endswith("_weight_zero_point") and values.any()]
    assert bool(shifted) == (not scheme.weight_symmetric)
    if scheme.scale == "power-of-two":
        assert all(np.all(np.frexp(values)[0] == 0.5) for values in scales.values())


def test_power_of_two_scales_leave_a_slope_that_is_none_in_float() -> None:
    plan, _ = quantized(mobile_block(), IMAGE, scheme=replace(W8A8, scale="power-of-two"))
    assert "gate/HardSigmoid" not in plan.roles
    assert "gate/HardSigmoid" in quantized(mobile_block(), IMAGE)[0].roles


@pytest.mark.parametrize(("factor", "scale", "role"), [
    (0.125, "power-of-two", Role.RESCALE), (0.1, "power-of-two", Role.JOIN), (0.1, "any", Role.RESCALE),
])  # fmt: skip
def test_which_factors_a_scale_takes_over(factor: float, scale: str, role: Role) -> None:
    nodes = [node("Conv", ["x", "w"], "c"), node("Mul", ["c", "k"], "m"), node("Conv", ["m", "w"], "y")]
    constants = {"w": weight(8, 8, 1, 1), "k": np.float32(factor)}
    proto = graph(nodes, {"x": [1, 8, 10, 10]}, ["y"], constants)
    plan, result = quantized(proto, IMAGE, scheme=replace(W8A8, scale=scale))
    assert plan.roles["m/Mul"] is role
    assert sqnr(run(proto, IMAGE)[0], run(result, IMAGE)[0]) > 25


def test_sixteen_bit_activations_lose_almost_nothing_beside_the_weights() -> None:
    proto = mobile_block()
    proto.opset_import[0].version = 21
    _, narrow = quantized(proto, IMAGE)
    _, wide = quantized(proto, IMAGE, scheme=Scheme("w8a16", "static"))
    reference = run(proto, IMAGE)[0]
    assert sqnr(reference, run(wide, IMAGE)[0]) > sqnr(reference, run(narrow, IMAGE)[0]) + 6
    written = {i.data_type for i in wide.graph.initializer if i.name.startswith("zero_point_")}
    assert written == {TensorProto.UINT16}


def test_range_of_a_moved_tensor_is_that_of_its_origin() -> None:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("Mul", ["c", "k"], "m"),
        node("Reshape", ["m", "shape"], "r"),
        node("Gemm", ["r", "v"], "y", transB=1),
    ]
    constants = {"w": weight(8, 8, 1, 1), "k": np.float32(0.5), "shape": np.array([1, -1]), "v": weight(4, 800)}
    plan, _ = quantized(graph(nodes, {"x": [1, 8, 10, 10]}, ["y"], constants), IMAGE)
    assert plan.origin("r") == ("c", 0.5)
    assert plan.origin("x") == ("x", 1.0)


def test_relu_is_folded_into_the_kernel_and_only_its_output_is_observed() -> None:
    proto = mobile_block()
    plan, result = quantized(proto, IMAGE)
    assert plan.roles["relu/Relu"] is Role.FOLDED
    assert "squeeze" not in plan.observed
    assert "relu" in plan.observed
    assert not [n for n in result.graph.node if n.op_type == "Relu"]


def clipped_chain() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("Clip", ["c", "low", "high"], "r"),
        node("Conv", ["r", "w"], "d"),
        node("Clip", ["d", "low", "high"], "y"),
    ]
    constants = {"w": weight(8, 8, 1, 1), "low": np.float32(0), "high": np.float32(0.3)}
    return graph(nodes, {"x": [1, 8, 10, 10]}, ["y"], constants)


@pytest.mark.parametrize("io", ["float", "int8"])
def test_scale_that_was_rounded_up_still_clips(io: str, tmp_path: Path) -> None:
    # Regression: the range of a folded ReLU6 grew beyond 6 with a power-of-two scale.
    proto = clipped_chain()
    _, result = quantized(proto, IMAGE, scheme=replace(W8A8, scale="power-of-two", io=io))
    assert [n.name for n in result.graph.node if n.op_type == "Clip"] == ["r/Clip", "y/Clip"]
    assert [o.name for o in result.graph.output] == ["y"]
    assert "Conv" not in kernels(result, tmp_path)
    if io == "float":
        assert sqnr(run(proto, IMAGE)[0], run(result, IMAGE)[0]) > 25
    _, plain = quantized(proto, IMAGE)
    assert not [n for n in plain.graph.node if n.op_type == "Clip"]


@pytest.mark.parametrize("bounds", [Range(0.0, 0.4), Range(-0.15, 0.3), Range(-0.25, 0.5), Range(0.0, 0.25)])
def test_range_wider_than_the_folded_clip_still_clips(bounds: Range) -> None:
    proto = clipped_chain()
    plan, _ = quantized(proto, IMAGE)
    ranges = {"x": Range(-4.0, 4.0), "r": bounds, "y": Range(-0.1, 0.5)}
    found = run(quantize_graph(proto, plan, ranges, W8A8), IMAGE)[0]
    assert found.min() >= 0
    assert found.max() == pytest.approx(0.3, abs=0.6 / 255)
    assert sqnr(run(proto, IMAGE)[0], found) > (20 if bounds.max >= 0.3 else 12)


def test_relu_read_twice_before_it_is_kept() -> None:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("Relu", ["c"], "r"),
        node("Add", ["c", "r"], "s"),
        node("Conv", ["s", "w"], "y"),
    ]
    proto = graph(nodes, IMAGE | {"x": [1, 8, 10, 10]}, ["y"], {"w": weight(8, 8, 1, 1)})
    plan, result = quantized(proto, IMAGE)
    assert plan.roles["r/Relu"] is Role.JOIN
    assert sqnr(run(proto, IMAGE)[0], run(result, IMAGE)[0]) > 30


@pytest.mark.parametrize(("window", "stride", "pad"), [(64, 64, 0), (3, 2, 0), (3, 2, 1), (2, 3, 0)])
def test_average_over_a_window_that_hangs_over_the_edge_stays_right(window: int, stride: int, pad: int) -> None:
    # Regression: EfficientNet's pooler, whose window is far larger than its map, became all zeros in int8.
    proto = graph(
        [
            node("Conv", ["x", "w"], "a", kernel_shape=[1, 1]),
            node(
                "AveragePool",
                ["a"],
                "p",
                kernel_shape=[window] * 2,
                strides=[stride] * 2,
                pads=[pad] * 4,
                ceil_mode=1,
                count_include_pad=int(not pad),
            ),
            node("Conv", ["p", "w"], "y", kernel_shape=[1, 1]),
        ],
        {"x": [1, 8, 10, 10]},
        ["y"],
        {"w": np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1)},
    )
    feed = {"x": IMAGE["x"] + 3}
    np.testing.assert_allclose(run(for_int8(proto, lambda _: False), feed)[0], run(proto, feed)[0], rtol=1e-5)
    assert sqnr(run(proto, feed)[0], run(quantized(proto, feed)[1], feed)[0]) > 30


def test_exempt_layer_stays_float_with_its_own_weight() -> None:
    proto = mobile_block()
    plan, result = quantized(proto, IMAGE, exempt="project")
    assert "project/Conv" not in plan.roles
    op = next(op for op in read_ops(result) if op.name == "project/Conv")
    assert (op.dtype, op.weight_bytes) == ("float32", 8 * 16 * 4)


def test_exempt_activation_is_not_split() -> None:
    _, result = quantized(mobile_block(), IMAGE, exempt="act")
    assert [n.name for n in result.graph.node if n.op_type == "HardSwish"] == ["act/HardSwish"]


def test_last_layer_returns_float_logits_from_its_int8_kernel(tmp_path: Path) -> None:
    proto = graph(
        [node("Gemm", ["x", "w", "b"], "y", transB=1)], {"x": ["n", 6]}, ["y"], {"w": weight(4, 6), "b": weight(4)}
    )
    _, result = quantized(proto, {"x": RNG.standard_normal((5, 6)).astype(np.float32)})
    assert kernels(result, tmp_path) == ["QuantizeLinear", "QGemm"]


def encoder_layer() -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "w0"], "up"),
        node("Add", ["up", "b0"], "biased"),
        node("Erf", ["biased"], "erf"),
        node("MatMul", ["erf", "w1"], "down"),
        node("Add", ["down", "x"], "sum"),
        node("LayerNormalization", ["sum", "g", "o"], "y"),
    ]
    constants = {
        "w0": weight(8, 16),
        "b0": weight(16),
        "w1": weight(16, 8),
        "g": np.ones(8, np.float32),
        "o": np.zeros(8, np.float32),
    }
    return graph(nodes, {"x": [1, 5, 8]}, ["y"], constants)


def test_encoder_multiplies_in_int8_and_keeps_the_residual_in_float(tmp_path: Path) -> None:
    proto = encoder_layer()
    feed = {"x": RNG.standard_normal((1, 5, 8)).astype(np.float32)}
    plan, result = quantized(proto, feed)
    assert plan.roles == {"up/MatMul": Role.MATMUL, "down/MatMul": Role.MATMUL}
    assert plan.observed == ("x", "erf")
    # Regression: ONNX Runtime fuses MatMul and a 1-D bias into a float Gemm that decodes its weight at every call.
    assert "Gemm" not in kernels(result, tmp_path)
    assert kernels(result, tmp_path).count("MatMulIntegerToFloat") == 2
    assert sqnr(run(proto, feed)[0], run(result, feed)[0]) > 25


def test_positions_are_not_quantized() -> None:
    nodes = [node("Cast", ["ids"], "positions", to=TensorProto.FLOAT), node("MatMul", ["positions", "freq"], "angles")]
    proto = graph(nodes, {"ids": [4, 1]}, ["angles"], {"freq": weight(1, 8)}, {"ids": TensorProto.INT64})
    plan, _ = quantized(proto, {"ids": np.array([[0], [1], [300], [301]])})
    assert plan.roles == {}


def test_a_picture_of_bytes_is_no_position() -> None:
    """Regression: the whole network stayed float, and was called int8."""
    nodes = [node("Cast", ["x"], "f", to=TensorProto.FLOAT), node("Conv", ["f", "w"], "y")]
    proto = graph(nodes, {"x": [1, 8, 10, 10]}, ["y"], {"w": weight(8, 8, 1, 1)}, {"x": TensorProto.UINT8})
    plan, _ = quantized(proto, {"x": np.arange(800, dtype=np.uint8).reshape(1, 8, 10, 10)})
    assert set(plan.roles) == {"y/Conv"}


def test_scaling_by_a_constant_costs_nothing(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], "c"), node("Mul", ["c", "k"], "m"), node("Conv", ["m", "w"], "y")]
    proto = graph(nodes, {"x": [1, 8, 10, 10]}, ["y"], {"w": weight(8, 8, 1, 1), "k": np.float32(0.125)})
    plan, result = quantized(proto, IMAGE)
    assert plan.roles["m/Mul"] is Role.RESCALE
    assert "QLinearMul" not in kernels(result, tmp_path)
    assert sqnr(run(proto, IMAGE)[0], run(result, IMAGE)[0]) > 30


def test_moves_pads_and_concatenation_pass_integers_on(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("MaxPool", ["c"], "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Pad", ["p", "pads"], "padded"),
        node("Conv", ["padded", "w"], "d"),
        node("Concat", ["d", "padded"], "cat", axis=1),
        helper.make_node("Split", ["cat"], ["left", "right"], name="cut/Split", axis=1, num_outputs=2),
        node("Add", ["left", "right"], "s"),
        node("Conv", ["s", "w"], "y"),
    ]
    constants = {"w": weight(8, 8, 1, 1), "pads": np.array([0, 0, 1, 1, 0, 0, 2, 2])}
    proto = graph(nodes, {"x": [1, 8, 10, 10]}, ["y"], constants)
    _, result = quantized(proto, IMAGE)
    assert {"Conv", "Concat", "DequantizeLinear"}.isdisjoint(kernels(result, tmp_path)[:-1])
    assert sqnr(run(proto, IMAGE)[0], run(result, IMAGE)[0]) > 25


def test_output_that_is_also_read_inside_keeps_its_name() -> None:
    nodes = [node("Conv", ["x", "w"], "mid"), node("Conv", ["mid", "w"], "end")]
    proto = graph(nodes, {"x": [1, 8, 10, 10]}, ["mid", "end"], {"w": weight(8, 8, 1, 1)})
    for scheme in (W8A8, replace(W8A8, io="int8")):
        _, result = quantized(proto, IMAGE, scheme=scheme)
        assert [o.name for o in result.graph.output] == ["mid", "end"]
        assert [i.name for i in result.graph.input] == ["x"]


def test_tensor_read_by_a_branch_body_is_left_alone() -> None:
    def branch(kind: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(kind, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(kind, ["c"], [kind])], kind, [], [out])

    nodes = [
        node("Conv", ["x", "w"], "c"),
        helper.make_node("If", ["flag"], ["y"], name="y/If", then_branch=branch("Abs"), else_branch=branch("Neg")),
    ]
    proto = graph(
        nodes, {"x": [1, 8, 10, 10], "flag": []}, ["y"], {"w": weight(8, 8, 1, 1)}, {"flag": TensorProto.BOOL}
    )
    plan, result = quantized(proto, IMAGE | {"flag": np.array(True)})
    assert plan.roles == {}
    feed = IMAGE | {"flag": np.array(False)}
    assert np.array_equal(run(proto, feed)[0], run(result, feed)[0])


def test_dead_channel_with_a_large_bias_does_not_overflow() -> None:
    w = weight(8, 8, 1, 1)
    w[3] = 1e-20
    bias = np.full(8, 0.5, np.float32)
    proto = graph([node("Conv", ["x", "w", "b"], "y")], {"x": [1, 8, 10, 10]}, ["y"], {"w": w, "b": bias})
    _, result = quantized(proto, IMAGE)
    assert np.allclose(run(result, IMAGE)[0][:, 3], 0.5, atol=0.05)
