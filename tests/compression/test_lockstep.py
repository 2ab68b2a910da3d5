from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.layers import Call, Layer, find_layers
from edgeopt.compression.lockstep import run_in_lockstep
from edgeopt.errors import ConversionError
from edgeopt.types import Model, TensorSpec


def layers_of(net: nn.Module, width: int) -> tuple[Layer, ...]:
    spec = TensorSpec("x", (1, width), "float32")
    model = Model("m", net.eval(), None, (spec,), (), {"x": np.ones((1, width), dtype=np.float32)}, None, (), (), "")
    return find_layers(model, net)


def test_all_runs_meet_at_each_layer_and_go_on_with_the_answer() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    layers = layers_of(net, 2)
    runs = [(torch.full((batch, 2), float(batch)),) for batch in (1, 2, 3)]
    seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def handle(calls: Sequence[Call]) -> list[torch.Tensor]:
        seen.append((calls[0].layer.path, [tuple(call.input.shape) for call in calls]))
        if calls[0].layer.path == "2":
            assert all((call.input == 5).all() for call in calls)
        return [torch.full((call.input.shape[0], 3), 5.0) for call in calls]

    run_in_lockstep(net, layers, runs, handle)
    assert seen == [("0", [(1, 2), (2, 2), (3, 2)]), ("2", [(1, 3), (2, 3), (3, 3)])]


def test_a_path_that_depends_on_the_input_is_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.second(x) if float(x.sum()) > 0 else x

    net = Branching()
    nn.init.ones_(net.first.weight)
    layers = layers_of(net, 2)
    runs = [(torch.full((1, 2), sign * 100.0),) for sign in (1, -1)]
    with pytest.raises(ConversionError, match="layer 'second': is not reached by all samples alike"):
        run_in_lockstep(net, layers, runs, lambda calls: [call.result(call.input) for call in calls])


def test_errors_of_the_network_and_of_the_handler_come_through() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    layers = layers_of(net, 2)
    with pytest.raises(RuntimeError, match="shapes"):
        run_in_lockstep(
            net, layers, [(torch.ones(1, 2),), (torch.ones(1, 3),)], lambda c: [x.result(x.input) for x in c]
        )

    def fail(calls: Sequence[Call]) -> list[torch.Tensor]:
        raise KeyError(calls[0].layer.path)

    with pytest.raises(KeyError, match="0"):
        run_in_lockstep(net, layers, [(torch.ones(1, 2),)] * 3, fail)


def test_runs_keep_apart_what_the_module_keeps_on_itself() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.seen = nn.Buffer(torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.skip = self.first(x)
            self.seen.copy_(x[0])
            return self.second(x) + self.skip + self.seen

    net = Stateful()
    layers = layers_of(net, 2)
    runs = [(torch.full((1, 2), float(value)),) for value in (1, 2, 3)]
    inside: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        expected = [net(*run) for run in runs]
    last = nn.Linear(2, 2)
    module = nn.Sequential(net, last)

    def handle(calls: Sequence[Call]) -> list[torch.Tensor]:
        inside[calls[0].layer.path] = [call.input for call in calls]
        return [call.result(call.input) for call in calls]

    run_in_lockstep(module, layers_of(module, 2), runs, handle)
    assert len(layers) == 2
    for wanted, found in zip(expected, inside["1"], strict=True):
        torch.testing.assert_close(found, wanted)
