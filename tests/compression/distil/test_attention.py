"""Attention maps, whoever computes them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from edgeopt.compression.distil.attention import AttentionMap, matched_maps, watched_attention
from edgeopt.errors import UsageError

BATCH, TOKENS, WIDTH, HEADS = 2, 5, 8, 4


class ByHand(nn.Module):
    """Scores, softmax, dropout and product as tutorials write them; `fold` has heads and samples in one axis."""

    def __init__(self, *, fold: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fold = fold
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)
        mixed = torch.matmul(self.dropout(nn.functional.softmax(scores, dim=-1)), v)
        if self.fold:
            mixed = mixed.unflatten(0, (len(x), HEADS))
        return mixed.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (HEADS, -1)).transpose(1, 2)
        return heads.flatten(0, 1) if self.fold else heads


class Fused(ByHand):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, **self.options)
        return mixed.transpose(1, 2).flatten(2)


class Grouped(Fused):
    """Two heads of keys and values for four of queries."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], enable_gqa=True)


class Stock(nn.Module):
    def __init__(self, *, need_weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dropout=0.5)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x, x, x, need_weights=self.need_weights)[0]
        return result


def maps_of(network: nn.Module, x: Tensor) -> tuple[list[AttentionMap], Tensor]:
    with watched_attention(network, len(x)) as maps:
        output = network(x)
    return maps, output


@pytest.mark.parametrize(
    "make",
    [
        ByHand, lambda: ByHand(fold=True), Fused, lambda: Fused(is_causal=True), Grouped,
        lambda: Stock(need_weights=True), lambda: Stock(need_weights=False),
        lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_maps_are_seen_and_the_network_computes_the_same(make: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    network = make().train(training)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    torch.manual_seed(1)
    plain = network(x)
    torch.manual_seed(1)
    maps, output = maps_of(network, x)
    assert torch.allclose(plain, output, atol=1e-6)
    assert [found.shares.shape for found in maps] == [(BATCH, HEADS, TOKENS, TOKENS)]
    assert torch.allclose(maps[0].shares.sum(-1), torch.ones(BATCH, HEADS, TOKENS), atol=1e-5)
    if training:
        maps[0].shares.square().sum().backward()
        assert any(parameter.grad is not None for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_all_spellings_give_one_map() -> None:
    torch.manual_seed(0)
    by_hand = ByHand().eval()
    x = torch.randn(BATCH, TOKENS, WIDTH)
    wanted = maps_of(by_hand, x)[0][0].shares
    for other in (ByHand(fold=True), Fused()):
        other.load_state_dict(by_hand.state_dict())
        assert torch.allclose(maps_of(other.eval(), x)[0][0].shares, wanted, atol=1e-6)
    masked = Fused(is_causal=True)
    masked.load_state_dict(by_hand.state_dict())
    assert not maps_of(masked, x)[0][0].shares.triu(1).any()


def test_a_softmax_that_is_an_output_is_no_map() -> None:
    network = nn.Sequential(Fused(), nn.Linear(WIDTH, 7), nn.Softmax(-1)).eval()
    maps, _ = maps_of(network, torch.randn(BATCH, TOKENS, WIDTH))
    assert [found.kind for found in maps] == ["*"]


def test_copies_of_a_network_are_watched_alone() -> None:
    network = ByHand().eval()
    x = torch.randn(BATCH, TOKENS, WIDTH)
    with watched_attention(network, BATCH) as maps:
        copy.deepcopy(network)
        network(x)
    assert len(maps) == 1


def a_map(kind: str, tokens: int = 3, heads: int = 2) -> AttentionMap:
    return AttentionMap(kind, torch.zeros(1, heads, tokens, tokens))


def test_layers_are_matched_evenly() -> None:
    six, two = [a_map("layer.*.attention") for _ in range(6)], [a_map("block.*", heads=4) for _ in range(2)]
    pairs = matched_maps(two, six)
    assert [(pair.student, pair.teacher) for pair in pairs] == [(0, 2), (1, 5)]
    assert all(pair.averaged for pair in pairs)
    assert [pair.teacher for pair in matched_maps(six, six)] == list(range(6))


def test_self_attention_learns_from_self_attention() -> None:
    def decoder(layers: int) -> list[AttentionMap]:
        return [a_map(f"decoder.*.{kind}") for _ in range(layers) for kind in ("self", "cross")]

    pairs = matched_maps(decoder(2), decoder(3))
    assert [(pair.student, pair.teacher) for pair in pairs] == [(0, 2), (1, 3), (2, 4), (3, 5)]


def test_what_cant_be_matched_is_told() -> None:
    with pytest.raises(UsageError, match="the student computes no attention maps"):
        matched_maps([], [a_map("a")])
    with pytest.raises(UsageError, match=r"map 1 of the student has shape \(1, 2, 3, 3\), map 1 of the teacher"):
        matched_maps([a_map("a")], [a_map("a", tokens=4)])
