"""The form that Qualcomm's HTP takes: what is quantized to what, on small graphs and without the vendor's library."""

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
from edgeopt.errors import ConversionError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest, make_artifact
from edgeopt.exporter.onnx_hexagon import HexagonExporter
from edgeopt.exporter.onnx_hexagon_plan import HtpPlan
from edgeopt.exporter.onnx_hexagon_prepare import MASK, check_static, for_htp
from edgeopt.exporter.onnx_hexagon_qdq import write_htp
from edgeopt.formats.onnx_hexagon import describe, made_for
from edgeopt.types import Array, EstimatorSpec, Hexagon, LayerRules, Model, Scheme, Signature

INT8, WIDE = Scheme("w8a8", "static"), Scheme("w8a16", "static")
PHONE = Hexagon("v75", 57, 8)


def rng(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def graph(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, list[int | str]],
    outputs: list[str],
    constants: Mapping[str, Array] | None = None,
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    return onnx.shape_inference.infer_shapes(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    )


def node(
    kind: str, inputs: list[str], outputs: list[str], name: str | None = None, **attributes: object
) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, outputs, name=name or f"{outputs[0]}/{kind}", **attributes)


def run(proto: onnx.ModelProto, feed: Mapping[str, Array]) -> Array:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, dict(feed))[0]
    return result


def quantized(
    proto: onnx.ModelProto, feed: Mapping[str, Array], scheme: Scheme = INT8, keep: str = "", wide: str = "",
) -> onnx.ModelProto:  # fmt: skip
    """Prepared, and quantized with the ranges that `feed` shows; nodes whose name begins as told are exempt or wide."""
    prepared = for_htp(proto, "net")
    plan = HtpPlan(
        prepared,
        lambda n: bool(keep) and n.name.startswith(keep),
        lambda n: bool(wide) and n.name.startswith(wide),
        scheme,
    )
    names = [name for name, _ in plan.observed if name not in feed]
    exposed = onnx.ModelProto()
    exposed.CopyFrom(prepared)
    del exposed.graph.output[:]
    exposed.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    session = ort.InferenceSession(exposed.SerializeToString(), providers=["CPUExecutionProvider"])
    values = dict(zip(names, session.run(names, dict(feed)), strict=True)) | dict(feed)
    ranges = {k: Range(min(float(v.min()), 0.0), max(float(v.max()), 1e-6)) for k, v in values.items()}
    result = write_htp(prepared, plan, ranges, scheme, "int16")
    onnx.checker.check_model(result)
    return result


def sqnr(reference: Array, other: Array) -> float:
    noise = float(np.square(reference - other).sum())
    return float(10 * np.log10(np.square(reference).sum() / max(noise, 1e-30)))


def conversions(proto: onnx.ModelProto) -> set[str]:
    """Float tensors that no conversion writes, and that an operator other than a conversion reads."""
    makers = {o: n for n in proto.graph.node for o in n.output}
    constants = {i.name for i in proto.graph.initializer}
    return {
        name
        for n in proto.graph.node
        if n.op_type not in ("QuantizeLinear", "DequantizeLinear")
        for name in n.input
        if name and name not in constants and (name not in makers or makers[name].op_type != "DequantizeLinear")
    }


CONV = {"w": rng(4, 3, 3, 3), "b": rng(4)}


def conv_relu() -> onnx.ModelProto:
    return graph(
        [node("Conv", ["x", "w", "b"], ["c"]), node("Relu", ["c"], ["r"]), node("Sigmoid", ["r"], ["y"])],
        {"x": [1, 3, 8, 8]}, ["y"], CONV,
    )  # fmt: skip


def test_relu_becomes_the_range_of_the_convolution() -> None:
    proto, feed = conv_relu(), {"x": rng(1, 3, 8, 8)}
    result = quantized(proto, feed)
    assert [n.op_type for n in result.graph.node if "Linear" not in n.op_type] == ["Conv", "Sigmoid"]
    assert not conversions(result)
    assert sqnr(run(proto, feed), run(result, feed)) > 30


def test_relu_stays_where_it_is_exempt_or_ranges_are_symmetric() -> None:
    feed = {"x": rng(1, 3, 8, 8)}
    for result in (
        quantized(conv_relu(), feed, keep="r/"),
        quantized(conv_relu(), feed, replace(INT8, activation_symmetric=True)),
    ):
        assert "Relu" in {n.op_type for n in result.graph.node}
        assert sqnr(run(conv_relu(), feed), run(result, feed)) > 25


def test_a_clip_that_excludes_zero_is_not_folded() -> None:
    proto = graph(
        [node("Conv", ["x", "w", "b"], ["c"]), node("Clip", ["c", "low", ""], ["y"])],
        {"x": [1, 3, 8, 8]}, ["y"], CONV | {"low": np.float32(0.5)},
    )  # fmt: skip
    feed = {"x": rng(1, 3, 8, 8)}
    result = quantized(proto, feed)
    assert "Clip" in {n.op_type for n in result.graph.node}
    assert run(result, feed).min() >= 0.45


def test_weights_are_int8_per_channel_and_biases_int32() -> None:
    result = quantized(conv_relu(), {"x": rng(1, 3, 8, 8)})
    arrays = {i.name: numpy_helper.to_array(i) for i in result.graph.initializer}
    assert arrays["c/Conv_weight_quantized"].dtype == np.int8
    assert arrays["c/Conv_weight_step"].shape == (4,)
    assert not arrays["c/Conv_weight_zero_point"].any()
    assert arrays["c/Conv_bias_quantized"].dtype == np.int32


def test_sigmoid_has_the_scale_that_htp_demands_of_16_bits() -> None:
    result = quantized(conv_relu(), {"x": rng(1, 3, 8, 8)}, WIDE)
    scales = {float(numpy_helper.to_array(i)) for i in result.graph.initializer if i.name.startswith("scale_")}
    assert 2.0**-16 in scales


def test_moves_keep_their_inputs_parameters() -> None:
    proto = graph(
        [
            node("Relu", ["x"], ["r"]),
            node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
            node("Reshape", ["t", "s"], ["y"]),
        ],
        {"x": [1, 4, 6]}, ["y"], {"s": np.array([1, 24])},
    )  # fmt: skip
    result = quantized(proto, {"x": rng(1, 4, 6)})
    steps = {n.input[1:][0] for n in result.graph.node if n.op_type == "QuantizeLinear" and n.input[0] != "x"}
    assert len(steps) == 1


def test_a_layer_of_16_bits_stands_between_conversions() -> None:
    proto = graph(
        [node("Conv", ["x", "w", "b"], ["c"]), node("Conv", ["c", "v", "b"], ["d"]), node("Tanh", ["d"], ["y"])],
        {"x": [1, 3, 8, 8]}, ["y"], CONV | {"v": rng(4, 4, 1, 1)},
    )  # fmt: skip
    feed = {"x": rng(1, 3, 8, 8)}
    result = quantized(proto, feed, wide="d/")
    types = {i.name: i.data_type for i in result.graph.initializer}
    makers = {o: n for n in result.graph.node for o in n.output}
    wide = next(n for n in result.graph.node if n.name == "d/Conv")
    assert types[makers[wide.input[0]].input[2]] == TensorProto.UINT16
    narrow = next(n for n in result.graph.node if n.name == "y/Tanh")
    assert types[makers[narrow.input[0]].input[2]] == TensorProto.UINT8
    assert sqnr(run(proto, feed), run(result, feed)) > 25


def test_a_relu_has_the_width_of_the_layer_that_it_ends() -> None:
    """Regression: a functional relu belongs to no layer that rules name; the 16 bits in front of it were narrowed to 8
    over the whole range, negative half included, which was worse than 8 bits everywhere."""
    result = quantized(conv_relu(), {"x": rng(1, 3, 8, 8)}, wide="c/")
    assert "Relu" not in {n.op_type for n in result.graph.node}
    types = {i.name: i.data_type for i in result.graph.initializer}
    written = next(n for n in result.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "r_real")
    assert types[written.input[2]] == TensorProto.UINT16


def test_the_second_of_two_16_bit_operands_is_symmetric_int16() -> None:
    proto = graph([node("MatMul", ["a", "b"], ["y"])], {"a": [1, 4, 6], "b": [1, 6, 5]}, ["y"])
    feed = {"a": rng(1, 4, 6), "b": rng(1, 6, 5)}
    result = quantized(proto, feed, WIDE)
    types = {i.name: i.data_type for i in result.graph.initializer}
    makers = {o: n for n in result.graph.node for o in n.output}
    product = next(n for n in result.graph.node if n.op_type == "MatMul")
    found = [types[makers[name].input[2]] for name in product.input]
    assert found == [TensorProto.UINT16, TensorProto.INT16]
    assert sqnr(run(proto, feed), run(result, feed)) > 60


def test_integer_inputs_and_outputs() -> None:
    result = quantized(conv_relu(), {"x": rng(1, 3, 8, 8)}, replace(INT8, io="int8"))
    ends = (*result.graph.input, *result.graph.output)
    assert {v.type.tensor_type.elem_type for v in ends} == {TensorProto.UINT8}
    out = run(result, {"x": np.full((1, 3, 8, 8), 128, np.uint8)})
    assert out.dtype == np.uint8


def test_a_float_layer_reads_and_gives_reals() -> None:
    feed = {"x": rng(1, 3, 8, 8)}
    result = quantized(conv_relu(), feed, keep="c/")
    kept = next(n for n in result.graph.node if n.op_type == "Conv")
    assert kept.input[0] == "x"
    assert kept.input[1] == "w"
    assert sqnr(run(conv_relu(), feed), run(result, feed)) > 30


def test_an_output_that_other_nodes_read_keeps_its_name() -> None:
    proto = graph(
        [node("Conv", ["x", "w", "b"], ["c"]), node("Relu", ["c"], ["y"])], {"x": [1, 3, 8, 8]}, ["c", "y"], CONV
    )
    result = quantized(proto, {"x": rng(1, 3, 8, 8)})
    assert [o.name for o in result.graph.output] == ["c", "y"]
    assert run(result, {"x": rng(1, 3, 8, 8)}).min() < 0


def test_gelu_of_parts_becomes_one_operator() -> None:
    proto = graph(
        [
            node("Div", ["x", "root"], ["d"]), node("Erf", ["d"], ["e"], name="block.act/Erf"),
            node("Add", ["e", "one"], ["a"]), node("Mul", ["x", "a"], ["m"]),
            node("Mul", ["m", "half"], ["y"], name="block.act/Mul"),
        ],
        {"x": [2, 6]}, ["y"],
        {"root": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)},
    )  # fmt: skip
    prepared = for_htp(proto, "net")
    assert [(n.op_type, n.domain, n.name) for n in prepared.graph.node] == [("Gelu", "", "block.act/Gelu")]
    feed = {"x": rng(2, 6)}
    np.testing.assert_allclose(run(prepared, feed), run(proto, feed), atol=1e-6)


def test_bias_goes_into_the_product() -> None:
    proto = graph(
        [node("MatMul", ["x", "w"], ["p"], name="fc/MatMul"), node("Add", ["b", "p"], ["y"], name="fc/Add")],
        {"x": [1, 4, 6]}, ["y"], {"w": rng(6, 5), "b": rng(5)},
    )  # fmt: skip
    prepared = for_htp(proto, "net")
    assert [(n.op_type, n.name) for n in prepared.graph.node][1] == ("Gemm", "fc/MatMul")
    feed = {"x": rng(1, 4, 6)}
    np.testing.assert_allclose(run(prepared, feed), run(proto, feed), atol=1e-5)


def test_batch_norm_becomes_a_depthwise_convolution() -> None:
    parts = {"s": rng(3), "o": rng(3) + 1, "m": rng(3), "v": np.abs(rng(3)) + 0.1}
    proto = graph([node("BatchNormalization", ["x", *parts], ["y"])], {"x": [1, 3, 4, 4]}, ["y"], parts)
    prepared = for_htp(proto, "net")
    assert [n.op_type for n in prepared.graph.node] == ["Conv"]
    feed = {"x": rng(1, 3, 4, 4)}
    np.testing.assert_allclose(run(prepared, feed), run(proto, feed), atol=1e-5)


def test_masks_end_where_a_softmax_sees_nothing() -> None:
    mask = np.array([[0, 0, -3.4e38]], np.float32)
    proto = graph(
        [node("Add", ["x", "mask"], ["a"]), node("Softmax", ["a"], ["y"]), node("Add", ["x", "other"], ["z"])],
        {"x": [1, 3]}, ["y", "z"], {"mask": mask, "other": mask.copy()},
    )  # fmt: skip
    arrays = {i.name: numpy_helper.to_array(i) for i in for_htp(proto, "net").graph.initializer}
    assert arrays["mask"].min() == MASK
    assert arrays["other"].min() < -1e38, "what no Softmax sees is no mask"


def test_the_guard_of_a_softmax_goes() -> None:
    proto = graph(
        [
            node("Softmax", ["x"], ["s"]), node("IsNaN", ["s"], ["n"]),
            node("Where", ["n", "zero", "s"], ["w"]), node("Relu", ["w"], ["y"]),
        ],
        {"x": [1, 3]}, ["y"], {"zero": np.float32(0)},
    )  # fmt: skip
    assert [n.op_type for n in for_htp(proto, "net").graph.node] == ["Softmax", "Relu"]


def test_a_gather_of_everything_is_a_reshape() -> None:
    everything = np.stack(np.meshgrid(np.arange(2), np.arange(3), indexing="ij"), -1).reshape(1, 1, 2, 3, 2)
    for indices, kind in ((everything, "Reshape"), (everything[..., ::-1, :].copy(), "GatherND")):
        proto = graph([node("GatherND", ["x", "i"], ["y"])], {"x": [2, 3]}, ["y"], {"i": indices.astype(np.int64)})
        prepared = for_htp(proto, "net")
        assert [n.op_type for n in prepared.graph.node] == [kind]
        np.testing.assert_array_equal(run(prepared, {"x": rng(2, 3)}), run(proto, {"x": rng(2, 3)}))


def test_open_shapes_are_refused_by_name() -> None:
    proto = graph([node("Relu", ["x"], ["y"])], {"x": ["batch", 3]}, ["y"])
    with pytest.raises(ConversionError, match=r"input 'x': has the open shape \(batch, 3\)"):
        check_static(proto)


def test_a_float_twin_with_open_shapes_is_refused_before_any_sample_is_run(tmp_path: Path) -> None:
    """Regression: the pipeline's float twin comes from the plain exporter, and its open shape reached QNN."""
    proto = graph([node("Relu", ["x"], ["y"])], {"x": ["batch", 3]}, ["y"])
    onnx.save(proto, tmp_path / "model_fp32.onnx")
    twin = make_artifact(
        tmp_path / "model_fp32.onnx",
        format_="onnx",
        precision="fp32",
        signature=Signature((), ()),
        history=(),
        tools=(),
    )
    scheme = replace(INT8, npu=PHONE)
    run = CalibrationRun(lambda: pytest.fail("reads samples"), 1, EstimatorSpec(), lambda _: None)
    model = Model("net", None, None, (), (), {}, None, (), (), "0" * 64)
    with pytest.raises(ConversionError, match=r"input 'x': has the open shape \(batch, 3\)"):
        HexagonExporter().export_quantized(model, twin, QuantizationRequest(scheme, run), tmp_path)


def test_the_file_says_what_it_was_made_for() -> None:
    proto = conv_relu()
    assert made_for(proto) is None
    describe(proto, PHONE)
    assert made_for(proto) == Hexagon("v75", 57, None)


@pytest.mark.parametrize(
    ("scheme", "rules", "told"),
    [
        (Scheme("w4", "none"), LayerRules(), "HTP has no w4"),
        (Scheme("w8a8", "dynamic"), LayerRules(), "dynamic activations"),
        (Scheme("fp16", "none", npu=Hexagon("v68", 30, 4)), LayerRules(), "no float arithmetic"),
        (replace(INT8, npu=Hexagon("v68", 30, 4)), LayerRules(("head",)), "int16-activations"),
        (replace(INT8, weight_symmetric=False), LayerRules(), "zero point 0"),
        (replace(INT8, weight_granularity="per-group"), LayerRules(), "per output channel"),
        (replace(WIDE, io="int8"), LayerRules(), "8-bit activations"),
        (WIDE, LayerRules(int16_activations=("head",)), "w8a8 file"),
        (Scheme("fp16", "none", npu=PHONE), LayerRules(("head",)), None),
        (replace(INT8, npu=PHONE), LayerRules(("head",), ("stem",)), None),
    ],
)
def test_what_is_refused(scheme: Scheme, rules: LayerRules, told: str | None) -> None:
    problem = HexagonExporter().unsupported(scheme, rules)
    assert problem is None if told is None else told in (problem or "")


@pytest.mark.parametrize(("mode", "kept"), [("linear", True), ("nearest", True), ("cubic", False)])
def test_resize_shares_its_inputs_parameters_or_stays_float(mode: str, kept: bool) -> None:
    """QNN takes an integer Resize only so; with other parameters it computes in float, or refuses the file on v68."""
    proto = graph(
        [node("Conv", ["x", "w", "b"], ["c"]), node("Resize", ["c", "", "", "s"], ["y"], mode=mode)],
        {"x": [1, 3, 4, 4]}, ["y"], CONV | {"s": np.array([1, 4, 4, 4])},
    )  # fmt: skip
    result = quantized(proto, {"x": rng(1, 3, 4, 4)})
    steps = {n.input[1] for n in result.graph.node if n.op_type == "QuantizeLinear" and n.input[0] != "x"}
    resize = next(n for n in result.graph.node if n.op_type == "Resize")
    assert len(steps) == 1
    assert (resize.output[0] == "y_real") is kept
