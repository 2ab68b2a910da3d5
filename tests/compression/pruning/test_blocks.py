from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeopt.compression.pruning.analysis import analyse
from edgeopt.compression.pruning.removal import remove_units
from edgeopt.types import Model, TensorSpec


class Residual(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


class Pair(nn.Module):
    """A block that returns two values, the second never there."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.norm(x + self.body(x)), None


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair() for _ in range(3))
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        result: Tensor = self.out(x)
        return result


def model_of(net: nn.Module) -> Model:
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).numpy()
    return Model("m", net.eval(), None, (TensorSpec("x", (1, 8), "float32"),), (), {"x": x}, None, (), (), "")


def blocks_of(net: nn.Module, *protect: str) -> list[str]:
    return [group.name for group in analyse(model_of(net), ("blocks",), protect).groups]


def test_residual_blocks_are_found_but_not_their_stack_nor_what_only_fits_by_shape() -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Residual(), Residual()), plain, Residual(), nn.Linear(8, 2))
    assert blocks_of(net) == ["1.0", "1.1", "3"]


def test_vanishing_activations_do_not_make_a_gate_a_block() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = x * torch.sigmoid(self.inner(x))
            return result

    first = nn.Linear(8, 8)
    with torch.no_grad():
        first.weight.mul_(1e-12)
        first.bias.zero_()
    assert blocks_of(nn.Sequential(first, Gate(), Residual(), nn.Linear(8, 2))) == ["2"]


def test_protected_layers_keep_their_blocks() -> None:
    net = nn.Sequential(Residual(), Residual(), Residual(), nn.Linear(8, 2))
    assert blocks_of(net, "1", "2.body.2") == ["0"]


def test_a_removed_block_hands_its_input_on() -> None:
    model = model_of(nn.Sequential(Residual(), nn.Linear(8, 2)))
    small = remove_units(model, analyse(model, ("blocks",), ()), {"0": (0,)}).module
    assert small is not None
    assert model.module is not None
    x = torch.randn(3, 8)
    torch.testing.assert_close(small(x), model.module[1](x))  # type: ignore[index]
    assert sum(p.numel() for p in small.parameters()) == 18


def test_blocks_of_a_series_that_return_tuples() -> None:
    model = model_of(Pairs())
    prunable = analyse(model, ("blocks",), ())
    assert [(group.name, group.returns) for group in prunable.groups] == [(f"layers.{i}", 2) for i in range(3)]
    every = {group.name: (0,) for group in prunable.groups}
    small = remove_units(model, prunable, every).module
    assert isinstance(small, Pairs)
    x = torch.randn(3, 8)
    torch.testing.assert_close(small(x), small.out(x))


def test_a_block_with_an_output_that_something_else_reads_stays() -> None:
    class Collected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = Residual(), Weighted(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x, weight = self.b(self.a(x))
            result: Tensor = self.out(x) * weight
            return result

    class Weighted(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y, y.mean()

    assert blocks_of(Collected()) == ["a"]


def test_channels_and_blocks_go_together() -> None:
    net = nn.Sequential(nn.Linear(8, 8), Residual(), Residual(), nn.Linear(8, 2))
    model = model_of(net)
    prunable = analyse(model, ("channels", "blocks"), ())
    names = [group.name for group in prunable.groups]
    assert names == ["0", "1.body.0", "2.body.0", "1", "2"]
    plan = {"0": (0, 1, 7), "1.body.0": (3,), "2.body.0": (0,), "1": (0,)}
    small = remove_units(model, prunable, plan).module
    assert small is not None
    assert small(torch.randn(2, 8)).shape == (2, 2)
    assert small.get_parameter("2.body.0.weight").shape == (15, 5)
