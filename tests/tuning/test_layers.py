"""Patterns that exempt exactly what they should, and groups along modules."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.errors import ConversionError
from edgeopt.layer_names import layer_is_exempt
from edgeopt.tuning.layers import Layer, Layers, _of_module, find_layers, path_of, split
from edgeopt.types import Artifact, LayerRules, TensorSpec


def _layers(*paths: str) -> Layers:
    return Layers(tuple(Layer(path, "Conv", 1000) for path in paths))


NET = _layers("stem", "blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b", "blocks.10.a", "head")


@pytest.mark.parametrize(
    ("chosen", "patterns"),
    [
        (["stem"], ("stem",)),
        (["blocks.0.a"], ("blocks.0.a",)),
        (["blocks.0.a", "blocks.0.b"], ("blocks.0",)),
        (["blocks.1.a", "blocks.1.b", "blocks.0.a", "blocks.0.b", "blocks.10.a"], ("blocks",)),
        ([layer.path for layer in NET.layers], ("*",)),
        ([], ()),
    ],
)
def test_keeping_names_the_largest_modules_that_are_chosen_as_a_whole(
    chosen: list[str], patterns: tuple[str, ...]
) -> None:
    assert NET.keeping(chosen) == patterns
    exempt = {layer.path for layer in NET.layers if layer_is_exempt(layer.path, patterns)}
    assert exempt == set(chosen)


@pytest.mark.parametrize("chosen", [["stem"], ["blocks.1.a"], ["blocks.0.a", "blocks.0.b"], ["head", "stem"]])
def test_sparing_exempts_all_other_layers(chosen: list[str]) -> None:
    patterns = NET.sparing(chosen)
    exempt = {layer.path for layer in NET.layers if layer_is_exempt(layer.path, patterns)}
    assert exempt == {layer.path for layer in NET.layers} - set(chosen)


def test_an_activation_between_layers_is_left_to_the_exporter() -> None:
    """Exempting ReLU6 parts it from the convolution that would absorb it: 9 dB instead of 23 in EfficientNet-Lite0."""
    net = _layers("features.0", "features.3", "head")
    assert not layer_is_exempt("features.1", net.sparing(["features.0"]))


def test_names_with_pattern_characters_match_themselves() -> None:
    net = _layers("a[0]", "a0", "b")
    patterns = net.keeping(["a[0]"])
    assert layer_is_exempt("a[0]", patterns)
    assert not layer_is_exempt("a0", patterns)


@pytest.mark.parametrize(
    ("format_", "name", "path"),
    [
        ("onnx", "features.0.conv/Conv_1", "features.0.conv"),
        ("onnx", "/features/features.0/Conv", "features.0"),
        ("onnx", "Reshape", ""),
        ("litert", "features.0.conv:2", "features.0.conv"),
        ("litert", "(root):1", ""),
        ("onnx", "edgeopt_model.head/Gemm", "head"),
    ],
)
def test_operator_names_give_layers(format_: str, name: str, path: str) -> None:
    assert path_of("onnx" if format_ == "onnx" else "litert", name) == path


def test_groups_cover_every_layer_once_and_keep_modules_together() -> None:
    net = [Layer(f"blocks.{k}.{part}", "Conv", 1000) for k in range(16) for part in ("a", "b", "c")]
    groups = split(net)
    assert list(chain.from_iterable(groups)) == net
    assert max(map(len, groups)) <= 7
    assert all(len(group) % 3 == 0 for group in groups)


def test_a_flat_network_is_grouped_too() -> None:
    net = [Layer(f"{k}", "Conv", 1000) for k in range(30)]
    groups = split(net)
    assert list(chain.from_iterable(groups)) == net
    assert len(groups) < 10


def test_a_small_group_is_split_into_single_layers() -> None:
    assert [len(group) for group in split(NET.layers[:4])] == [1, 1, 1, 1]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.block(x).mean(dim=(2, 3)))
        return scores


def _found(module: torch.nn.Module) -> Layers:
    """As for a .pte file, which does not name its layers."""
    image = np.zeros((1, 3, 6, 6), dtype=np.float32)
    spec = TensorSpec("x", image.shape, "float32")
    model = SimpleNamespace(module=module, inputs=(spec,), example_inputs={"x": image})
    plain = SimpleNamespace(format="executorch", path=Path("model.pte"))
    workbench: Any = SimpleNamespace(torch_model=lambda: model)
    return find_layers(workbench, cast("Artifact", plain), LayerRules())


def test_a_module_tells_its_layers_with_their_work() -> None:
    found = _found(Net().eval())
    assert [(layer.path, layer.float_bytes) for layer in found.layers] == [("block.0", 896), ("head", 144)]
    assert [layer.macs for layer in found.layers] == [8 * 3 * 9 * 36, 32]


def test_an_exported_program_tells_its_layers() -> None:
    program = torch.export.export(Net().eval(), (torch.zeros(1, 3, 6, 6),)).module(check_guards=False)
    assert [layer.path for layer in _found(program).layers] == ["block.0", "head"]


def test_a_model_that_is_one_layer_is_told_from_one_that_is_not_quantized() -> None:
    # Regression: "no layer with weights is quantized", of a model that was one quantized layer.
    with pytest.raises(ConversionError, match=r"no names.*single layer"):
        _found(torch.nn.Conv2d(3, 8, 3))


def test_a_module_without_weights_has_nothing_to_tune() -> None:
    with pytest.raises(ConversionError, match="nothing to tune"):
        _found(torch.nn.ReLU())


def test_a_layer_with_modules_of_its_own_is_found_in_a_torch_model() -> None:
    class PaddedConv(nn.Conv2d):
        """As in EfficientNet: the padding is a module inside the convolution."""

        def __init__(self) -> None:
            super().__init__(3, 4, 3)
            self.padding_first = nn.ZeroPad2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.padding_first(x))

    module = nn.Sequential(PaddedConv(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 2)).eval()
    model = SimpleNamespace(
        module=module,
        inputs=(TensorSpec("x", (1, 3, 8, 8), "float32"),),
        example_inputs={"x": np.zeros((1, 3, 8, 8), np.float32)},
    )
    workbench: Any = SimpleNamespace(torch_model=lambda: model)
    assert [layer.path for layer in _of_module(workbench)] == ["0", "3"]
