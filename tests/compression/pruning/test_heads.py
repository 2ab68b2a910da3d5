from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from edgeopt.compression.pruning.analysis import analyse
from edgeopt.compression.pruning.groups import PruningGroup
from edgeopt.compression.pruning.removal import remove_units, silence_in_place
from edgeopt.types import Model, TensorSpec

WIDTH, HEADS, SIZE = 24, 4, 6


def model_of(net: nn.Module, x: Tensor) -> Model:
    array = x.numpy()
    spec = TensorSpec("x", array.shape, "int64" if array.dtype == np.int64 else "float32")
    return Model("m", net.eval(), None, (spec,), (), {"x": array}, None, (), (), "")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return mixed.reshape(*mixed.shape[:2], -1)


class Separate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.all_head_size = HEADS, WIDTH
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.all_head_size // self.num_heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        result: Tensor = self.out(attention(q, k, v))
        return result


class SideBySide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = HEADS, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        result: Tensor = self.out(attention(q, k, v))
        return result


class HeadByHead(SideBySide):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], self.heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
        result: Tensor = self.out(attention(q, k, v))
        return result


class WithBias(SideBySide):
    """A bias per head, as Swin and T5 have for relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(2, 3) + self.table.T[:, None]).softmax(-1)
        result: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return result


class Shared(nn.Module):
    """Two heads of keys and values for four of queries."""

    def __init__(self, key_value_heads: int = 2) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups = SIZE, HEADS // key_value_heads
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, SIZE * key_value_heads) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

        q = split(self.query(x))
        k, v = (split(y).repeat_interleave(self.num_key_value_groups, 1) for y in (self.key(x), self.value(x)))
        result: Tensor = self.out(attention(q, k, v))
        return result


class Around(nn.Module):
    """An attention with a residual, between linear layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        result: Tensor = self.last(x + self.inner(x))
        return result


def example() -> Tensor:
    return torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(0))


def heads_of(model: Model) -> list[PruningGroup]:
    return [group for group in analyse(model, ("heads",), ()).groups if group.kind == "heads"]


@pytest.mark.parametrize(
    ("build", "units", "width"),
    [
        (Separate, HEADS, SIZE),
        (SideBySide, HEADS, 3 * SIZE),
        (HeadByHead, HEADS, 3 * SIZE),
        (WithBias, HEADS, 3 * SIZE),
        (Shared, 2, 2 * SIZE),
        (lambda: Shared(1), HEADS, SIZE),
    ],
)
def test_heads_go_and_the_others_compute_the_same(build: Callable[[], nn.Module], units: int, width: int) -> None:
    torch.manual_seed(0)
    model = model_of(Around(build()), example())
    prunable = analyse(model, ("heads",), ())
    (group,) = prunable.groups
    assert (group.kind, group.units, group.width) == ("heads", units, width)
    plan = {group.name: (units - 1,)}
    small = remove_units(model, prunable, plan).module
    silenced = remove_units(model, prunable, {}).module
    assert small is not None
    assert silenced is not None
    silence_in_place(silenced, [(group, (units - 1,))])
    x = torch.randn(3, 9 if build is not WithBias else 7, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(small(x), silenced(x))
    assert small.get_parameter("inner.out.weight").shape == (WIDTH, WIDTH - WIDTH // units)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in silenced.parameters())


class WrittenOut(nn.Module):
    """A whole transformer block in one module: its attention has none of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


def test_a_block_that_is_written_out_in_one_module_has_heads_and_neurons() -> None:
    net = nn.Sequential(WrittenOut(), WrittenOut(), nn.Linear(32, 5))
    found = analyse(model_of(net, torch.randn(1, 7, 32)), ("heads", "channels"), ())
    kinds = {group.name: (group.kind, group.units) for group in found.groups}
    for block in "01":
        assert kinds[f"{block}.query"] == ("heads", 4)
        assert kinds[f"{block}.up"] == ("channels", 64)


def test_numbers_of_the_module_follow() -> None:
    model = model_of(Around(Separate()), example())
    prunable = analyse(model, ("heads",), ())
    small = remove_units(model, prunable, {"inner.query": (0, 2, 3)}).module
    assert isinstance(small, Around)
    assert isinstance(small.inner, Separate)
    assert (small.inner.num_heads, small.inner.all_head_size) == (1, SIZE)
    assert isinstance(model.module, Around)
    assert isinstance(model.module.inner, Separate)
    assert (model.module.inner.num_heads, model.module.inner.all_head_size) == (HEADS, WIDTH)


def test_single_channels_of_heads_never_go() -> None:
    prunable = analyse(model_of(Around(Separate()), example()), ("channels",), ())
    assert [group.name for group in prunable.groups] == ["first"]
    reasons = {kept.layer: kept.reason for kept in prunable.kept}
    assert reasons["inner.query"] == "makes queries, keys or values: only whole heads can go"


def test_heads_that_are_fixed_in_the_code_are_kept() -> None:
    class Fixed(SideBySide):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
            result: Tensor = self.out(attention(q, k, v))
            return result

    prunable = analyse(model_of(Around(Fixed()), example()), ("heads",), ())
    assert prunable.groups == ()
    reasons = {kept.layer: kept.reason for kept in prunable.kept}
    assert reasons["inner.qkv"].startswith("attention: the network does not run with fewer")


def hugging_face(kind: str) -> nn.Module:
    import transformers as hf

    common = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    match kind:
        case "bert":
            return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=30, max_position_embeddings=16, **common))
        case "gpt2":
            sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
            return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=30, use_cache=False, **sizes))
        case "vit":
            return hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=4, **common))
        case _:
            config = hf.LlamaConfig(vocab_size=30, num_key_value_heads=2, use_cache=False, **common)
            return hf.LlamaForCausalLM(config)


class FirstOutput(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.edgeopt_model = net

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.edgeopt_model(x)[0]
        return result


@pytest.mark.parametrize(("kind", "units"), [("bert", 4), ("gpt2", 4), ("vit", 4), ("llama", 2)])
def test_hugging_face_transformers_lose_heads_neurons_and_hidden_width(kind: str, units: int) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    x = torch.randn(1, 3, 16, 16) if kind == "vit" else torch.arange(7)[None] + 3
    net = FirstOutput(hugging_face(kind))
    model = model_of(net, x)
    prunable = analyse(model, ("channels", "heads", "blocks"), ())
    kinds = [group.kind for group in prunable.groups]
    assert kinds.count("heads") == 2
    assert kinds.count("blocks") == 2
    assert [group.units for group in prunable.groups if group.kind == "heads"] == [units] * 2
    widest = max(prunable.groups, key=lambda group: len(group.slices))
    assert widest.units == 24
    plan = {group.name: tuple(range(group.units // 2)) for group in prunable.groups if group.kind != "blocks"}
    small = remove_units(model, prunable, plan).module
    assert small is not None
    with torch.no_grad():
        assert small(x).shape == net(x).shape
    assert sum(p.numel() for p in small.parameters()) < 0.55 * sum(p.numel() for p in net.parameters())
