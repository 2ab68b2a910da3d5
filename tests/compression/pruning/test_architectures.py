"""Networks of many kinds with random weights: what is found can go, and what is left computes the right thing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from edgeopt.compression.pruning.analysis import analyse
from edgeopt.compression.pruning.groups import Plan, Prunable
from edgeopt.compression.pruning.removal import remove_units, silence_in_place
from edgeopt.types import Dim, Model, TensorSpec

ALL = ("channels", "heads", "blocks")


def model_of(net: nn.Module, *inputs: Tensor, dims: dict[int, Dim] | None = None) -> Model:
    """`dims` names free dimensions, of all inputs alike."""
    specs, examples = [], {}
    for i, x in enumerate(inputs):
        array = x.numpy()
        shape = tuple((dims or {}).get(axis, size) for axis, size in enumerate(array.shape))
        specs.append(TensorSpec(f"x{i}", shape, "int64" if array.dtype == np.int64 else "float32"))
        examples[f"x{i}"] = array
    return Model("m", net.eval(), None, tuple(specs), (), examples, None, (), (), "")


def run(model: Model, *inputs: Tensor) -> Tensor:
    assert model.module is not None
    with torch.no_grad():
        result = model.module(*inputs)
    return result[0] if isinstance(result, tuple) else result


def plan_for(prunable: Prunable, share: float = 0.5) -> Plan:
    """A share of the units of every group but blocks, spread over the layer."""
    plan: dict[str, tuple[int, ...]] = {}
    for group in prunable.groups:
        if group.kind != "blocks":
            count = min(max(1, int(group.units * share)), group.units - 1)
            order = np.random.default_rng(7).permutation(group.units)[:count]
            plan[group.name] = tuple(sorted(int(unit) for unit in order))
    return plan


def assert_same_as_silenced(model: Model, prunable: Prunable, *inputs: Tensor) -> Model:
    """Pruned, the network computes what the whole one does whose layers don't listen to the removed units."""
    torch.manual_seed(1)
    plan = plan_for(prunable)
    small = remove_units(model, prunable, plan)
    silenced = remove_units(model, prunable, {})
    assert silenced.module is not None
    silence_in_place(silenced.module, [(prunable.group(name), units) for name, units in plan.items()])
    wanted, found = run(silenced, *inputs), run(small, *inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(run(model, *inputs), wanted, rtol=1e-3, atol=1e-4)
    return small


def image(channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randint(0, 30, (1, 7), generator=torch.Generator().manual_seed(0))


def settle(net: nn.Module) -> nn.Module:
    """Weights and statistics as training might have left them, none of them alike."""
    torch.manual_seed(0)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.2, 1.0)
    return net


class PlainConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.act = nn.Conv2d(8, 12, 3, padding=1), nn.PReLU(12)
        self.hidden, self.out = nn.Linear(12 * 16, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.max_pool2d(self.act(self.second(x)), 4)
        result: Tensor = self.out(F.relu(self.hidden(x.flatten(1))))
        return result


class Basic(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.b, self.norm_b = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        plain = width_in == width and stride == 1
        self.shortcut = nn.Identity() if plain else nn.Conv2d(width_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))))


def resnet() -> nn.Module:
    body = [Basic(8, 8), Basic(8, 8), Basic(8, 16, 2), Basic(16, 16)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    def __init__(self, width_in: int, wide: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.Hardswish(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.Hardswish(),
            SqueezeExcite(wide),
            nn.Conv2d(wide, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.adds = width_in == width and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return x + result if self.adds else result


def mobilenet() -> nn.Module:
    body = [Inverted(8, 24, 8, 1), Inverted(8, 24, 12, 2), Inverted(12, 36, 12, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.Hardswish(), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    )


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1)) for i in range(3)
        )
        self.norm, self.out = nn.BatchNorm2d(20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        result: Tensor = self.out(F.adaptive_avg_pool2d(self.norm(x), 1).flatten(1))
        return result


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.middle, self.up = nn.Conv2d(16, 16, 3, padding=1), nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge, self.out = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down1(x))
        x = F.relu(self.middle(F.relu(self.down2(F.max_pool2d(skip, 2)))))
        result: Tensor = self.out(F.relu(self.merge(torch.cat([skip, self.up(x)], 1))))
        return result


class ResNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, padding=1, groups=8)
        self.up, self.out = nn.ConvTranspose2d(32, 16, 2, 2, groups=8), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.grouped(F.relu(self.first(x))))))
        result: Tensor = self.out(x.mean((2, 3)))
        return result


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], bidirectional: bool) -> None:
        super().__init__()
        self.embedding, self.project = nn.Embedding(30, 12), nn.Linear(12, 10)
        self.encoder = kind(10, 8, 2, batch_first=True, bidirectional=bidirectional)
        self.out = nn.Linear(16 if bidirectional else 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        encoded, _ = self.encoder(torch.tanh(self.project(self.embedding(x))))
        result: Tensor = self.out(encoded)
        return result


class Tied(nn.Module):
    """Embedding and output layer share their weight, the layer between is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.wide, self.narrow = nn.Embedding(30, 12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.out = nn.Linear(12, 30, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for _ in range(2):
            x = x + self.narrow(F.gelu(self.wide(x)))
        result: Tensor = self.out(x)
        return result


EXACT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[str, ...], tuple[str, ...]]] = {
    "plain": (PlainConvolutions, image, ("first", "second", "hidden"), ("out",)),
    "resnet": (resnet, image, ("0", "2.a", "3.a", "4.a", "4.shortcut", "5.a"), ("8",)),
    "mobilenet": (
        mobilenet,
        image,
        ("0", *(f"{i}.body.{k}" for i in (2, 3) for k in ("0", "6.reduce")), "3.body.7", "4.body.0", "4.body.6.reduce"),
        ("7",),
    ),
    "densenet": (DenseNet, image, ("stem", "layers.0.2", "layers.1.2", "layers.2.2"), ("out",)),
    "unet": (UNet, image, ("down1", "down2", "middle", "up", "merge"), ("out",)),
    "resnext": (ResNeXt, image, ("first",), ("out",)),
    "gru": (lambda: Recurrent(nn.GRU, False), tokens, ("embedding", "project", "encoder"), ("out",)),
    "bidirectional gru": (lambda: Recurrent(nn.GRU, True), tokens, ("embedding", "project", "encoder"), ("out",)),
    "lstm": (lambda: Recurrent(nn.LSTM, True), tokens, ("embedding", "project", "encoder"), ("out",)),
    "tied": (Tied, tokens, ("embedding", "wide"), ("out",)),
}


@pytest.mark.parametrize("name", EXACT)
def test_channels_go_and_the_rest_computes_the_same(name: str) -> None:
    build, example, groups, kept = EXACT[name]
    net = settle(build())
    model = model_of(net, example())
    prunable = analyse(model, ALL, ())
    channels = {group.name for group in prunable.groups if group.kind == "channels"}
    assert channels == set(groups)
    assert {each.layer for each in prunable.kept} == set(kept)
    small = assert_same_as_silenced(model, prunable, example())
    assert small.module is not None
    assert sum(p.numel() for p in small.module.parameters()) < 0.75 * sum(p.numel() for p in net.parameters())


def test_numbers_in_the_layers_follow_their_tensors() -> None:
    model = model_of(settle(ResNeXt()), image())
    prunable = analyse(model, ALL, ())
    small = remove_units(model, prunable, {"first": (1, 2)}).module
    assert isinstance(small, ResNeXt)
    assert (small.first.out_channels, small.first.weight.shape[0]) == (12, 12)
    assert (small.grouped.in_channels, small.grouped.out_channels, small.grouped.groups) == (12, 24, 6)
    assert (small.up.in_channels, small.up.out_channels, small.up.groups) == (24, 12, 6)
    assert small.out.in_features == 12
    tied = model_of(Tied(), tokens())
    half = remove_units(tied, analyse(tied, ALL, ()), {"embedding": (0, 5)}).module
    assert isinstance(half, Tied)
    assert half.out.weight is half.embedding.weight
    assert (half.embedding.embedding_dim, half.out.in_features) == (10, 10)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.depthwise, self.out = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, 1)
        x = torch.cat([left, F.relu(self.b(self.depthwise(F.relu(self.a(right)))))], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        result: Tensor = self.out(x.mean((2, 3)))
        return result


class HardCoded(nn.Module):
    """Shapes in its forward, a layer that never runs, and more than one output."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.fixed, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3), nn.Linear(6 * 196, 5)
        self.unused = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.fixed(F.relu(self.free(x))))
        return self.out(x.view(x.shape[0], 6 * 196)), x.view(-1, 6, 196)


@pytest.mark.parametrize(
    ("build", "group", "kept"),
    [(ShuffleNet, "a", {"stem", "b", "out"}), (HardCoded, "free", {"fixed", "out", "unused"})],
)
def test_what_can_not_be_proven_right_is_kept_with_a_reason(build: type[nn.Module], group: str, kept: set[str]) -> None:
    model = model_of(settle(build()), image())
    prunable = analyse(model, ALL, ())
    assert [each.name for each in prunable.groups] == [group]
    assert {each.layer for each in prunable.kept} == kept
    assert all(each.reason for each in prunable.kept)
    assert_same_as_silenced(model, prunable, image())


class Gated(nn.Module):
    """Both halves of a layer meet, so that their channels go in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.wide(x).chunk(2, 1)
        result: Tensor = self.out(left * torch.sigmoid(right)).mean((2, 3))
        return result


def test_channels_that_meet_are_one_unit() -> None:
    model = model_of(settle(Gated()), image())
    (group,) = analyse(model, ALL, ()).groups
    assert (group.units, group.width) == (8, 2)
    assert group.slices[0].indices.tolist() == [[i, i + 8] for i in range(8)]


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.grouped = nn.Conv2d(3, 12, 1), nn.GroupNorm(6, 12)
        self.b, self.pairs = nn.Conv2d(12, 12, 1), nn.GroupNorm(2, 12)
        self.c, self.instance = nn.Conv2d(12, 8, 1), nn.GroupNorm(8, 8)
        self.layer, self.out = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pairs(self.b(F.relu(self.grouped(self.a(x)))))
        x = self.instance(self.c(F.relu(x)))
        result: Tensor = self.out(self.layer(x.mean((2, 3))))
        return result


def test_normalization_keeps_even_groups() -> None:
    model = model_of(settle(Norms()), image())
    prunable = analyse(model, ALL, ())
    assert {group.name: (group.units, group.width) for group in prunable.groups} == {
        "a": (6, 2),
        "b": (6, 2),
        "c": (8, 1),
    }
    small = remove_units(model, prunable, {"a": (0, 2), "b": (1,), "c": (0, 1, 7)}).module
    assert isinstance(small, Norms)
    assert (small.grouped.num_groups, small.grouped.num_channels) == (4, 8)
    assert (small.pairs.num_groups, small.pairs.num_channels) == (2, 10)
    assert (small.instance.num_groups, small.instance.num_channels) == (5, 5)
    assert small.layer.normalized_shape == (5,)
    assert small(image()).shape == (1, 5)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.scale * self.narrow(F.gelu(self.wide(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


def test_convnext_loses_channels_of_layer_norms_and_layer_scales() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), ConvNeXtBlock(8), ConvNeXtBlock(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.LayerNorm(8), nn.Linear(8, 5),
    )  # fmt: skip
    model = model_of(net, image(size=32))
    prunable = analyse(model, ALL, ())
    assert [group.name for group in prunable.groups] == ["0", "1.wide", "2.wide", "1", "2"]
    small = remove_units(model, prunable, {"0": (0, 3), "1.wide": (5, 6)}).module
    assert small is not None
    assert small.get_parameter("1.scale").shape == (6,)
    assert small(image(size=32)).shape == (1, 5)


def test_other_batch_sizes_are_tried_as_well() -> None:
    class FixedBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.relu(self.a(x))
            # With one sample any width passes here, with two only the original one.
            hidden = hidden.expand(1, -1) if len(x) == 1 else hidden.view(-1, 8)
            result: Tensor = self.out(hidden)
            return result

    fixed = model_of(FixedBatch(), torch.randn(1, 6), dims={0: Dim("batch")})
    assert analyse(fixed, ALL, ()).groups == ()
    (kept, *_) = analyse(fixed, ALL, ()).kept
    assert kept.layer == "a"
    assert "does not run with fewer" in kept.reason
