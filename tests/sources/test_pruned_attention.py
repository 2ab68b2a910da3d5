"""The attention that stands in for torch's once heads are gone: its function, and how it travels."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeopt.errors import UsageError
from edgeopt.json_data import dumps
from edgeopt.sources.structure import METADATA_KEY, PrunedMultiheadAttention, describe, load_model, parse, save_model

WIDTH, HEADS, SIZE = 12, 3, 4
ARGUMENTS: dict[str, object] = {
    "query_width": WIDTH, "key_width": WIDTH, "value_width": WIDTH, "output_width": WIDTH, "num_heads": 2,
    "head_dim": SIZE, "has_bias": True, "dropout": 0.1, "batch_first": True,
}  # fmt: skip


def pair(
    *, bias: bool = True, batch_first: bool = True, key_width: int = WIDTH, value_width: int = WIDTH
) -> tuple[nn.MultiheadAttention, PrunedMultiheadAttention]:
    """Torch's attention and ours with the same weights."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(
        WIDTH, HEADS, bias=bias, kdim=key_width, vdim=value_width, batch_first=batch_first
    ).eval()
    ours = PrunedMultiheadAttention(WIDTH, key_width, value_width, WIDTH, HEADS, SIZE, bias, 0.0, batch_first).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    packed = theirs.in_proj_weight
    weights = (
        packed.chunk(3) if packed is not None else (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)
    )
    with torch.no_grad():
        for index, layer in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
            layer.weight.copy_(weights[index])
            if bias:
                layer.bias.copy_(theirs.in_proj_bias.chunk(3)[index])
        ours.out_proj.load_state_dict(theirs.out_proj.state_dict())
    return theirs, ours


def same(theirs: nn.Module, ours: nn.Module, *arguments: Tensor, **keywords: object) -> None:
    for fused in (True, False):
        torch.backends.mha.set_fastpath_enabled(fused)
        try:
            with torch.no_grad():
                wanted, weights = theirs(*arguments, **keywords)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        with torch.no_grad():
            found, own = ours(*arguments, **keywords)
        torch.testing.assert_close(found, wanted)
        assert (own is None) == (weights is None)
        if own is not None:
            torch.testing.assert_close(own, weights)


PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PER_HEAD = torch.linspace(-2, 2, 2 * HEADS * 5 * 5).reshape(2 * HEADS, 5, 5)


@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"key_padding_mask": PADDING},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL < 0},
        {"attn_mask": CAUSAL < 0, "is_causal": True},
        {"attn_mask": CAUSAL < 0, "key_padding_mask": PADDING},
        {"attn_mask": CAUSAL < 0, "key_padding_mask": PADDING, "is_causal": True},
        {"attn_mask": PER_HEAD},
    ],
)
def test_computes_what_torch_does(masks: dict[str, object], weights: dict[str, object]) -> None:
    theirs, ours = pair()
    x = torch.randn(2, 5, WIDTH)
    same(theirs, ours, x, x, x, **masks, **weights)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_another_sequence_of_another_width(batch_first: bool, bias: bool) -> None:
    theirs, ours = pair(bias=bias, batch_first=batch_first, key_width=7, value_width=9)
    query, key, value = torch.randn(2, 5, WIDTH), torch.randn(2, 6, 7), torch.randn(2, 6, 9)
    if not batch_first:
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    same(theirs, ours, query, key, value)
    same(theirs, ours, query, key, value, need_weights=False, key_padding_mask=torch.eye(2, 6) > 0)


def test_one_sequence_without_a_batch() -> None:
    theirs, ours = pair()
    x = torch.randn(5, WIDTH)
    for masks in ({}, {"key_padding_mask": PADDING[1]}, {"attn_mask": CAUSAL}, {"attn_mask": PER_HEAD[:HEADS]}):
        same(theirs, ours, x, x, x, **masks)
        same(theirs, ours, x, x, x, need_weights=False, **masks)


def test_is_causal_needs_its_mask() -> None:
    x = torch.randn(2, 5, WIDTH)
    with pytest.raises(ValueError, match="attn_mask"):
        pair()[1](x, x, x, is_causal=True)


def test_dropout_is_for_training_alone() -> None:
    x = torch.randn(1, 5, WIDTH)
    ours = PrunedMultiheadAttention(WIDTH, WIDTH, WIDTH, WIDTH, 2, SIZE, True, 0.5, True)
    for need_weights in (True, False):
        one, other = (ours.train()(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(one, other)
        one, other = (ours.eval()(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert torch.equal(one, other)


# --- as data ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention: nn.Module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.attention(x, x, x)[0])
        return result


def smaller(change: Callable[[PrunedMultiheadAttention], None]) -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    attention = PrunedMultiheadAttention(WIDTH, WIDTH, WIDTH, WIDTH, 2, SIZE, True, 0.1, True)
    change(attention)
    net.attention = attention
    return net.eval()


def nothing(attention: PrunedMultiheadAttention) -> None:
    del attention


def factorized(attention: PrunedMultiheadAttention) -> None:
    attention.q_proj = nn.Sequential(nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 2 * SIZE))
    attention.out_proj = nn.Sequential(nn.Linear(2 * SIZE, 3, bias=False), nn.Linear(3, WIDTH))


def tied(attention: PrunedMultiheadAttention) -> None:
    attention.k_proj.weight = attention.q_proj.weight


def without_key_bias(attention: PrunedMultiheadAttention) -> None:
    attention.k_proj.bias = None


@pytest.mark.parametrize("change", [nothing, factorized, tied, without_key_bias])
def test_comes_back_bit_for_bit(change: Callable[[PrunedMultiheadAttention], None], tmp_path: Path) -> None:
    net, path = smaller(change), tmp_path / "w.safetensors"
    save_model(net, Net(), path)
    back = load_model(Net(), path).eval()
    assert isinstance(back, Net)
    assert isinstance(back.attention, PrunedMultiheadAttention)
    assert (back.attention.dropout, back.attention.batch_first) == (0.1, True)
    assert list(back.state_dict()) == list(net.state_dict())
    x = torch.randn(2, 5, WIDTH)
    assert torch.equal(back(x), net(x))
    structure = describe(Net(), net)
    assert parse(dumps(structure), "w") == structure
    assert describe(Net(), back) == structure
    assert sum(p.numel() for p in back.parameters()) == sum(p.numel() for p in net.parameters())


def test_one_attention_in_two_places(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.other = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    net = Twice()
    net.one = net.other = PrunedMultiheadAttention(WIDTH, WIDTH, WIDTH, WIDTH, 2, SIZE, True, 0.0, True)
    save_model(net, Twice(), tmp_path / "w.safetensors")
    back = load_model(Twice(), tmp_path / "w.safetensors")
    assert isinstance(back, Twice)
    assert back.one is back.other
    assert isinstance(back.one, PrunedMultiheadAttention)
    assert torch.equal(back.one.q_proj.weight, net.one.q_proj.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 10**9}, "other shape: attention."),
        ({"num_heads": 10**30}, "can't be built"),
        ({"num_heads": 0}, "below 1"),
        ({"num_heads": "2"}, "can't be built"),
        ({"head_dim": -4}, "below 1"),
        ({"dropout": 3.5}, "dropout is a share"),
        ({"dropout": None}, "can't be built"),
        ({"has_bias": False}, "unexpected: attention.k_proj.bias"),
        ({"path": "x"}, "takes query_width"),
    ],
)
def test_hostile_arguments_are_one_line(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    net, path = smaller(nothing), tmp_path / "w.safetensors"
    spec = {"kind": "PrunedMultiheadAttention", "arguments": {**ARGUMENTS, **arguments}, "dtype": "float32"}
    structure = {"replaced": [{"paths": ["attention"], "layers": [spec], "is_sequential": False}]}
    save_file(dict(net.state_dict()), path, {METADATA_KEY: json.dumps(structure)})
    victim = Net().eval()
    before = copy.deepcopy(victim.state_dict())
    with pytest.raises(UsageError) as caught:
        load_model(victim, path)
    assert message in caught.value.line()
    assert type(victim.attention) is nn.MultiheadAttention
    assert all(torch.equal(value, before[name]) for name, value in victim.state_dict().items())
