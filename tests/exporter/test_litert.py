"""What the LiteRT exporter does around the vendors' converters; whole conversions are in tests/e2e."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.schema_py_generated import BuiltinOperator

from edgeopt.errors import ConversionError, MissingError
from edgeopt.exporter import load_exporter
from edgeopt.exporter.litert_convert import _example_arguments, from_native, permutation
from edgeopt.exporter.litert_graph import keep_spatial_reductions, split_overhanging_pools
from edgeopt.exporter.litert_names import layers_in, mark_layers
from edgeopt.exporter.litert_quantize import MASK, _Op, _spread_masks, has_recipe, mask_reach
from edgeopt.types import Dim, Model, NativeGraph, TensorSpec


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


def test_which_operators_have_a_recipe() -> None:
    assert has_recipe("TRANSPOSE_CONV", "static")
    assert has_recipe("HARD_SWISH", "static")
    assert not has_recipe("HARD_SWISH", "dynamic")
    assert not has_recipe("CUMSUM", "static")


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
        _Op(BuiltinOperator.SELECT_V2, ("keep", "zero", "infinity"), ("mask",)),
        _Op(BuiltinOperator.ADD, ("scores", "mask"), ("masked",)),
        _Op(BuiltinOperator.SOFTMAX, ("masked",), ("weights",)),
        _Op(BuiltinOperator.MUL, ("weights", "values"), ("context",)),
    ]
    floats = dict.fromkeys(("zero", "infinity", "mask", "scores", "masked", "weights", "values", "context"), 0)
    assert _spread_masks(ops, {"infinity": -3e38}, floats).keys() == {"infinity", "mask", "masked"}
