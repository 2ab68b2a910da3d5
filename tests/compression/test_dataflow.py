"""Channels are followed through whatever keeps the function, and pinned by whatever does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeopt.compression.base import forward
from edgeopt.compression.dataflow import Dataflow, follow
from edgeopt.compression.surgery import Surgery, biasable
from edgeopt.types import Model, TensorSpec

IMAGE = (2, 3, 12, 12)


def model_of(module: nn.Module, shape: tuple[int, ...] = IMAGE) -> Model:
    torch.manual_seed(0)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    spec = TensorSpec("x", shape, "float32")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return Model("net", module.eval(), None, (spec,), (), {"x": values}, None, (), (), "")


def widths(flow: Dataflow) -> dict[tuple[tuple[str, ...], tuple[str, ...]], int]:
    return {(family.producers, family.consumers): len(family.classes) for family in flow.families()}


def check_rescaling(model: Model, flow: Dataflow) -> None:
    """Random factors on every class leave the function alone, and do change the weights."""
    assert model.module is not None
    factors = np.ones(flow.labels)
    random = np.random.default_rng(1)
    for family in flow.families():
        factors[family.classes] = np.exp(random.uniform(-2, 2, len(family.classes)))
    surgery = Surgery(model.module)
    flow.rescale(surgery, factors)
    for name in flow.operators:
        if (flow.writes[name] > 0).any() and (factors[flow.writes[name]] != 1).any():
            assert not np.allclose(surgery.get(name), Surgery(model.module).get(name))
    before = forward(model, model.example_inputs)
    after = forward(replace(model, module=surgery.module), model.example_inputs)
    for wanted, found in zip(before, after, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


class Residual(nn.Module):
    """Linear bottlenecks joined by additions, with a depthwise convolution inside each."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand = nn.ModuleList(nn.Conv2d(8, 16, 1) for _ in range(2))
        self.depth = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, groups=16) for _ in range(2))
        self.project = nn.ModuleList(nn.Conv2d(16, 8, 1, bias=False) for _ in range(2))
        self.head = nn.Linear(8, 5)
        self.activation = activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for expand, depth, project in zip(self.expand, self.depth, self.project, strict=True):
            x = x + project(self.activation(depth(self.activation(expand(x)))))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def test_residual_stream_shares_one_factor_and_depthwise_channels_are_free() -> None:
    model = model_of(Residual(lambda: nn.LeakyReLU(0.1, inplace=True)))
    flow = follow(model)
    stream = (
        ("project.0.weight", "project.1.weight", "stem.weight"),
        ("expand.0.weight", "expand.1.weight", "head.weight"),
    )
    assert widths(flow) == {
        stream: 8,
        (("expand.0.weight",), ("depth.0.weight",)): 16,
        (("depth.0.weight",), ("project.0.weight",)): 16,
        (("expand.1.weight",), ("depth.1.weight",)): 16,
        (("depth.1.weight",), ("project.1.weight",)): 16,
    }
    check_rescaling(model, flow)


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardswish, nn.GELU, nn.Sigmoid, lambda: nn.Hardtanh(0, 1)])
def test_saturating_activations_pin_their_channels_only(activation: Callable[[], nn.Module]) -> None:
    model = model_of(Residual(activation))
    flow = follow(model)
    assert list(widths(flow).values()) == [8]
    check_rescaling(model, flow)


class Zoo(nn.Module):
    """Operators that move, pool, join and gate channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.prelu = nn.PReLU(12)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=2)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.left = nn.Conv2d(8, 6, 1)
        self.right = nn.Conv2d(8, 6, 1)
        self.merge = nn.Parameter(torch.randn(10, 12, 1, 1))
        self.head = nn.Linear(10 * 4 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(self.stem(functional.pad(x, (1, 1, 1, 1), mode="reflect")), 2)
        x = self.up(self.prelu(self.grouped(x)))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = torch.cat([self.left(x).clamp(min=0), self.right(x) * 0.5], 1)
        x = functional.conv2d(functional.channel_shuffle(x, 3), self.merge)
        return self.head(torch.flatten(functional.interpolate(x, size=(4, 4), mode="nearest"), 1))


def test_pools_gates_concatenation_shuffle_groups_and_flatten() -> None:
    model = model_of(Zoo())
    flow = follow(model)
    assert widths(flow) == {
        (("stem.weight",), ("grouped.weight",)): 8,
        (("grouped.weight",), ("up.weight",)): 12,
        (("up.weight",), ("left.weight", "right.weight", "squeeze.weight")): 8,
        (("squeeze.weight",), ("excite.weight",)): 4,
        (("left.weight",), ("merge",)): 6,
        (("right.weight",), ("merge",)): 6,
        (("merge",), ("head.weight",)): 10,
    }
    check_rescaling(model, flow)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.gain = nn.Parameter(torch.rand(16) + 0.5)
        self.gate, self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (f(y).view(2, 5, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(2, 5, 16))
        y = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def test_attention_values_normalizations_and_gated_units() -> None:
    model = model_of(Attention(), (2, 5, 16))
    flow = follow(model)
    assert widths(flow) == {
        (("norm.weight",), ("k.weight", "q.weight", "v.weight")): 16,
        (("v.weight",), ("out.weight",)): 16,
        (("gain",), ("gate.weight", "up.weight")): 16,
        (("up.weight",), ("down.weight",)): 24,
    }
    check_rescaling(model, flow)


def test_multi_head_attention_with_packed_weights() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out

    model = model_of(Block(), (2, 5, 16))
    flow = follow(model)
    assert widths(flow) == {(("attention.in_proj_weight",), ("attention.out_proj.weight",)): 16}
    check_rescaling(model, flow)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.tied, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.tied.weight = nn.Parameter(self.last.weight.data)  # another parameter, the same memory

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.last(torch.relu(self.tied(x)))


def test_weights_used_twice_or_tied_are_left_alone() -> None:
    flow = follow(model_of(Shared(), (2, 8)))
    assert set(flow.operators) == {"first.weight"}
    assert not flow.families()


def test_a_weight_that_something_else_reads_is_left_alone() -> None:
    class Regularized(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.twice(torch.relu(self.first(x))) * self.first.weight.norm()

    assert set(follow(model_of(Regularized(), (2, 8))).operators) == {"twice.weight"}


def test_outputs_are_pinned() -> None:
    class Both(Shared):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            x = self.first(x)
            return x, self.twice(x)

    assert not follow(model_of(Both(), (2, 8))).families()


def test_in_place_products_pin_the_other_factor() -> None:
    class InPlace(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = torch.sigmoid(x)
            gate.mul_(self.first(x))
            return self.twice(gate)

    model = model_of(InPlace(), (2, 8))
    flow = follow(model)
    assert not flow.families()


def test_transposed_weights_of_a_matrix_product() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ self.a.t()) @ self.b

    model = model_of(Products(), (2, 8))
    flow = follow(model)
    assert widths(flow) == {(("a",), ("b",)): 6}
    check_rescaling(model, flow)


def test_bias_is_offered_only_where_it_arrives() -> None:
    class Deaf(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.conv2d(x, self.weight)

    class Listening(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.conv2d(x, self.weight, self.bias)

    module = nn.Sequential(Deaf(3, 4, 1, bias=False), Listening(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False))
    model = model_of(module)
    assert biasable(model, follow(model).operators) == {"1.weight", "2.weight"}


def test_a_division_that_rounds_pins_its_channels() -> None:
    class Floors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.div(torch.relu(self.a(x)), 0.5, rounding_mode="floor"))

    assert follow(model_of(Floors())).families() == []
