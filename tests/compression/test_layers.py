from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from edgeopt.compression.layers import by_identity, find_layers, give_biases, intercept
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import Model, TensorSpec


def model_of(module: nn.Module, shape: tuple[int, ...]) -> Model:
    arrays = {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    spec = TensorSpec("x", shape, "float32")
    return Model("m", module.eval(), None, (spec,), (), arrays, None, (), (), "")


class Functional(nn.Module):
    """No stock layer at all, and a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(4, 1, 3, 3))
        self.shift = nn.Parameter(torch.zeros(4))
        self.matrix = nn.Parameter(torch.ones(2, 4))
        self.computed = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, self.kernel, bias=self.shift, stride=(2, 1), padding=1, groups=4)
        return F.linear(F.linear(x.mean((2, 3)), self.matrix), self.computed * 2)


def test_finds_functional_calls_with_their_geometry() -> None:
    found = find_layers(model_of(module := Functional(), (1, 4, 8, 8)), module)
    assert [(layer.weight, layer.bias, layer.kind) for layer in found] == [
        ("kernel", "shift", "convolution"),
        ("matrix", None, "linear"),
    ]
    assert (found[0].stride, found[0].padding, found[0].dilation, found[0].groups) == ((2, 1), (1, 1), (1, 1), 4)


def test_finds_the_layers_of_an_exported_graph() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, dilation=2)).eval()
    x = torch.zeros(1, 3, 16, 16)
    module = torch.export.export(net, (x,)).module()
    found = find_layers(model_of(net, (1, 3, 16, 16)), module)
    assert [layer.weight for layer in found] == ["0.weight", "2.weight"]
    assert found[1].dilation == (2, 2)


def test_shared_weights_are_not_layers() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    third = nn.Linear(4, 4)
    net = nn.Sequential(first, second, third)
    assert [layer.path for layer in find_layers(model_of(net, (1, 4)), net)] == ["2"]


def test_order_is_that_of_execution_and_the_adapters_prefix_is_dropped() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edgeopt_model = nn.ModuleDict({"late": nn.Linear(4, 4), "early": nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.edgeopt_model["late"](self.edgeopt_model["early"](x))
            return out

    found = find_layers(model_of(module := Adapter(), (1, 4)), module)
    assert [layer.path for layer in found] == ["early", "late"]
    assert found[0].weight == "edgeopt_model.early.weight"
    assert layer_is_exempt(found[0].path, ["ear*"])
    assert not layer_is_exempt(found[0].path, ["late"])


def test_sees_which_layer_feeds_a_batch_norm() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU())
    found = find_layers(model_of(net, (1, 3, 4, 4)), net)
    assert [layer.feeds_norm for layer in found] == [True, False]


def test_gives_a_bias_where_it_arrives_and_only_there() -> None:
    class Stubborn(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight)

    net = nn.Sequential(nn.Linear(4, 4, bias=False), Stubborn(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net.append(nn.BatchNorm1d(4))
    model = model_of(net, (1, 4))
    before = net(torch.tensor(model.example_inputs["x"]))
    found = give_biases(model, net)
    assert [layer.bias for layer in found] == ["0.bias", None, None]
    assert net[1].bias is None
    assert net[2].bias is None
    assert torch.equal(net(torch.tensor(model.example_inputs["x"])), before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 3),
        lambda: nn.Conv1d(4, 6, 3, groups=2),
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2, dilation=2),
    ],
)
def test_an_intercepted_call_can_be_made_with_other_operands(make: Callable[[], nn.Module]) -> None:
    net = make().eval()
    model = model_of(net, (1, 4, 4))
    layers = find_layers(model, net)
    x = torch.tensor(model.example_inputs["x"])
    with torch.no_grad():
        plain = net(x)
        with intercept(
            by_identity(net, layers), lambda call: call.result(call.input * 2, bias=torch.zeros_like(net.bias))
        ):  # type: ignore[arg-type]
            found = net(x)
        shift = net.bias if layers[0].kind == "linear" else net.bias[:, None]  # type: ignore[index]
        torch.testing.assert_close(found, 2 * (plain - shift))
    assert layers[0].output_channels == plain.shape[-1 if layers[0].kind == "linear" else 1]


def test_weights_that_something_else_reads_are_not_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight
            self.transposed = nn.Linear(5, 4)
            self.again = self.body

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(self.embed((x > 0).long()))
            assert self.body.weight.dtype == torch.float32
            return self.transposed(self.head(x)) @ self.transposed.weight.t().T

    found = find_layers(model_of(net := Tied(), (1, 4)), net)
    assert [layer.path for layer in found] == ["body"]


def test_weights_that_share_memory_are_not_layers() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = nn.Parameter(first.weight.data)
    net = nn.Sequential(first, nn.ReLU())
    net.add_module("unused", second)
    net.forward = lambda x: first(x)  # type: ignore[assignment]
    assert find_layers(model_of(net, (1, 4)), net) == ()


def test_gives_an_exported_graph_its_biases() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False)).eval()
    model = model_of(net, (1, 3, 4, 4))
    x = torch.tensor(model.example_inputs["x"])
    module = torch.export.export(net, (x,)).module()
    before = module(x)
    assert [layer.bias for layer in give_biases(model, module)] == ["0.bias", "2.bias"]
    assert torch.equal(module(x), before)
