"""What all exporters share: which layers stay float, and what describes a written file."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from edgeopt.errors import ConversionError, UsageError
from edgeopt.exporter.base import check_keep_float, make_artifact
from edgeopt.sources.adapter import adapt
from edgeopt.types import Model, NativeGraph, Signature


def model_of(module: nn.Module | None, native: NativeGraph | None = None) -> Model:
    return Model("net", module, native, (), (), {}, None, (), (), "0" * 64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize("pattern", ["head", "features", "features.*", "features.1", "*"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_pattern_that_matches_a_layer_passes(pattern: str, adapted: bool) -> None:
    check_keep_float(model_of(adapt(Net(), ["x"], None) if adapted else Net()), (pattern,))


def test_a_pattern_that_matches_no_layer_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UsageError, match=r"keep-float 'heed': matches no layer; did you mean 'head'"):
        check_keep_float(model_of(Net()), ("features", "heed"))
    with pytest.raises(UsageError, match="matches no layer"):
        check_keep_float(model_of(Net()), ("edgeopt_model",))


def test_an_exported_program_has_layers_without_weights_too() -> None:
    module = torch.export.export(Net(), (torch.zeros(1, 3, 8, 8),)).module()
    check_keep_float(model_of(module), ("features.1", "head"))
    with pytest.raises(UsageError, match=r"did you mean 'features\.1'"):
        check_keep_float(model_of(module), ("features.2",))


def test_the_layers_of_an_onnx_file_are_its_scopes_and_its_nodes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="/head/act/Relu"),
        helper.make_node("Relu", ["a"], ["y"], name="Relu:1"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:])), tmp_path / "net.onnx")
    model = model_of(None, NativeGraph("onnx", tmp_path / "net.onnx"))
    check_keep_float(model, ("head", "head.act", "Relu_1"))
    with pytest.raises(UsageError, match=r"did you mean 'head\.act'"):
        check_keep_float(model, ("head.cat",))


@pytest.mark.parametrize("pattern", ["conv.1", "conv_1", "Conv_7", "n7_1", "7/1", "deep_conv_Conv"])
def test_nodes_without_a_scope_go_by_their_own_names(tmp_path: Path, pattern: str) -> None:
    # Regression: only "conv_1" passed, though "conv.1" exempts as well; and "_Conv_7" passed, which exempts nothing.
    names = ["conv.1", "/Conv_7", "7:1", "/deep/conv/Conv"]
    edges = [f"v{i}" for i in range(len(names) + 1)]
    nodes = [helper.make_node("Relu", [a], [b], name=n) for a, b, n in zip(edges, edges[1:], names, strict=False)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in (edges[0], edges[-1])]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:])), tmp_path / "net.onnx")
    model = model_of(None, NativeGraph("onnx", tmp_path / "net.onnx"))
    if pattern == "7/1":
        with pytest.raises(UsageError, match="matches no layer"):
            check_keep_float(model, (pattern,))
    else:
        check_keep_float(model, (pattern,))


def test_an_empty_file_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    for path in (tmp_path / "empty.onnx", tmp_path / "absent.onnx"):
        with pytest.raises(ConversionError, match="wrote no file, or an empty one"):
            make_artifact(
                path, format_="onnx", precision="fp32", signature=Signature((), ()), history=(), tools=("onnx",)
            )
