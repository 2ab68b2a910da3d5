"""Heads of torch's own attention: found, scored by what they cost, removed, and gone for good."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from edgeopt.compression.cost import layer_shapes, macs_of, planned_shapes
from edgeopt.compression.distil.attention import watched_attention
from edgeopt.compression.pruning.analysis import analyse
from edgeopt.compression.pruning.groups import Prunable
from edgeopt.compression.pruning.planned_cost import planned_macs, planned_parameters
from edgeopt.compression.pruning.removal import remove_units, silence_in_place
from edgeopt.compression.sparsity.products import products_of
from edgeopt.errors import UsageError
from edgeopt.sources.structure import PrunedMultiheadAttention, load_model, save_model
from edgeopt.training.quantized_module import QuantizedModule
from edgeopt.types import LayerRules, Model, Scheme, TensorSpec

WIDTH, HEADS, STEPS = 24, 4, 7


def model_of(net: nn.Module, x: Tensor) -> Model:
    spec = TensorSpec("x", tuple(x.shape), "float32")
    return Model("m", net.eval(), None, (spec,), (), {"x": x.numpy()}, None, (), (), "")


class Encoder(nn.Module):
    """Torch's encoder between linear layers."""

    def __init__(
        self, *, batch_first: bool = True, norm_first: bool = False, causal: bool = False, padded: bool = False
    ) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=batch_first, norm_first=norm_first)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=padded)
        self.batch_first, self.causal, self.padded = batch_first, causal, padded

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[1] if self.batch_first else x.shape[0]
        mask = nn.Transformer.generate_square_subsequent_mask(steps) if self.causal else None
        padding = (torch.arange(steps) >= steps - 2).expand(len(x), -1) if self.padded else None
        y = self.encoder(self.first(x), mask=mask, src_key_padding_mask=padding, is_causal=self.causal)
        result: Tensor = self.last(y)
        return result[:, :-2] if self.padded else result


class Decoder(nn.Module):
    """Attention to itself and to another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(3)
        result: Tensor = self.last(self.decoder(x[:, :3], self.memory(x), tgt_mask=mask))
        return result


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.transformer(x, x[:, :3])
        return result


class Bare(nn.Module):
    """One attention, of keys and values of other widths where `kdim` and `vdim` say so."""

    def __init__(self, **arguments: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **arguments)
        self.key, self.value = nn.Linear(WIDTH, self.attention.kdim), nn.Linear(WIDTH, self.attention.vdim)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, self.key(x), self.value(x), need_weights=False)[0]
        return result


def example() -> Tensor:
    return torch.randn(2, STEPS, WIDTH, generator=torch.Generator().manual_seed(0))


def heads_of(model: Model) -> tuple[Prunable, dict[str, tuple[int, ...]]]:
    """What was found, and a plan that takes two heads of each attention."""
    prunable = analyse(model, ("heads",), ())
    return prunable, {group.name: (0, 2) for group in prunable.groups}


ABOUT_NESTED = "ignore:The PyTorch API of nested tensors:UserWarning"


def sqnr(signal: Tensor, other: Tensor) -> float:
    noise = (signal - other).double().square().mean()
    return float(10 * torch.log10(signal.double().square().mean() / noise.clamp(min=1e-30)))


NETWORKS: list[tuple[Callable[[], nn.Module], int]] = [
    (Encoder, 2),
    (lambda: Encoder(batch_first=False), 2),
    (lambda: Encoder(norm_first=True), 2),
    (lambda: Encoder(causal=True), 2),
    (lambda: Encoder(padded=True), 2),
    (Decoder, 2),
    (Both, 3),
    (lambda: Bare(batch_first=True, bias=False), 1),
    (lambda: Bare(kdim=10, vdim=14), 1),
]


@pytest.mark.filterwarnings(ABOUT_NESTED)
@pytest.mark.parametrize(("build", "attentions"), NETWORKS)
def test_heads_go_and_the_others_compute_the_same(
    build: Callable[[], nn.Module], attentions: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = build().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = model_of(net, example())
    prunable, plan = heads_of(model)
    assert [(group.kind, group.units) for group in prunable.groups] == [("heads", HEADS)] * attentions
    smaller = remove_units(model, prunable, plan)
    silenced = remove_units(model, prunable, {}).module
    assert smaller.module is not None
    assert silenced is not None
    silence_in_place(silenced, [(group, plan[group.name]) for group in prunable.groups])
    x = example() + 1
    with torch.no_grad():
        assert sqnr(silenced(x), smaller.module(x)) > 100
        assert sqnr(net(x), smaller.module(x)) < 40
    assert not any(isinstance(part, nn.MultiheadAttention) for part in smaller.module.modules())
    assert macs_of(smaller) < macs_of(model)
    assert macs_of(smaller) == planned_macs(model, prunable)(plan)
    left = sum(parameter.numel() for parameter in smaller.module.parameters())
    assert left == planned_parameters(model, prunable)(plan) < sum(p.numel() for p in net.parameters())
    save_model(smaller.module, build(), tmp_path / "w.safetensors")
    back = load_model(build(), tmp_path / "w.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(back(x), smaller.module(x))
        assert torch.equal(copy.deepcopy(smaller.module)(x), smaller.module(x))


def test_only_attentions_that_lose_heads_are_replaced() -> None:
    model = model_of(Encoder(), example())
    prunable, _ = heads_of(model)
    small = remove_units(model, prunable, {"encoder.layers.0.self_attn": (1,)}).module
    assert small is not None
    replaced = small.get_submodule("encoder.layers.0.self_attn")
    assert isinstance(replaced, PrunedMultiheadAttention)
    assert (replaced.num_heads, replaced.head_dim, replaced.batch_first) == (HEADS - 1, WIDTH // HEADS, True)
    assert isinstance(small.get_submodule("encoder.layers.1.self_attn"), nn.MultiheadAttention)
    assert model.module is not None
    assert not any(isinstance(part, PrunedMultiheadAttention) for part in model.module.modules())


def test_gradients_reach_every_weight_and_training_has_dropout() -> None:
    model = model_of(Encoder(causal=True), example())
    small = remove_units(model, *heads_of(model)).module
    assert small is not None
    small(example()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in small.parameters())
    small.train()
    assert not torch.equal(small(example()), small(example()))


def test_a_second_round_takes_more_heads_and_the_width_of_the_stream() -> None:
    model = model_of(Encoder(), example())
    smaller = remove_units(model, *heads_of(model))
    prunable = analyse(smaller, ("channels", "heads"), ())
    units = {group.name: (group.kind, group.units) for group in prunable.groups}
    assert units["encoder.layers.0.self_attn.q_proj"] == ("heads", 2)
    assert units["first"] == ("channels", WIDTH)
    smallest = remove_units(smaller, prunable, {"encoder.layers.0.self_attn.q_proj": (0,), "first": (3, 4, 5)})
    assert smallest.module is not None
    assert macs_of(smallest) < macs_of(smaller)
    attention = smallest.module.get_submodule("encoder.layers.0.self_attn")
    assert isinstance(attention, PrunedMultiheadAttention)
    assert (attention.num_heads, attention.query_width, attention.output_width) == (1, WIDTH - 3, WIDTH - 3)


def test_a_pruned_network_that_was_pruned_again_comes_back(tmp_path: Path) -> None:
    model = model_of(Encoder(), example())
    smaller = remove_units(model, *heads_of(model))
    prunable = analyse(smaller, ("channels",), ())
    module = remove_units(smaller, prunable, {group.name: (0, 1) for group in prunable.groups}).module
    assert module is not None
    save_model(module, Encoder(), tmp_path / "w.safetensors")
    back = load_model(Encoder(), tmp_path / "w.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(back(example()), module(example()))


def test_shapes_of_layers_follow_a_plan() -> None:
    model = model_of(Decoder(), example())
    prunable, plan = heads_of(model)
    shapes = planned_shapes(layer_shapes(model), prunable, plan)
    assert shapes["decoder.layers.0.self_attn"].out_channels == 3 * WIDTH // 2
    assert shapes["decoder.layers.0.multihead_attn"].out_channels == WIDTH // 2
    assert shapes["decoder.layers.0.multihead_attn.out_proj"].in_channels == WIDTH // 2


@pytest.mark.filterwarnings(ABOUT_NESTED)
def test_encoder_with_padding_and_nested_tensors_still_runs() -> None:
    """Torch's encoder makes nested tensors for its fused layers, which only torch's attention takes."""
    model = model_of(Encoder(padded=True), example())
    small = remove_units(model, *heads_of(model)).module
    assert isinstance(small, Encoder)
    assert model.module is not None
    assert model.module.encoder.use_nested_tensor is True
    assert small.encoder.use_nested_tensor is False
    with torch.no_grad():
        assert small(example()).shape == (2, STEPS - 2, 3)


def test_an_attention_that_stands_twice_is_replaced_twice(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
            self.other = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
            self.other.self_attn = self.one.self_attn

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.other(self.one(x))
            return result

    model = model_of(Twice(), example())
    prunable, plan = heads_of(model)
    assert list(plan) == ["one.self_attn"]
    small = remove_units(model, prunable, plan).module
    assert isinstance(small, Twice)
    assert small.one.self_attn is small.other.self_attn
    save_model(small, Twice(), tmp_path / "w.safetensors")
    back = load_model(Twice(), tmp_path / "w.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(back(example()), small(example()))


def test_other_steps_meet_ordinary_layers() -> None:
    """Quantization-aware training, sparsity, factorization and distillation see the projections and the attention."""
    model = model_of(Encoder(causal=True), example())
    small = remove_units(model, *heads_of(model))
    assert small.module is not None
    names = [f"encoder.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    quantized = QuantizedModule(small.module, [example()], "litert", Scheme("w8a8", "dynamic"), LayerRules())
    assert set(names) <= {planned.layer for planned in quantized.plan.weights.values()}
    assert set(names) <= {product.layer for product in products_of(small)}
    with torch.no_grad(), watched_attention(small.module, 2) as maps:
        small.module(example())
    assert [tuple(found.shares.shape) for found in maps] == [(2, 2, STEPS, STEPS)] * 2


# --- what stays ------------------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """Reads the packed weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        own = self.attention
        y = x.transpose(0, 1)
        result: Tensor = F.multi_head_attention_forward(
            y, y, y, WIDTH, HEADS, own.in_proj_weight, own.in_proj_bias, None, None, False, 0.0, own.out_proj.weight,
            own.out_proj.bias, training=False,
        )[0]  # fmt: skip
        return result


class PerHeadMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.register_buffer("bias", torch.randn(2 * HEADS, STEPS, STEPS))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, attn_mask=self.bias, need_weights=False)[0]
        return result


class ShowsWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output, weights = self.attention(x, x, x)
        return output, weights


class TwoThatShare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))
        self.other.in_proj_weight = self.one.in_proj_weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x, x, x)[0]
        result: Tensor = self.other(y, y, y)[0]
        return result


class Own(nn.MultiheadAttention):
    """A class that may do anything."""


class WithOwn(Bare):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Own(WIDTH, HEADS)


class Normed(Bare):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.attention.out_proj)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (ByHand, "the network does not run with fewer"),
        (PerHeadMask, "the network does not run with fewer"),
        (ShowsWeights, "more than the layers that read its channels depends on them"),
        (TwoThatShare, "shares its weights"),
        (WithOwn, "changes of its own"),
        (Normed, "changes of its own"),
        (lambda: Bare(add_bias_kv=True), "add_bias_kv"),
        (lambda: Bare(add_zero_attn=True), "add_zero_attn"),
    ],
)
def test_stays_with_a_reason(build: Callable[[], nn.Module], reason: str) -> None:
    prunable = analyse(model_of(build(), example()), ("heads",), ())
    assert prunable.groups == ()
    reasons = [kept.reason for kept in prunable.kept if kept.layer in ("attention", "one")]
    assert len(reasons) == 1
    assert reasons[0].startswith("attention: ")
    assert reason in reasons[0]


def test_numbers_of_what_holds_an_attention_hide_no_other_layers() -> None:
    """`nn.Transformer` has the number of heads, and linear layers that are none of its attentions'."""
    prunable = analyse(model_of(Both(), example()), ("channels", "heads"), ())
    feed_forward = {group.name for group in prunable.groups if group.kind == "channels"}
    assert {"transformer.encoder.layers.0.linear1", "transformer.decoder.layers.0.linear1"} <= feed_forward


def test_a_model_that_is_an_attention_stays_one() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edgeopt_model = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.edgeopt_model(x, x, x, need_weights=False)[0]
            return result

    prunable = analyse(model_of(Adapter(), example()), ("heads",), ())
    assert prunable.groups == ()
    assert "attention: it is the model itself, whose class has to stay" in {kept.reason for kept in prunable.kept}


def test_protected_attention_keeps_its_heads() -> None:
    prunable = analyse(model_of(Encoder(), example()), ("heads",), ("encoder.layers.0.*",))
    assert [group.name for group in prunable.groups] == ["encoder.layers.1.self_attn"]


def test_a_file_for_another_number_of_heads_is_refused(tmp_path: Path) -> None:
    model = model_of(Encoder(), example())
    small = remove_units(model, *heads_of(model)).module
    assert small is not None
    save_model(small, Encoder(), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="another network"):
        load_model(nn.Linear(2, 2), tmp_path / "w.safetensors")
