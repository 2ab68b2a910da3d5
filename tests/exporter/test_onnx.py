"""The ONNX exporter on hand-made graphs: what becomes int8, what stays float and why, and that results stay close."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibration.ranges import Range
from edgeopt.errors import ConversionError, DataError, MissingError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.onnx import OnnxExporter
from edgeopt.exporter.onnx_embedding import quantize_embeddings
from edgeopt.exporter.onnx_graph import float_graph
from edgeopt.exporter.onnx_plan import Plan, Role
from edgeopt.exporter.onnx_qdq import activation_parameters, quantize_graph
from edgeopt.exporter.onnx_rewrite import for_int8
from edgeopt.formats.onnx import read_ops
from edgeopt.runtimes.onnxruntime import OnnxRuntime
from edgeopt.types import (
    Artifact,
    Dim,
    EstimatorSpec,
    Finding,
    LayerRules,
    Model,
    NativeGraph,
    Sample,
    Scheme,
    TensorSpec,
)

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
    proto: onnx.ModelProto,
    feed: Mapping[str, np.ndarray],
    exempt: str = "",
    io: bool = False,
    scheme: Scheme = W8A8,
) -> tuple[Plan, onnx.ModelProto]:
    """Plan, ranges from one run, and the QDQ graph."""

    def stays(n: onnx.NodeProto) -> bool:
        return bool(exempt) and n.name.startswith(f"{exempt}/")

    prepared = for_int8(proto, stays)
    plan = Plan(prepared, stays, quantize_io=io, fold_clips=not scheme.activation_symmetric)
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
    _, result = quantized(proto, IMAGE, io=True)
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
    ],
)
def test_other_schemes_stay_close_too(scheme: Scheme) -> None:
    proto = mobile_block()
    _, result = quantized(proto, IMAGE, scheme=scheme)
    assert sqnr(run(proto, IMAGE)[0], run(result, IMAGE)[0]) > 20
    per_channel = [i for i in result.graph.initializer if i.name.endswith("_scale") and list(i.dims)]
    assert bool(per_channel) == (scheme.weight_granularity == "per-channel")
    zero_points = {i.name for i in result.graph.initializer if i.name.startswith("zero_point_")}
    if scheme.activation_symmetric:
        assert zero_points <= {"zero_point_128", "zero_point_0"}  # 0: the unit range of a gate


def test_relu_is_folded_into_the_kernel_and_only_its_output_is_observed() -> None:
    proto = mobile_block()
    plan, result = quantized(proto, IMAGE)
    assert plan.roles["relu/Relu"] is Role.FOLDED
    assert "squeeze" not in plan.observed
    assert "relu" in plan.observed
    assert not [n for n in result.graph.node if n.op_type == "Relu"]


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
    for io in (False, True):
        _, result = quantized(proto, IMAGE, io=io)
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


@pytest.mark.parametrize(
    ("bounds", "symmetric", "scale", "zero_point"),
    [
        (Range(0.0, 2.55), False, 0.01, 0),
        (Range(-1.28, 1.27), False, 0.01, 128),
        (Range(1.0, 2.55), False, 0.01, 0),
        (Range(-2.55, -1.0), False, 0.01, 255),
        (Range(-1.27, 0.5), True, 0.01, 128),
        (Range(0.0, 0.0), False, 1.0, 0),
    ],
)
def test_activation_parameters(bounds: Range, symmetric: bool, scale: float, zero_point: int) -> None:
    found_scale, found_zero = activation_parameters(bounds, symmetric)
    assert found_scale == pytest.approx(scale, rel=1e-6)
    assert found_zero == zero_point


def test_embedding_rows_get_their_own_scales() -> None:
    table = (RNG.standard_normal((200, 32)) * np.geomspace(0.01, 10, 200)[:, None]).astype(np.float32)
    table[0] = 0  # padding
    proto = graph(
        [node("Gather", ["t", "ids"], "y")], {"ids": ["n", 3]}, ["y"], {"t": table}, {"ids": TensorProto.INT64}
    )
    ids = np.array([[0, 1, 199]])
    result = quantize_embeddings(proto, lambda _: False, W8A8)
    got = run(result, {"ids": ids})[0]
    assert np.all(np.abs(got - table[ids]) <= np.abs(table[ids]).max(axis=-1, keepdims=True) / 250)
    assert result.ByteSize() < 0.4 * proto.ByteSize()
    assert quantize_embeddings(proto, lambda _: True, W8A8).ByteSize() == proto.ByteSize()
    whole = quantize_embeddings(proto, lambda _: False, Scheme("w8a8", "static", weight_granularity="per-tensor"))
    assert np.abs(run(whole, {"ids": ids})[0] - table[ids]).max() <= np.abs(table).max() / 250


# --- the exporter itself, from a file ---------------------------------------------------------------------------------


def model_of(proto: onnx.ModelProto, path: Path, shape: tuple[int | Dim, ...]) -> Model:
    onnx.save(proto, str(path))
    spec = TensorSpec("x", shape, "float32")
    return Model(
        name="hand",
        module=None,
        native=NativeGraph("onnx", path),
        inputs=(spec,),
        outputs=tuple(TensorSpec(o.name, (1,), "float32") for o in proto.graph.output),
        example_inputs=IMAGE,
        preprocessing=None,
        labels=(),
        history=(),
        source_sha256="0" * 64,
    )


def request(scheme: Scheme, keep: tuple[str, ...] = (), samples: int = 2) -> QuantizationRequest:
    def stream() -> Iterator[Sample]:
        for i in range(samples):
            yield Sample({"x": IMAGE["x"] * (1 + i)}, None, f"row {i}")

    def ignore(finding: Finding) -> None:
        del finding

    calibration = CalibrationRun(stream, samples, EstimatorSpec(), ignore) if scheme.needs_calibration else None
    return QuantizationRequest(scheme, calibration, LayerRules(keep))


def export(
    tmp_path: Path, scheme: Scheme, keep: tuple[str, ...] = (), samples: int = 2
) -> tuple[Model, Artifact, Artifact]:
    model = model_of(mobile_block(), tmp_path / "source.onnx", (Dim("n", 1, 4), 8, 10, 10))
    exporter = OnnxExporter()
    twin = exporter.export_float(model, tmp_path)
    return model, twin, exporter.export_quantized(model, twin, request(scheme, keep, samples), tmp_path)


def test_static_int8_of_an_onnx_file_is_complete_and_repeatable(tmp_path: Path) -> None:
    _, twin, artifact = export(tmp_path, W8A8)
    assert (twin.path.name, artifact.path.name) == ("model_fp32.onnx", "model.onnx")
    assert artifact.unquantized_ops == ()
    assert artifact.signature.inputs[0].shape == ("n", 8, 10, 10)
    assert [s.step for s in artifact.history] == ["export", "quantize"]
    again = tmp_path / "again"
    again.mkdir()
    (again / "x").mkdir()
    assert export(again / "x", W8A8)[2].sha256 != ""
    repeated = OnnxExporter().export_quantized(*_same(tmp_path, twin), request(W8A8), again)
    assert repeated.path.read_bytes() == artifact.path.read_bytes()


def _same(tmp_path: Path, twin: Artifact) -> tuple[Model, Artifact]:
    return model_of(onnx.load(str(twin.path)), tmp_path / "same.onnx", (Dim("n", 1, 4), 8, 10, 10)), twin


def test_integer_interface(tmp_path: Path) -> None:
    _, twin, artifact = export(tmp_path, Scheme("w8a8", "static", io="int8"))
    tensor, output = artifact.signature.inputs[0], artifact.signature.outputs[0]
    assert (tensor.dtype, tensor.model_dtype) == ("uint8", "float32")
    assert tensor.quantization is not None
    assert output.quantization is not None
    with (
        OnnxRuntime().open(twin.path, twin.signature) as before,
        OnnxRuntime().open(artifact.path, artifact.signature) as after,
    ):
        assert sqnr(before.run(IMAGE)["out"], after.run(IMAGE)["out"]) > 20


def test_exempted_layer_is_reported_with_the_reason(tmp_path: Path) -> None:
    _, _, artifact = export(tmp_path, W8A8, keep=("project",))
    assert [(op.name, op.type, op.reason) for op in artifact.unquantized_ops if op.name == "project/Conv"] == [
        ("project/Conv", "Conv", "exempted by --keep-float")
    ]


def test_dynamic_int8_says_which_convolutions_stayed_float(tmp_path: Path) -> None:
    _, _, artifact = export(tmp_path, Scheme("w8a8", "dynamic"))
    reasons = {op.name: op.reason for op in artifact.unquantized_ops}
    assert "ConvInteger is slower than float" in reasons["expand/Conv"]


def test_float16_loads_and_keeps_its_interface(tmp_path: Path) -> None:
    _, twin, artifact = export(tmp_path, Scheme("fp16", "none"))
    assert artifact.signature == twin.signature
    assert artifact.unquantized_ops == ()
    with (
        OnnxRuntime().open(twin.path, twin.signature) as before,
        OnnxRuntime().open(artifact.path, artifact.signature) as after,
    ):
        assert sqnr(before.run(IMAGE)["out"], after.run(IMAGE)["out"]) > 45


@pytest.mark.parametrize(
    "scheme", [Scheme("w4", "none"), Scheme("w8a16", "static"), Scheme("w8a8", "dynamic", io="int8")]
)
def test_scheme_that_onnx_can_not_have(tmp_path: Path, scheme: Scheme) -> None:
    with pytest.raises(ConversionError):
        export(tmp_path, scheme)
    assert not (tmp_path / "model.onnx").exists()


def test_no_calibration_samples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        export(tmp_path, W8A8, samples=0)


def test_file_of_an_older_opset_is_raised(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], "c"), node("ReduceMean", ["c"], "y", axes=[2, 3], keepdims=0)]
    old = graph(nodes, {"x": [1, 8, 10, 10]}, ["y"], {"w": weight(8, 8, 1, 1)}, opset=11)
    model = model_of(old, tmp_path / "old.onnx", (1, 8, 10, 10))
    exporter = OnnxExporter()
    twin = exporter.export_float(model, tmp_path)
    artifact = exporter.export_quantized(model, twin, request(W8A8), tmp_path)
    assert np.allclose(run(old, IMAGE)[0], run(onnx.load(str(twin.path)), IMAGE)[0], atol=1e-5)
    assert sqnr(run(old, IMAGE)[0], run(onnx.load(str(artifact.path)), IMAGE)[0]) > 15


def test_other_native_graphs_are_refused(tmp_path: Path) -> None:
    model = model_of(mobile_block(), tmp_path / "m.onnx", (1, 8, 10, 10))
    keras = Model(
        **{f: getattr(model, f) for f in Model.__dataclass_fields__} | {"native": NativeGraph("keras", tmp_path)}
    )
    with pytest.raises(ConversionError, match="a keras model can't be converted to ONNX"):
        float_graph(keras)


def test_without_onnxscript_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    spec = (TensorSpec("x", (1, 2), "float32"),)
    example = {"x": np.zeros((1, 2), np.float32)}
    model = Model("net", torch.nn.Linear(2, 2).eval(), None, spec, spec, example, None, (), (), "0" * 64)
    monkeypatch.setattr("edgeopt.exporter.onnx_graph.find_spec", lambda _: None)
    with pytest.raises(MissingError, match="needs the package 'onnxscript'"):
        float_graph(model)
