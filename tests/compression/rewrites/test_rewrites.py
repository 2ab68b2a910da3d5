"""Rewrites: the same function in another form, whatever the shapes; what has no such form stays as it is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeopt.compression.base import forward, state_digest
from edgeopt.compression.graph import layer_of, name_of
from edgeopt.compression.rewrites import REWRITES, load_rewrite
from edgeopt.compression.rewrites import apply as apply_module
from edgeopt.compression.rewrites.apply import apply_rewrites, suggest
from edgeopt.compression.rewrites.base import ALL, EXACT_DB, Form
from edgeopt.compression.rewrites.proof import kept_db, variations
from edgeopt.compression.rewrites.retrace import exported
from edgeopt.types import Dim, DType, Model, NpuKind, TensorSpec

IMAGE, TOKENS, SOUND = (2, 8, 6, 5), (2, 5, 8), (2, 8, 20)


class Code(nn.Module):
    """A network whose forward is a function of its layer, if it has one, and its input."""

    def __init__(self, function: Callable[..., object], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer or nn.Identity()
        self._function = function

    def forward(self, x: Tensor) -> object:
        return self._function(self.layer, x)


def model_of(module: nn.Module, shape: tuple[int, ...], dtype: DType = "float32") -> Model:
    random = np.random.default_rng(0)
    values = random.standard_normal(shape) if dtype == "float32" else random.integers(0, 9, shape)
    spec, example = TensorSpec("x", shape, dtype), {"x": values.astype(dtype)}
    return Model("net", module.eval(), None, (spec,), (), example, None, (), (), "")


def operators(model: Model) -> list[str]:
    return [name_of(node).removeprefix("aten.") for node in exported(model).graph.nodes if name_of(node)]


def code(function: Callable[[Tensor], object]) -> nn.Module:
    return Code(lambda layer, x: function(layer(x)), nn.Identity())


def torch_layer(layer: nn.Module, what: Callable[[object], object] = lambda result: result) -> nn.Module:
    return Code(lambda inner, x: what(inner(x)), layer)


def first(result: object) -> object:
    assert isinstance(result, tuple)
    return result[0]


def last_cell(result: object) -> object:
    assert isinstance(result, tuple)
    return result[1][1]


@pytest.mark.parametrize(
    ("name", "module", "shape", "gone"),
    [
        ("gelu-tanh", nn.Sequential(nn.Conv2d(8, 4, 1), nn.GELU()), IMAGE, "gelu"),
        ("gelu-tanh", code(functional.gelu), TOKENS, "gelu"),
        ("gelu-tanh", nn.GELU(approximate="tanh"), TOKENS, "gelu"),
        ("leaky-relu", nn.LeakyReLU(0.2), IMAGE, "leaky_relu"),
        ("leaky-relu", nn.Sequential(nn.Conv2d(8, 4, 1), nn.LeakyReLU(inplace=True)), IMAGE, "leaky_relu"),
        ("absolute", code(torch.abs), IMAGE, "abs"),
        ("clamp", code(lambda x: x.clamp(-0.3, 0.7)), IMAGE, "clamp"),
        ("clamp", code(lambda x: x.clamp(max=0.5)), IMAGE, "clamp"),
        ("clamp", nn.Hardtanh(-2.0, 0.5), IMAGE, "hardtanh"),
        ("adaptive-pool", nn.AdaptiveAvgPool2d((4, 3)), IMAGE, "adaptive_avg_pool2d"),
        ("adaptive-pool", nn.AdaptiveAvgPool2d((None, 3)), IMAGE, "adaptive_avg_pool2d"),
        ("adaptive-pool", nn.AdaptiveAvgPool2d(7), IMAGE, "adaptive_avg_pool2d"),
        ("adaptive-pool", nn.AdaptiveAvgPool1d(6), SOUND, "adaptive_avg_pool1d"),
        ("channel-mean", code(lambda x: x - x.mean(1, keepdim=True)), IMAGE, "mean"),
        ("channel-mean", code(lambda x: x.mean(-1)), TOKENS, "mean"),
        ("align-corners", nn.UpsamplingBilinear2d(scale_factor=2), IMAGE, "upsample_bilinear2d"),
        ("align-corners", nn.UpsamplingBilinear2d(size=(1, 9)), IMAGE, "upsample_bilinear2d"),
        ("align-corners", nn.UpsamplingBilinear2d(size=(4, 3)), IMAGE, "upsample_bilinear2d"),
        ("nearest-factor", nn.Upsample(scale_factor=3), IMAGE, "upsample_nearest2d"),
        ("nearest-factor", nn.Upsample(size=(6, 15)), IMAGE, "upsample_nearest2d"),
        ("mirror-pad", nn.ReflectionPad2d((1, 2, 3, 0)), IMAGE, "pad"),
        ("mirror-pad", nn.ReplicationPad2d((2, 1, 0, 3)), IMAGE, "pad"),
        ("mirror-pad", nn.ReflectionPad1d(3), SOUND, "pad"),
        ("mirror-pad", nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), IMAGE, "pad"),
        ("conv1d-as-2d", nn.Conv1d(8, 6, 4, 2, 3, 2, groups=2), SOUND, "conv1d"),
        ("conv1d-as-2d", nn.Conv1d(8, 6, 4, padding="same", dilation=3, bias=False), SOUND, "conv1d"),
        ("conv1d-as-2d", nn.Sequential(nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6), nn.ReLU()), SOUND, "batch_norm"),
        ("linear-as-conv", nn.Linear(8, 3), TOKENS, "linear"),
        ("linear-as-conv", nn.Linear(5, 3, bias=False), IMAGE, "linear"),
        ("group-norm", nn.GroupNorm(4, 8), IMAGE, "group_norm"),
        ("group-norm", nn.GroupNorm(1, 8, affine=False), IMAGE, "group_norm"),
        ("unroll-recurrent", torch_layer(nn.GRU(8, 4, batch_first=True), first), TOKENS, "gru"),
        ("unroll-recurrent", torch_layer(nn.GRU(8, 4, 2, bias=False, bidirectional=True), first), TOKENS, "gru"),
        ("unroll-recurrent", torch_layer(nn.LSTM(8, 4, 2, bidirectional=True), last_cell), TOKENS, "lstm"),
        ("unroll-recurrent", torch_layer(nn.LSTM(8, 4, batch_first=True, bias=False), first), TOKENS, "lstm"),
        (
            "unroll-recurrent",
            Code(lambda gru, x: gru(x, x[:1, :, :4].contiguous() + 0.5)[0], nn.GRU(8, 4)),
            TOKENS,
            "gru",
        ),
    ],
)
def test_form_keeps_the_function(name: str, module: nn.Module, shape: tuple[int, ...], gone: str) -> None:
    torch.manual_seed(0)
    model = model_of(module, shape)
    before = state_digest(module)
    result, (applied,) = apply_rewrites(model, [name], ALL)
    assert applied.refused is None
    assert applied.sqnr_db is not None
    assert applied.sqnr_db >= load_rewrite(name).min_sqnr_db
    assert gone not in operators(result)
    assert result.history[-1].step == f"rewrite {name}"
    assert state_digest(module) == before
    # Done once, there is nothing left to do.
    assert apply_rewrites(result, [name], ALL)[1] == ()


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra", "dilation", "groups"),
    [
        (3, 2, 1, 1, 1, 1),
        ((3, 2), (2, 3), (1, 0), (1, 2), (2, 1), 2),
        (2, 2, 0, 0, 1, 4),
        (3, 1, 2, 0, 2, 1),
        (1, 2, 0, 1, 2, 8),
    ],
)
def test_transposed_convolution_needs_a_plain_kernel_only(
    kernel: int, stride: int, padding: int, extra: int, dilation: int, groups: int
) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(8, 8, kernel, stride, padding, extra, groups, dilation=dilation)
    result, (applied,) = apply_rewrites(model_of(layer, IMAGE), ["plain-transposed-conv"], ALL)
    assert applied.refused is None
    (node,) = [n for n in exported(result).graph.nodes if name_of(n) == "aten.conv_transpose2d"]
    assert [argument for argument in node.args[5:] if argument not in ([0, 0], [1, 1], 1)] == []


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.LeakyReLU(1.5), IMAGE),  # the maximum would be another function
        (nn.LeakyReLU(-0.1), IMAGE),
        (nn.ReLU6(), IMAGE),
        (nn.Hardtanh(-1.0, 1.0), IMAGE),
        (nn.AdaptiveAvgPool2d(1), IMAGE),
        (nn.AdaptiveAvgPool2d((3, 5)), IMAGE),  # divides
        (nn.Upsample(scale_factor=4), IMAGE),
        (nn.Upsample(size=(7, 9)), IMAGE),
        (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
        (nn.ZeroPad2d(2), IMAGE),
        (nn.ConvTranspose2d(8, 4, 2, 2), IMAGE),
        (nn.GroupNorm(2, 8), SOUND),
        (torch_layer(nn.LSTM(8, 4, proj_size=2), first), TOKENS),
        (torch_layer(nn.GRU(8, 4), first), (200, 1, 8)),  # too long to unroll
        (nn.Linear(8, 4), (3, 8)),
        (code(lambda x: x.mean((2, 3))), IMAGE),
    ],
)
def test_nothing_to_suggest(module: nn.Module, shape: tuple[int, ...]) -> None:
    model = model_of(module, shape)
    assert suggest(model, get_args(NpuKind)) == ()
    assert apply_rewrites(model, REWRITES, ALL) == (model, ())


def test_integers_are_left_alone() -> None:
    assert suggest(model_of(code(lambda x: x.abs().clamp(1, 3)), (4,), "int64"), ALL) == ()


def test_overwriting_operator_with_other_readers_stays() -> None:
    def forward_(x: Tensor) -> Tensor:
        y = x + 1
        functional.leaky_relu(y[0], inplace=True)  # what is written to the view shows in y
        return y * 2

    model = model_of(code(forward_), IMAGE)
    assert apply_rewrites(model, ["leaky-relu"], ALL) == (model, ())


def test_suggestions_name_layers_and_those_they_help() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.GELU())
    found = suggest(model_of(net, TOKENS), ["openvino", "edge-tpu"])
    assert [(one.name, one.layers, one.helps) for one in found] == [
        ("gelu-tanh", ("0.1", "1"), ("edge-tpu",)),
        ("linear-as-conv", ("0.0",), ("edge-tpu",)),
    ]
    assert suggest(model_of(net, TOKENS), ["openvino"]) == ()


def test_operators_keep_their_layers_and_weights_their_names() -> None:
    net = nn.Sequential(nn.Conv1d(8, 6, 3), nn.GELU(), nn.Conv1d(6, 6, 1))
    result, _ = apply_rewrites(model_of(net, SOUND), ["conv1d-as-2d", "gelu-tanh"], ALL)
    assert result.module is not None
    found = [layer_of(node) for node in exported(result).graph.nodes if name_of(node)]
    assert list(dict.fromkeys(found)) == ["0", "1", "2"]
    assert sorted(name for name, _ in result.module.named_parameters()) == [
        "0.bias",
        "0.weight_1",
        "2.bias",
        "2.weight_1",
    ]

    # ... and when a module around it is traced, as exporters do.
    outer = torch.export.export(nn.Sequential(result.module), (torch.zeros(SOUND),), strict=False)
    inner = [layer_of(node) for node in outer.graph.nodes if name_of(node)]
    assert list(dict.fromkeys(inner)) == ["0", "1", "2"]


def test_new_operators_are_not_called_what_they_replace() -> None:
    # XNNPACK's quantizer looks for pooling by this metadata, and gave up on a concatenation that had it.
    result, _ = apply_rewrites(model_of(nn.AdaptiveAvgPool2d(4), IMAGE), ["adaptive-pool"], ALL)
    assert result.module is not None
    again = torch.export.export(result.module, (torch.zeros(IMAGE),), strict=False)
    assert not any("adaptive" in str(node.meta.get("torch_fn")) for node in again.graph.nodes)


def test_rewritten_module_can_be_copied_and_put_into_eval_mode() -> None:
    model = model_of(nn.Sequential(nn.Linear(8, 8), nn.GELU()), TOKENS)
    result, _ = apply_rewrites(model, ["gelu-tanh"], ALL)
    assert result.module is not None
    again = copy.deepcopy(result.module).eval()
    x = torch.tensor(model.example_inputs["x"])
    assert torch.equal(again(x), result.module(x))


def test_dynamic_dimensions_stay_dynamic() -> None:
    model = model_of(nn.Sequential(nn.Linear(8, 8), nn.GELU()), (1, 5, 8))
    free = Model(**{**{f: getattr(model, f) for f in model.__dataclass_fields__},
                    "inputs": (TensorSpec("x", (Dim("batch", 1, 16), 5, 8), "float32"),)})  # fmt: skip
    result, (applied,) = apply_rewrites(free, ["gelu-tanh"], ALL)
    assert applied.refused is None
    for batch in (1, 7):
        (output,) = forward(result, {"x": np.zeros((batch, 5, 8), np.float32)})
        assert output.shape == (batch, 5, 8)


@dataclass(frozen=True, slots=True)
class Wrong:
    name: ClassVar[str] = "gelu-tanh"
    summary: ClassVar[str] = "GELU as ReLU"
    helps: ClassVar[frozenset[NpuKind]] = ALL
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: torch.fx.Node) -> Form | None:
        return (lambda x, _: x.relu()) if name_of(node) == "aten.gelu" else None


@dataclass(frozen=True, slots=True)
class Failing(Wrong):
    def form(self, node: torch.fx.Node) -> Form | None:
        return (lambda x, _: x.reshape(7, 7, 7)) if name_of(node) == "aten.gelu" else None


@pytest.mark.parametrize(("rewrite", "reason"), [(Wrong(), "80 dB count as equivalent"), (Failing(), "reshape|shape")])
def test_what_fails_its_proof_is_refused(rewrite: Wrong, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply_module, "load_rewrite", lambda _: rewrite)
    model = model_of(nn.GELU(), TOKENS)
    result, (applied,) = apply_rewrites(model, ["gelu-tanh"], ALL)
    assert result is model
    assert re.search(reason, str(applied.refused))


def test_proof_looks_at_shapes_and_non_finite_values() -> None:
    model, other = model_of(code(lambda x: x), TOKENS), model_of(code(lambda x: x[0]), TOKENS)
    assert kept_db(model, other, [model.example_inputs]) == -np.inf
    assert kept_db(model, model_of(code(lambda x: x / 0), TOKENS), [model.example_inputs]) == -np.inf
    assert kept_db(model, model, variations(model, 0)) == np.inf
    noisy = model_of(code(lambda x: x * 1.01), TOKENS)
    assert kept_db(model, noisy, variations(model, 0)) == pytest.approx(40.0, abs=0.1)


def test_variations_keep_integers_possible() -> None:
    model = model_of(nn.Embedding(9, 4), (2, 6), "int64")
    for arrays in variations(model, 0):
        assert arrays["x"].dtype == np.int64
        assert sorted(arrays["x"].ravel()) == sorted(model.example_inputs["x"].ravel())


def test_every_name_loads_what_it_says() -> None:
    for name in REWRITES:
        rewrite = load_rewrite(name)
        assert rewrite.name == name
        assert rewrite.helps <= ALL
