"""What the LiteRT exporter does around the vendors' converters; whole conversions are in tests/e2e."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema

from edgeopt.calibration.ranges import Range
from edgeopt.calibration.weights import quantize_weight
from edgeopt.errors import ConversionError, MissingError
from edgeopt.exporter import load_exporter
from edgeopt.exporter.base import QuantizationRequest
from edgeopt.exporter.litert_calibrate import trained_ranges
from edgeopt.exporter.litert_convert import _example_arguments, from_native, permutation
from edgeopt.exporter.litert_graph import keep_spatial_reductions, split_overhanging_pools
from edgeopt.exporter.litert_names import layers_in, mark_layers, rename
from edgeopt.exporter.litert_plan import MASK, Graph, Op, delicate, mask_reach, spread_masks, wide_ops, wide_tensors
from edgeopt.exporter.litert_recipe import has_recipe, unsupported
from edgeopt.exporter.litert_statistics import statistics
from edgeopt.types import Artifact, Dim, LayerRules, Model, NativeGraph, Scheme, Signature, TensorSpec


def _model(module: torch.nn.Module | None, *inputs: TensorSpec, native: NativeGraph | None = None) -> Model:
    sizes = {t.name: tuple(1 if isinstance(d, Dim) else d for d in t.shape) for t in inputs}
    examples = {t.name: np.zeros(sizes[t.name], t.dtype) for t in inputs}
    return Model("m", module, native, inputs, (), examples, None, (), (), "0" * 64)


def test_is_registered() -> None:
    exporter = load_exporter("litert")
    assert (exporter.format, exporter.suffix) == ("litert", ".tflite")


def test_only_images_become_channel_last() -> None:
    assert permutation(TensorSpec("x", (1, 3, 8, 8), "float32", "NCHW")) == (0, 2, 3, 1)
    assert permutation(TensorSpec("x", (1, 3, 8, 8), "float32")) is None
    assert permutation(TensorSpec("x", (1, 8, 8, 3), "float32", "NHWC")) is None
    assert permutation(TensorSpec("x", (1, 3, 8), "float32", "NCHW")) is None


def test_examples_have_two_elements_along_dynamic_dimensions() -> None:
    model = _model(None, TensorSpec("x", (Dim("batch", 1, 8), 3, 4, 4), "float32", "NCHW"))
    (example,) = _example_arguments(model)
    assert tuple(example.shape) == (2, 4, 4, 3)


def test_tensorflow_models_need_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(MissingError, match=r"pip install 'edgeopt\[tensorflow\]'"):
        from_native(NativeGraph("savedmodel", tmp_path), tmp_path / "m.tflite")


def test_an_onnx_graph_is_refused(tmp_path: Path) -> None:
    model = _model(None, native=NativeGraph("onnx", tmp_path / "m.onnx"))
    with pytest.raises(ConversionError, match="onnx graph can't become a LiteRT file"):
        load_exporter("litert").export_float(model, tmp_path)


class _Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1)
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.fc(y.mean((-1, -2)) + self.pool(y).flatten(1))


def _traced(module: torch.nn.Module) -> torch.fx.GraphModule:
    outer = torch.nn.Module()
    outer.add_module("adapted", module)
    outer.forward = lambda x: (module(x),)
    program = torch.export.export(outer.eval(), (torch.ones(1, 3, 5, 5),), strict=False)
    return program.module(check_guards=False)


def test_global_pooling_keeps_its_dimensions_and_its_result() -> None:
    module = _Head()
    program = _traced(module)
    keep_spatial_reductions(program)
    means = [node for node in program.graph.nodes if "mean" in str(node.target)]
    assert [node.args[1:] for node in means] == [([2, 3], True), ([2, 3], True)]
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(program(x)[0], module(x))


@pytest.mark.parametrize(
    "pool",
    [
        torch.nn.AvgPool2d(448, ceil_mode=True),
        torch.nn.AvgPool2d(2, ceil_mode=True),
        torch.nn.AvgPool2d((3, 2), (1, 2), (1, 0), ceil_mode=True),
        torch.nn.AvgPool2d(4, 3, 2, ceil_mode=True),
        torch.nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
        torch.nn.Sequential(torch.nn.Flatten(2), torch.nn.AvgPool1d(4, 2, 1, ceil_mode=True)),
        torch.nn.Sequential(torch.nn.AvgPool2d(2, ceil_mode=True), torch.nn.AvgPool2d(2, ceil_mode=True)),
    ],
)
def test_no_average_is_left_that_hangs_over_the_edge(pool: torch.nn.Module) -> None:
    program = _traced(pool)
    split_overhanging_pools(program)
    pools = [node for node in program.graph.nodes if "avg_pool" in str(node.target)]
    assert pools
    assert not any(True in node.args[4:5] for node in pools)
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(program(x)[0], pool(x))


@pytest.mark.parametrize(
    "pool",
    [
        torch.nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        torch.nn.AvgPool2d(2, padding=1, ceil_mode=True, count_include_pad=False),
        torch.nn.AvgPool2d(2, ceil_mode=True, divisor_override=3),
    ],
)
def test_averages_that_lose_nothing_stay(pool: torch.nn.Module) -> None:
    program = _traced(pool)
    before = [node.name for node in program.graph.nodes]
    split_overhanging_pools(program)
    assert [node.name for node in program.graph.nodes] == before


def test_marks_carry_the_layers_path_and_survive_fusion() -> None:
    program = _traced(_Head())
    (output,) = mark_layers(program.graph, "adapted")
    assert output == "fc"
    stacks = {str(n.target): n.meta.get("nn_module_stack") for n in program.graph.nodes if n.op == "call_function"}
    assert stacks["aten.conv2d.default"] == {"edgeopt": ("conv", "kernel")}
    assert layers_in("other_blocks|0|bn;;kernel_blocks|0|conv;2") == ["blocks.0.bn", "blocks.0.conv"]
    assert layers_in('error at "kernel_a|b;"(x)') == ["a.b"]


def _products(operators: list[tuple[str, str, str]]) -> schema.ModelT:
    """Matrix products that read the input, each with (output's, weight's, bias's) name as litert-torch gives them."""
    tensors = [("args_0", 2, 0)]
    products = []
    for output, weight, bias in operators:
        products.append(schema.OperatorT())
        products[-1].inputs = [0, len(tensors), len(tensors) + 1]
        products[-1].outputs = [len(tensors) + 2]
        tensors += [(weight, 2, 1), (bias, 1, 1), (output, 2, 0)]
    graph = schema.SubGraphT()
    graph.tensors, graph.operators, graph.inputs = [], products, [0]
    graph.outputs = [tensors.index((output, 2, 0)) for output, _, _ in operators]
    for name, rank, buffer in tensors:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name.encode(), [4] * rank, buffer
        graph.tensors.append(tensor)
    signature = schema.SignatureDefT()
    signature.inputs, signature.outputs, signature.subgraphIndex = [], [], 0
    code = schema.OperatorCodeT()
    code.builtinCode = schema.BuiltinOperator.FULLY_CONNECTED
    model = schema.ModelT()
    model.subgraphs, model.signatureDefs, model.operatorCodes = [graph], [signature], [code]
    model.buffers = [schema.BufferT(), schema.BufferT()]
    model.buffers[1].data = np.zeros(16, np.uint8)
    return model


@pytest.mark.parametrize("operators", [
    [  # BERT without biases: they share a constant
        ("other_att;;kernel_att|query;;kernel_att|value;1", "other_att;;kernel_att|query;;kernel_att|value;", "b1"),
        ("kernel_att|query;;other_att;", "other_att;;kernel_att|query;", "b2"),
        ("kernel_att|query;;kernel_att|key;;other_att;", "kernel_att|query;;kernel_att|key;", "b3"),
    ],
    [  # and with biases
        ("other_norm;;kernel_att|value;;kernel_att|query;", "kernel_att|value;", "kernel_att|value;;kernel_att|query;"),
        ("other_norm;;kernel_att|query;;other_att;", "other_att;;other_att;3", "other_att;;other_att;2"),
        ("other_norm;;kernel_att|key;;kernel_att|query;;other_att;", "other_att;;other_att;1", "other_att;;other_att;"),
    ],
])  # fmt: skip
def test_layers_that_share_a_constant_keep_their_own_names(operators: list[tuple[str, str, str]]) -> None:
    # Regression: all three were called "att.query".
    model = _products(operators)
    rename(model, [], [])
    graph = model.subgraphs[0]
    names = [graph.tensors[operator.outputs[0]].name.decode() for operator in graph.operators]
    assert names == ["att.value", "att.query", "att.key"]


def test_a_layer_that_runs_twice_has_one_name() -> None:
    model = _products([("kernel_fc;1", "kernel_fc;", "b1"), ("kernel_head;;kernel_fc;2", "kernel_fc;", "b2")])
    rename(model, [], [])
    graph = model.subgraphs[0]
    assert [graph.tensors[operator.outputs[0]].name for operator in graph.operators] == [b"fc", b"fc:1"]


def test_which_operators_have_a_recipe() -> None:
    static, dynamic = Scheme("w8a8", "static"), Scheme("w8a8", "dynamic")
    assert has_recipe("TRANSPOSE_CONV", static)
    assert has_recipe("HARD_SWISH", static)
    assert not has_recipe("HARD_SWISH", dynamic)
    assert not has_recipe("CUMSUM", static)
    assert not has_recipe("SQUARED_DIFFERENCE", Scheme("w8a16", "static"))
    assert not has_recipe("DEPTHWISE_CONV_2D", Scheme("w4", "none"))
    assert has_recipe("CONV_2D", Scheme("8da4w", "dynamic"))
    assert not has_recipe("CONV_2D", Scheme("8da4w", "dynamic", "per-group"))


@pytest.mark.parametrize(
    ("values", "reach"),
    [
        ([0.0, -3.4e38], -3.4e38),
        ([1.0, -np.inf], -np.inf),
        ([0.0, 2 * MASK], 2 * MASK),
        ([1e4, -1e4], None),
        ([], None),
    ],
)
def test_attention_masks_are_recognised_by_their_size(values: list[float], reach: float | None) -> None:
    found = mask_reach(np.array(values, np.float32))
    assert found == (None if reach is None else pytest.approx(reach))


def test_a_mask_spreads_to_the_softmax_but_not_beyond() -> None:
    """Regression: in calibration samples without padding the mask is zero, and its int8 range then ignores padding."""
    ops = [
        Op("SELECT_V2", ("keep", "zero", "infinity"), ("mask",)),
        Op("ADD", ("scores", "mask"), ("masked",)),
        Op("SOFTMAX", ("masked",), ("weights",)),
        Op("MUL", ("weights", "values"), ("context",)),
    ]
    floats = dict.fromkeys(("zero", "infinity", "mask", "scores", "masked", "weights", "values", "context"), 0)
    found = spread_masks(ops, {"infinity": np.float32([-3e38])}, floats)
    assert found.keys() == {"infinity", "mask", "masked"}


def _graph(*ops: Op, inputs: tuple[str, ...] = ("x",), constants: tuple[str, ...] = ()) -> Graph:
    names = [*inputs, *constants, *(name for op in ops for name in op.outputs)]
    floats = {name: index for index, name in enumerate(names)}
    return Graph(ops, inputs, floats, {name: np.ones((2, 2), np.float32) for name in constants})


def _fully_connected(source: str, output: str) -> Op:
    return Op("FULLY_CONNECTED", (source, "w"), (output,), 0)


def test_a_normalization_stays_float_with_the_residual_stream_but_not_the_layers_beside_it() -> None:
    graph = _graph(
        _fully_connected("x", "before"),
        Op("ADD", ("before", "x"), ("stream",)),
        Op("MEAN", ("stream",), ("mean",)),
        Op("SQUARED_DIFFERENCE", ("stream", "mean"), ("squares",)),
        Op("RSQRT", ("squares",), ("norm",)),
        Op("MUL", ("stream", "norm"), ("normed",)),
        Op("RESHAPE", ("normed",), ("flat",)),
        _fully_connected("flat", "hidden"),
        Op("GELU", ("hidden",), ("active",)),
        _fully_connected("active", "after"),
        constants=("w",),
    )
    assert [op.outputs[0] for op in delicate(graph)] == ["stream", "mean", "squares", "norm", "normed"]


def test_attention_stays_float_and_what_lies_between_its_parts() -> None:
    graph = _graph(
        _fully_connected("x", "q"),
        Op("RESHAPE", ("q",), ("heads",)),
        Op("BATCH_MATMUL", ("heads", "x"), ("scores",)),
        Op("RESHAPE", ("scores",), ("flat",)),
        Op("SOFTMAX", ("flat",), ("weights",)),
        Op("BATCH_MATMUL", ("weights", "x"), ("context",)),
        Op("TRANSPOSE", ("context",), ("turned",)),
        _fully_connected("turned", "y"),
        constants=("w",),
    )
    assert [op.outputs[0] for op in delicate(graph)] == ["scores", "flat", "weights", "context"]


def test_a_convolutional_network_has_nothing_delicate() -> None:
    graph = _graph(
        Op("CONV_2D", ("x", "w"), ("a",), 0),
        Op("MEAN", ("a",), ("pooled",)),
        Op("BATCH_MATMUL", ("pooled", "w"), ("gates",), 1),
        Op("LOGISTIC", ("gates",), ("gate",)),
        Op("MUL", ("a", "gate"), ("b",)),
        Op("ADD", ("a", "b"), ("c",)),
        Op("SOFTMAX", ("c",), ("y",)),
        constants=("w",),
    )
    assert delicate(graph) == []


def test_which_tensors_of_a_16_bit_layer_get_a_16_bit_range() -> None:
    graph = _graph(
        _fully_connected("x", "first"),
        _fully_connected("first", "second"),
        _fully_connected("second", "third"),
        constants=("w",),
    )
    wide = wide_ops(graph, LayerRules(int16_activations=("first", "second")), kept=())
    assert wide == {"first", "second"}
    assert wide_tensors(graph, wide, kept=()) - {"w"} == {"x", "first", "second"}
    # What an 8-bit layer computes has 8 bits, whoever reads it.
    assert wide_tensors(graph, {"second"}, kept=()) - {"w"} == {"second"}
    assert wide_ops(graph, LayerRules(int16_activations=("*",)), kept=("second",)) == {"first", "third"}


@pytest.mark.parametrize(
    ("scheme", "rules", "named"),
    [
        (Scheme("w4", "none", weight_values="k-means"), LayerRules(), "k-means weight tables"),
        (Scheme("w8", "none", weight_values="logarithmic"), LayerRules(), "ONNX"),
        (Scheme("w4", "none", "per-group"), LayerRules(), "8da4w"),
        (Scheme("8da4w", "dynamic", "per-group", group_size=48), LayerRules(), "32, 64, 128, 256"),
        (Scheme("8da4w", "static"), LayerRules(), "dynamic"),
        (Scheme("w8a8", "static", weight_symmetric=False), LayerRules(), "zero point of 0"),
        (Scheme("w8a16", "dynamic"), LayerRules(), "16 bits"),
        (Scheme("w8a16", "static", io="int8"), LayerRules(), "int16"),
        (Scheme("w8a8", "dynamic", activation_symmetric=True), LayerRules(), "zero point"),
        (Scheme("w8a8", "dynamic", scale="power-of-two"), LayerRules(), "powers of two"),
        (Scheme("w8a8", "static", scale="power-of-two"), LayerRules(int16_activations=("a",)), "powers of two"),
        (Scheme("w8a8", "dynamic"), LayerRules(int16_activations=("a",)), "static w8a8"),
        (Scheme("fp16", "none"), LayerRules(int16_activations=("a",)), "fp16"),
    ],
)
def test_what_litert_cannot_do_is_named(scheme: Scheme, rules: LayerRules, named: str) -> None:
    assert named in (unsupported(scheme, rules) or "")


@pytest.mark.parametrize(
    ("scheme", "rules"),
    [
        (Scheme("fp32", "none"), LayerRules(("a",))),
        (Scheme("w8a8", "static", "per-tensor", activation_symmetric=True, scale="power-of-two"), LayerRules()),
        (Scheme("w8a8", "static", io="int8"), LayerRules(("a",), ("b",))),
        (Scheme("w8a16", "static"), LayerRules(int16_activations=("a",))),
        (Scheme("w4", "none", weight_symmetric=False, weight_estimator="hqq"), LayerRules()),
        (Scheme("8da4w", "dynamic", "per-group", group_size=64), LayerRules()),
    ],
)
def test_what_litert_can_do(scheme: Scheme, rules: LayerRules) -> None:
    assert unsupported(scheme, rules) is None


def test_an_unsupported_scheme_is_refused_before_any_work(tmp_path: Path) -> None:
    scheme, exporter = Scheme("w8a16", "dynamic"), load_exporter("litert")
    model = _model(None)
    artifact = Artifact(tmp_path / "none", "litert", "fp32", Signature((), ()), 0, "", (), {}, ())
    with pytest.raises(ConversionError, match="no run-time ranges at 16 bits"):
        exporter.export_quantized(model, artifact, QuantizationRequest(scheme, None), tmp_path)


def test_power_of_two_ranges_have_such_a_scale_and_cover_what_was_seen() -> None:
    graph = _graph(Op("ADD", ("x", "bias"), ("y",)), constants=("bias",))
    for low, high in ((-1.0, 3.0), (0.0, 6.0), (-0.7, 0.0), (-127.6, 127.4)):
        for symmetric in (False, True):
            scheme = Scheme("w8a8", "static", activation_symmetric=symmetric, scale="power-of-two")
            found = statistics([graph], {"x": Range(low, high)}, scheme)
            for name, (least, most) in {"x": (low, high), "bias": (0.0, 1.0)}.items():
                minimum, maximum = float(found[name]["min"]), float(found[name]["max"])
                scale = maximum / 127 if symmetric else (maximum - minimum) / 255
                assert np.log2(scale) == int(np.log2(scale))
                assert minimum <= least <= most <= maximum
                assert minimum / scale == int(minimum / scale)


def test_extremes_of_weights_give_back_the_estimators_scale() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    graph = Graph((Op("FULLY_CONNECTED", ("x", "w"), ("y",), 0),), ("x",), {"x": 0, "w": 1, "y": 2}, {"w": weight})
    assert statistics([graph], {}, Scheme("w8", "none")) == {}
    scheme = Scheme("w4", "none", weight_estimator="mse")
    found, expected = statistics([graph], {}, scheme)["w"], quantize_weight(weight, scheme, 0)
    assert found["max"].shape == (4, 1)
    np.testing.assert_allclose(found["max"][:, 0] / 7, expected.scale, rtol=1e-6)
    np.testing.assert_array_equal(found["min"], -found["max"])
    asymmetric = Scheme("w4", "none", "per-tensor", weight_symmetric=False, weight_estimator="hqq")
    found, expected = statistics([graph], {}, asymmetric)["w"], quantize_weight(weight, asymmetric, None)
    assert found["max"].shape == (1, 1)
    np.testing.assert_allclose((found["max"] - found["min"]).item() / 15, expected.scale, rtol=1e-6)
    assert round(-8 - found["min"].item() / float(expected.scale)) == expected.zero_point


def test_trained_ranges_reach_back_to_where_a_tensor_was_computed() -> None:
    graph = _graph(
        Op("ADD", ("x", "x"), ("sum",)),
        Op("RESHAPE", ("sum",), ("flat",)),
        _fully_connected("flat", "a"),
        _fully_connected("flat", "b"),
        _fully_connected("b", "c"),
        constants=("w",),
    )
    found = trained_ranges(graph, {"edgeopt_model.a": (-1.0, 2.0), "b": (-3.0, 1.0), "missing": (0.0, 9.0)})
    assert found == {"flat": Range(-3.0, 2.0), "sum": Range(-3.0, 2.0)}
