"""Which parameters count as weights, and along which dimension they are summed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.sparsity.masks import sparsifiable
from edgeopt.compression.sparsity.products import products_of
from edgeopt.errors import UsageError
from edgeopt.types import Array, DType, Model, TensorSpec

RNG = np.random.default_rng(0)


def model(module: nn.Module, array: Array, dtype: DType = "float32") -> Model:
    spec = TensorSpec("x", array.shape, dtype)
    return Model("net", module.eval(), None, (spec,), (), {"x": array.astype(dtype)}, None, (), (), "0" * 64)


def found(module: nn.Module, array: Array, dtype: DType = "float32") -> dict[str, int | None]:
    return {product.name: product.input_axis for product in products_of(model(module, array, dtype))}


def picture(channels: int, side: int = 12) -> Array:
    return RNG.normal(size=(1, channels, side, side))


def test_convolutions_but_no_depthwise_ones_and_no_normalizations() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1, groups=2),
        nn.ConvTranspose2d(8, 4, 2), nn.GroupNorm(2, 4),
    )  # fmt: skip
    assert found(net, picture(3)) == {"0.weight": 1, "3.weight": 1, "4.weight": 0}


def test_torch_own_attention() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False)
    assert found(net, RNG.normal(size=(1, 5, 16))) == {
        "layers.0.self_attn.in_proj_weight": 1,
        "layers.0.self_attn.out_proj.weight": 1,
        "layers.0.linear1.weight": 1,
        "layers.0.linear2.weight": 1,
    }


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.cell = nn.LSTMCell(5, 4)
        self.start = nn.Parameter(torch.rand(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = self.gru(x)[0][:, -1]
        result: torch.Tensor = self.cell(last, (self.start, self.start))[0]
        return result


def test_recurrent_layers_but_no_learned_start() -> None:
    assert found(Recurrent(), RNG.normal(size=(1, 7, 6))) == {
        "gru.weight_ih_l0": 1, "gru.weight_hh_l0": 1, "cell.weight_ih": 1, "cell.weight_hh": 1,
    }  # fmt: skip


class Tied(nn.Module):
    """Looks up, adds positions, multiplies with plain parameters, and reads its embedding again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.positions = nn.Parameter(torch.rand(7, 8))
        self.right = nn.Parameter(torch.rand(8, 6))
        self.left = nn.Parameter(torch.rand(5, 7))
        self.summed = nn.Parameter(torch.rand(6, 8))
        self.twice = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.twice(self.twice(self.tokens(x) + self.positions))
        mixed = self.left @ (y @ self.right)
        return nn.functional.linear(y, self.tokens.weight), torch.einsum("bij,jk->bik", mixed, self.summed)


def test_plain_products_each_once_and_no_embedding_even_where_it_is_tied() -> None:
    assert found(Tied(), RNG.integers(0, 20, (1, 7)), "int64") == {
        "twice.weight": 1, "right": 0, "left": 1, "summed": None,
    }  # fmt: skip


def test_weights_of_an_exported_graph_and_transposed_ones() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4, 6))
            self.bias = nn.Parameter(torch.rand(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x.flatten(1), self.weight)

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), Conv1D()).eval()
    exported = torch.export.export(net, (torch.rand(1, 3, 6, 6),)).module(check_guards=False)
    exported.eval = lambda: exported  # type: ignore[method-assign,assignment]
    assert found(exported, picture(3, 6)) == {"0.weight": 1, "2.weight": 0}


def test_a_weight_that_is_computed_is_left_alone() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 2))
    assert found(net, RNG.normal(size=(1, 8))) == {"1.weight": 1}


def test_protected_layers_and_patterns_that_match_none() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)))
    source = model(net, picture(3))
    assert [weight.name for weight in sparsifiable(source, ["1"])] == ["0.weight"]
    assert [weight.name for weight in sparsifiable(source, ["1.*"])] == ["0.weight"]
    with pytest.raises(UsageError, match=r"protect '2': matches no layer .*did you mean"):
        sparsifiable(source, ["2"])
    with pytest.raises(UsageError, match="every layer with weights is protected"):
        sparsifiable(source, ["*"])
    with pytest.raises(UsageError, match="has no weights that may become zero"):
        sparsifiable(model(nn.BatchNorm2d(3), picture(3)))
