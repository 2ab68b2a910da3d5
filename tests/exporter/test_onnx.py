"""The ONNX exporter as a whole, on graphs from files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibration.ranges import Range
from edgeopt.errors import ConversionError, DataError, MissingError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest, check_keep_float
from edgeopt.exporter.onnx import OnnxExporter
from edgeopt.exporter.onnx_graph import float_graph
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


@pytest.mark.parametrize("scheme", [Scheme("8da4w", "static"), Scheme("w8a8", "dynamic", io="int8")])
def test_scheme_that_onnx_can_not_have(tmp_path: Path, scheme: Scheme) -> None:
    with pytest.raises(ConversionError, match="hand: "):
        export(tmp_path, scheme)
    assert not (tmp_path / "model.onnx").exists()


def test_sixteen_bits_are_reported_as_computed_in_float(tmp_path: Path) -> None:
    _, _, artifact = export(tmp_path, Scheme("w8a16", "static"))
    reasons = {op.name: op.reason for op in artifact.unquantized_ops}
    assert "16-bit activations in float" in reasons["expand/Conv"]
    assert OnnxRuntime().open(artifact.path, artifact.signature).run(IMAGE)["out"].shape == (1, 8, 10, 10)


def test_weights_that_would_not_shrink_the_file_are_reported(tmp_path: Path) -> None:
    _, _, artifact = export(tmp_path, Scheme("w8", "none"), keep=("project",))
    reasons = {op.name: op.reason for op in artifact.unquantized_ops}
    assert reasons["project/Conv"] == "exempted by --keep-float"
    assert "would not shrink" in reasons["expand/Conv"]
    assert "gate/HardSigmoid" not in reasons


def test_history_names_what_is_out_of_the_ordinary(tmp_path: Path) -> None:
    _, _, artifact = export(tmp_path, replace(W8A8, scale="power-of-two", weight_estimator="mse"))
    config = artifact.history[-1].config
    assert (config["scale"], config["weight_estimator"]) == ("power-of-two", "mse")
    assert {"group_size", "weight_values", "weight_symmetric"}.isdisjoint(config)


def counting(
    scheme: Scheme, known: dict[str, Range], keep: tuple[str, ...] = ()
) -> tuple[QuantizationRequest, list[str]]:
    """A request that shares `known`, and the names of the samples that it was asked for."""
    seen: list[str] = []
    plain = request(scheme, keep)
    assert plain.calibration is not None
    given = plain.calibration.samples

    def stream() -> Iterator[Sample]:
        for sample in given():
            seen.append(sample.name)
            yield sample

    return replace(plain, calibration=replace(plain.calibration, samples=stream, known=known)), seen


@pytest.mark.parametrize("keep", ["project", "depthwise", "excite", "out", "pool"])
def test_known_ranges_spare_the_next_conversion_the_samples(tmp_path: Path, keep: str) -> None:
    model, twin, _ = export(tmp_path, W8A8)
    known: dict[str, Range] = {}
    first, seen = counting(W8A8, known)
    OnnxExporter().export_quantized(model, twin, first, tmp_path)
    assert seen == ["row 0", "row 1"]
    found = dict(known)
    again, seen = counting(W8A8, known, (keep,))
    spared = OnnxExporter().export_quantized(model, twin, again, tmp_path)
    assert seen == []
    assert known == found
    alone, _ = counting(W8A8, {}, (keep,))
    assert OnnxExporter().export_quantized(model, twin, alone, tmp_path).sha256 == spared.sha256


def test_findings_come_from_the_run_that_observed_only(tmp_path: Path) -> None:
    model, twin, _ = export(tmp_path, W8A8)
    constant = replace(request(W8A8), scheme=W8A8)
    assert constant.calibration is not None
    found: list[Finding] = []

    def stream() -> Iterator[Sample]:
        yield Sample({"x": np.zeros_like(IMAGE["x"])}, None, "black")

    run_once = replace(constant.calibration, samples=stream, count=1, on_finding=found.append, known={})
    OnnxExporter().export_quantized(model, twin, replace(constant, calibration=run_once), tmp_path)
    assert "constant-activation" in {finding.code for finding in found}
    found.clear()
    again = replace(constant, calibration=run_once, rules=LayerRules(("project",)))
    OnnxExporter().export_quantized(model, twin, again, tmp_path)
    assert found == []


def test_known_ranges_of_other_widths_are_not_taken(tmp_path: Path) -> None:
    model, twin, _ = export(tmp_path, W8A8)
    known: dict[str, Range] = {}
    for scheme in (W8A8, replace(W8A8, activation_symmetric=True), Scheme("w8a16", "static")):
        wanted, seen = counting(scheme, known)
        OnnxExporter().export_quantized(model, twin, wanted, tmp_path)
        assert len(seen) == 2


def test_a_range_that_only_an_exemption_needs_is_added(tmp_path: Path) -> None:
    model, twin, _ = export(tmp_path, W8A8)
    known: dict[str, Range] = {}
    OnnxExporter().export_quantized(model, twin, counting(W8A8, known)[0], tmp_path)
    before = set(known)
    wanted, seen = counting(W8A8, known, ("relu",))  # whose convolution then gives its own range
    OnnxExporter().export_quantized(model, twin, wanted, tmp_path)
    assert seen
    assert {key.rpartition(":")[2] for key in set(known) - before} == {"squeeze"}
    assert OnnxExporter().export_quantized(model, twin, counting(W8A8, {}, ("relu",))[0], tmp_path).sha256 == (
        OnnxExporter().export_quantized(model, twin, wanted, tmp_path).sha256
    )


def test_learned_input_range_wins_over_calibration(tmp_path: Path) -> None:
    model, twin, _ = export(tmp_path, W8A8)
    learned = replace(model, input_ranges={"edgeopt_model.project": (-1.0, 1.55), "excite": (0.0, 2.55)})
    artifact = OnnxExporter().export_quantized(learned, twin, request(W8A8), tmp_path)
    proto = onnx.load(str(artifact.path))
    constants = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    makers = {output: n for n in proto.graph.node for output in n.output}
    for layer, scale, zero_point in (("project/Conv", 0.01, 100), ("excite/Conv", 0.01, 0)):
        reader = next(n for n in proto.graph.node if n.name == layer)
        decode = makers[reader.input[0]]
        assert constants[decode.input[1]] == pytest.approx(scale)
        assert constants[decode.input[2]] == zero_point


def test_learned_ranges_alone_need_no_sample(tmp_path: Path) -> None:
    nodes = [node("Gemm", ["x", "w"], "y")]
    proto = graph(nodes, {"x": [1, 8]}, ["y"], {"w": weight(8, 4)})
    model = replace(model_of(proto, tmp_path / "source.onnx", (1, 8)), input_ranges={"y": (-1.0, 1.0)})
    exporter = OnnxExporter()
    twin = exporter.export_float(model, tmp_path)
    wanted, seen = counting(W8A8, {})
    exporter.export_quantized(model, twin, wanted, tmp_path)
    assert seen == []


def unscoped() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="/Conv_0"),
        helper.make_node("Conv", ["a", "w"], ["b"], name="conv.1"),
        helper.make_node("Conv", ["b", "w"], ["c"], name="Conv_0_1"),
        helper.make_node("Conv", ["c", "w"], ["y"]),
    ]
    return graph(nodes, {"x": [1, 8, 10, 10]}, ["y"], {"w": weight(8, 8, 1, 1)})


@pytest.mark.parametrize(("pattern", "exempted"), [
    ("Conv_0", {"Conv_0"}), ("conv_1", {"conv.1"}), ("Conv_0*", {"Conv_0", "Conv_0_1"}), ("conv*", {"conv.1"}),
    ("conv.1", {"conv.1"}),
])  # fmt: skip
def test_keep_float_takes_the_names_of_nodes_without_a_scope(tmp_path: Path, pattern: str, exempted: set[str]) -> None:
    # Regression: such a pattern was accepted and exempted nothing.
    model = model_of(unscoped(), tmp_path / "source.onnx", (1, 8, 10, 10))
    check_keep_float(model, (pattern,))
    exporter = OnnxExporter()
    twin = exporter.export_float(model, tmp_path)
    artifact = exporter.export_quantized(model, twin, request(W8A8, (pattern,)), tmp_path)
    assert {op.name for op in artifact.unquantized_ops} == exempted


@pytest.mark.parametrize(("shape", "operators"), [
    ([4, 8], ["fc/Gemm", "act/Relu", "Gemm_3"]),
    ([2, 4, 8], ["fc/MatMul", "fc/Add", "act/Relu", "Gemm_3", "Add_4"]),
])  # fmt: skip
def test_a_product_and_its_bias_keep_the_name_of_their_layer(
    tmp_path: Path, shape: list[int | str], operators: list[str]
) -> None:
    # Regression: onnxsim makes a Gemm without a name of both.
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="fc/MatMul"),
        helper.make_node("Add", ["a", "b"], ["c"], name="fc/Add"),
        helper.make_node("Relu", ["c"], ["d"], name="act/Relu"),
        helper.make_node("MatMul", ["d", "w"], ["e"], name="Gemm_3"),
        helper.make_node("Add", ["e", "b"], ["y"], name="Add_4"),
    ]
    proto = graph(nodes, {"x": shape}, ["y"], {"w": weight(8, 8), "b": weight(8)})
    size = tuple(int(d) for d in shape)
    result = float_graph(model_of(proto, tmp_path / "source.onnx", size))
    assert [n.name for n in result.graph.node] == operators
    feed = {"x": np.ones(size, np.float32)}
    assert np.allclose(run(proto, feed)[0], run(result, feed)[0], atol=1e-5)


def test_node_names_stay_unique(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="n_1"),
        helper.make_node("Abs", ["a"], ["b"], name="n"),
        helper.make_node("Neg", ["b"], ["c"], name="n"),
        helper.make_node("Exp", ["c"], ["y"], name="s/n"),
    ]
    model = model_of(graph(nodes, {"x": [1, 8]}, ["y"]), tmp_path / "source.onnx", (1, 8))
    assert [n.name for n in float_graph(model).graph.node] == ["n_1", "n", "n_2", "s/Exp"]


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
