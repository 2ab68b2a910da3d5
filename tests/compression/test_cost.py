"""What a network costs, against figures worked out by hand and against networks that really are smaller."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.cost import (
    estimate_macs,
    estimate_parameters,
    layer_shapes,
    macs_of,
    parameters_of,
    planned_shapes,
    single_example,
)
from edgeopt.compression.pruning.groups import Prunable, PruningGroup, Slice
from edgeopt.types import WRAPPED_ATTRIBUTE, Dim, Model, TensorSpec


def model_of(module: nn.Module, *shapes: tuple[int | Dim, ...], batch: int = 1) -> Model:
    inputs = tuple(TensorSpec(f"x{i}", shape, "float32") for i, shape in enumerate(shapes))
    arrays = {
        spec.name: np.random.default_rng(0)
        .standard_normal([batch if isinstance(d, Dim) else d for d in spec.shape])
        .astype(np.float32)
        for spec in inputs
    }
    return Model("net", module.eval(), None, inputs, (), arrays, None, (), (), "")


def single(indices: list[int]) -> np.ndarray:
    return np.array(indices, np.int64).reshape(-1, 1)


def group(name: str, units: int, *slices: Slice) -> PruningGroup:
    return PruningGroup(name, "channels", units, 1, slices)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x, x, x)[0]


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv2d(8, 6, 3, groups=2), (1, 8, 7, 7), 5 * 5 * 6 * 4 * 9),
        (nn.Conv1d(8, 6, 3, padding="same"), (1, 8, 10), 10 * 6 * 8 * 3),
        (nn.ConvTranspose2d(8, 4, 3, stride=2), (1, 8, 7, 7), 49 * 8 * 4 * 9),
        (nn.Linear(4, 3), (1, 6, 4), 6 * 4 * 3),
        (nn.Linear(4, 3, bias=False), (4,), 4 * 3),
        (nn.LSTM(8, 16, batch_first=True), (1, 5, 8), 5 * 64 * (8 + 16)),
        (nn.LSTM(8, 16, 2, bidirectional=True), (5, 1, 8), 2 * 5 * 64 * (8 + 16) + 2 * 5 * 64 * (32 + 16)),
        (nn.GRU(8, 16, batch_first=True), (1, 5, 8), 5 * 48 * (8 + 16)),
        (Attention(), (1, 2, 8, 4), 2 * 2 * 8 * 8 * 4),
        (SelfAttention(), (1, 5, 16), 5 * 16 * 48 + 2 * 4 * 5 * 5 * 4 + 5 * 16 * 16),
        (
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
            (1, 5, 16),
            5 * 16 * 48 + 2 * 4 * 5 * 5 * 4 + 5 * 16 * 16 + 2 * 5 * 16 * 32,
        ),
    ],
)
def test_macs_are_those_of_the_formula(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert macs_of(model_of(module, shape)) == macs


def test_macs_are_those_of_one_sample() -> None:
    model = model_of(nn.Linear(4, 3), (Dim("batch"), 4), batch=7)
    assert macs_of(model) == 12
    assert layer_shapes(model)[""].input_size == (1,)


def test_a_batch_that_the_signature_fixes_stays() -> None:
    assert macs_of(model_of(nn.Linear(4, 3), (7, 4))) == 84


def test_an_input_without_a_batch_stays_whole() -> None:
    model = model_of(nn.Linear(4, 3), (Dim("batch"), 4), (5, 4), batch=7)
    assert {name: array.shape for name, array in single_example(model).items()} == {"x0": (7, 4), "x1": (5, 4)}


def test_fused_layers_are_switched_on_again() -> None:
    macs_of(model_of(nn.Linear(4, 3), (1, 4)))
    assert torch.backends.mha.get_fastpath_enabled()


def test_shared_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.output = nn.Linear(4, 10, bias=False)
            self.output.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.output(self.embedding(x.long()))

    model = model_of(Tied(), (1, 3))
    assert parameters_of(model) == 40
    shape = layer_shapes(model)["output"]
    assert (shape.in_channels, shape.out_channels, shape.macs) == (4, 10, 3 * 40)


def test_layers_are_described() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2, 2)
    )
    shapes = layer_shapes(model_of(module, (1, 3, 8, 6)))
    assert list(shapes) == ["0", "2"]
    first, last = shapes.values()
    assert (first.type, first.kernel, first.stride, first.padding, first.dilation, first.groups, first.has_bias) == (
        "convolution", (3, 3), (2, 2), (1, 1), (1, 1), 1, False
    )  # fmt: skip
    assert (first.input_size, first.macs) == ((8, 6), 4 * 3 * 8 * 27)
    assert (last.type, last.in_channels, last.out_channels, last.has_bias) == ("transposed convolution", 8, 4, True)
    assert last.macs == 12 * 8 * 4 * 4
    assert len({first, last}) == 2


def test_a_layer_of_its_own_and_a_repeated_one_are_seen() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    own = Own()
    shape = layer_shapes(model_of(nn.Sequential(own, nn.ReLU(), own), (1, 6)))["0"]
    assert (shape.in_channels, shape.out_channels, shape.calls, shape.macs, shape.has_bias) == (6, 6, 2, 72, False)


def test_attention_is_two_layers_and_a_recurrent_layer_none() -> None:
    shapes = layer_shapes(model_of(SelfAttention(), (1, 5, 16)))
    assert [(path, s.in_channels, s.out_channels) for path, s in shapes.items()] == [
        ("attend", 16, 48),
        ("attend.out_proj", 16, 16),
    ]
    assert layer_shapes(model_of(nn.GRU(8, 16, batch_first=True), (1, 5, 8))) == {}


def test_estimates_are_those_of_the_smaller_network() -> None:
    def net(a: int, b: int) -> Model:
        return model_of(
            nn.Sequential(
                nn.Conv2d(3, a, 3), nn.Conv2d(a, a, 3, groups=a), nn.Conv2d(a, b, 1), nn.Flatten(), nn.Linear(b * 16, 5)
            ),
            (1, 3, 8, 8),
        )

    model = net(8, 6)
    flat = np.arange(6 * 16, dtype=np.int64).reshape(6, 16)
    every = single(list(range(8)))
    prunable = Prunable(
        (
            group("0", 8, Slice("0", "out", every), Slice("1", "out", every), Slice("2", "in", every)),
            group("2", 6, Slice("2", "out", every[:6]), Slice("4", "in", flat)),
        ),
        (),
    )
    shapes = layer_shapes(model)
    assert estimate_macs(shapes, prunable, {}) == macs_of(model)
    assert estimate_parameters(shapes, prunable, {}) == parameters_of(model)
    plan = {"0": (1, 5, 6), "2": (0, 5)}
    smaller = net(5, 4)
    assert planned_shapes(shapes, prunable, plan) == layer_shapes(smaller)
    assert estimate_macs(shapes, prunable, plan) == macs_of(smaller)
    assert estimate_parameters(shapes, prunable, plan) == parameters_of(smaller)


def test_a_grouped_convolution_loses_whole_groups() -> None:
    def net(inputs: int, outputs: int, groups: int) -> Model:
        return model_of(nn.Conv2d(inputs, outputs, 3, groups=groups), (1, inputs, 5, 5))

    shapes = layer_shapes(net(12, 6, 3))
    prunable = Prunable((group("g", 3, Slice("", "out", np.arange(6, dtype=np.int64).reshape(3, 2))),), ())
    assert planned_shapes(shapes, prunable, {"g": (1,)}) == layer_shapes(net(8, 4, 2))


def test_layers_go_by_their_paths_in_the_users_own_module() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(WRAPPED_ATTRIBUTE, nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.get_submodule(WRAPPED_ATTRIBUTE)(x)

    shapes = layer_shapes(model_of(Adapter(), (1, 4)))
    assert list(shapes) == ["0.0", "1"]
    layer, block = f"{WRAPPED_ATTRIBUTE}.1", f"{WRAPPED_ATTRIBUTE}.0"
    whole = PruningGroup(block, "blocks", 1, 1, ())
    prunable = Prunable((group(layer, 4, Slice(layer, "out", single([0, 1, 2, 3]))), whole), ())
    assert estimate_macs(shapes, prunable, {layer: (1,), block: (0,)}) == 12


def test_bare_parameters_are_no_layers() -> None:
    shapes = layer_shapes(model_of(nn.Linear(4, 4), (1, 4)))
    prunable = Prunable((group("g", 4, Slice("", "out", single([0, 1, 2, 3]), "position")),), ())
    assert planned_shapes(shapes, prunable, {"g": (1,)}) == shapes


def test_a_removed_block_costs_nothing() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    prunable = Prunable((PruningGroup("0", "blocks", 1, 1, ()),), ())
    shapes = layer_shapes(model_of(module, (1, 4)))
    assert list(planned_shapes(shapes, prunable, {"0": (0,)})) == ["1"]
    assert estimate_macs(shapes, prunable, {"0": (0,)}) == 16
