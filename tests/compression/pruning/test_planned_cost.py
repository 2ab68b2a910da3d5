"""Costs of networks that are yet to be made, against those of networks made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.cost import macs_by_module, macs_of, parameters_of
from edgeopt.compression.pruning.groups import Attribute, Prunable, PruningGroup, Slice
from edgeopt.compression.pruning.planned_cost import planned_macs, planned_parameters
from edgeopt.types import Model, TensorSpec


def model_of(module: nn.Module, *shape: int) -> Model:
    spec = TensorSpec("x", shape, "float32")
    return Model("net", module.eval(), None, (spec,), (), {"x": np.ones(shape, np.float32)}, None, (), (), "")


def part(layer: str, side: str, units: int, width: int = 1, offsets: tuple[int, ...] = (0,)) -> Slice:
    own = np.arange(units * width, dtype=np.int64).reshape(units, width)
    return Slice(layer, "out" if side == "out" else "in", np.concatenate([own + offset for offset in offsets], axis=1))


class Encoder(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Linear(3, inputs)
        self.rnn = nn.GRU(inputs, hidden, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(self.enter(x))[0][:, -1])


class Attention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(16, heads * 4) for _ in range(3))
        self.out = nn.Linear(heads * 4, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, *heads: int) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 6, 16))
        self.layers = nn.ModuleList(Attention(count) for count in heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token, x], 1) + self.position
        for layer in self.layers:
            x = x + layer(x)
        return x


def check(model: Model, prunable: Prunable, plan: dict[str, tuple[int, ...]], smaller: Model) -> None:
    macs, parameters = planned_macs(model, prunable), planned_parameters(model, prunable)
    assert (macs({}), parameters({})) == (macs_of(model), parameters_of(model))
    assert (macs(plan), parameters(plan)) == (macs_of(smaller), parameters_of(smaller))


def test_recurrent_layers() -> None:
    prunable = Prunable(
        (
            PruningGroup("enter", "channels", 8, 1, (part("enter", "out", 8), part("rnn", "in", 8))),
            PruningGroup("rnn", "channels", 6, 2, (part("rnn", "out", 6, 1, (0, 6)), part("out", "in", 6, 1, (0, 6)))),
        ),
        (),
    )
    plan = {"enter": (0, 7), "rnn": (1, 2)}
    check(model_of(Encoder(8, 6), 1, 5, 3), prunable, plan, model_of(Encoder(6, 4), 1, 5, 3))


def attention_groups(count: int) -> Prunable:
    heads = [
        PruningGroup(
            f"layers.{i}.q",
            "heads",
            4,
            4,
            (*(part(f"layers.{i}.{name}", "out", 4, 4) for name in "qkv"), part(f"layers.{i}.out", "in", 4, 4)),
            (Attribute(f"layers.{i}", "heads", 1),),
        )
        for i in range(count)
    ]
    return Prunable((*heads, *(PruningGroup(f"layers.{i}", "blocks", 1, 1, ()) for i in range(count))), ())


def test_heads_take_their_products_with_them() -> None:
    model = model_of(Transformer(4, 4), 1, 5, 16)
    check(model, attention_groups(2), {"layers.0.q": (3,), "layers.1.q": (0, 2)}, model_of(Transformer(3, 2), 1, 5, 16))


def test_blocks_take_everything_with_them() -> None:
    model = model_of(Transformer(4, 4), 1, 5, 16)
    check(model, attention_groups(2), {"layers.1.q": (1,), "layers.0": (0,)}, model_of(Transformer(3), 1, 5, 16))
    check(model, attention_groups(2), {"layers.0.q": (1,), "layers.0": (0,)}, model_of(Transformer(4), 1, 5, 16))


def test_a_tensor_that_others_own_too_outlives_its_block() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4, bias=False)), nn.Linear(4, 4, bias=False))
    assert isinstance(net[0], nn.Sequential)
    net[0][0].weight = net[1].weight
    prunable = Prunable((PruningGroup("0", "blocks", 1, 1, ()), PruningGroup("1", "blocks", 1, 1, ())), ())
    parameters = planned_parameters(model_of(net, 1, 4), prunable)
    assert [parameters(plan) for plan in ({}, {"0": (0,)}, {"0": (0,), "1": (0,)})] == [16, 16, 0]


def test_normalizations_and_bare_parameters_count() -> None:
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 2)
            self.scale = nn.Parameter(torch.ones(1, width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.norm(self.one(x)) * self.scale)

    bare = Slice("", "out", np.arange(5, dtype=np.int64).reshape(5, 1), "scale")
    slices = (part("one", "out", 5), part("norm", "out", 5), bare, part("two", "in", 5))
    prunable = Prunable((PruningGroup("one", "channels", 5, 1, slices),), ())
    check(model_of(Net(5), 1, 3), prunable, {"one": (0, 4)}, model_of(Net(3), 1, 3))


@pytest.mark.parametrize("path", ["", "layers.0", "layers.0.q"])
def test_macs_by_module_are_those_of_all_within(path: str) -> None:
    counts = macs_by_module(model_of(Transformer(4, 4), 1, 5, 16))
    projections, products = 4 * 6 * 16 * 16, 2 * 4 * 6 * 6 * 4
    expected = {"": 2 * (projections + products), "layers.0": projections + products, "layers.0.q": 6 * 16 * 16}
    assert counts[path] == expected[path]
