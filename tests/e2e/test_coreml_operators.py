"""Operators: torch -> coremltools -> our interpreter must give what torch gives, over everything torch models use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from edgeopt.exporter.coreml import CoreMLExporter
from edgeopt.runtimes.coreml_reference import CoreMLReference
from edgeopt.types import Model, TensorSpec

pytest.importorskip("coremltools", reason="needs the extra 'apple'")

pytestmark = pytest.mark.e2e

Function = Callable[[torch.Tensor], object]
X = torch.Generator().manual_seed(7)
IMAGE = torch.randn(1, 4, 9, 10, generator=X)
ROWS = torch.randn(2, 6, 8, generator=X)
WEIGHT = torch.randn(8, 4, 3, 3, generator=X)
TRANSPOSED = torch.randn(4, 6, 3, 3, generator=X)
INDICES = torch.tensor([[0, 3, 1], [5, 2, 2]])


class Several(nn.Module):
    """Each function once on the same input."""

    def __init__(self, functions: list[Function]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for function in self.functions:
            result = function(x)
            found += [result] if isinstance(result, torch.Tensor) else list(result)  # type: ignore[call-overload]
        return found


ELEMENTWISE: list[Function] = [
    torch.abs,
    torch.exp,
    torch.sin,
    torch.cos,
    torch.tanh,
    torch.sigmoid,
    torch.sign,
    torch.floor,
    torch.ceil,
    torch.round,
    torch.square,
    torch.erf,
    torch.atan,
    torch.sinh,
    torch.cosh,
    torch.exp2,
    lambda x: torch.sqrt(x.abs() + 1),
    lambda x: torch.rsqrt(x.abs() + 1),
    lambda x: torch.log(x.abs() + 1),
    lambda x: 1 / (x.abs() + 1),
    lambda x: x**2 + x.abs() ** 1.5,
    lambda x: torch.maximum(x, x.flip(-1)),
    lambda x: torch.minimum(x, -x),
    lambda x: torch.remainder(x, 0.7),
    lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    lambda x: torch.where(x > 0, x, x * 3),
    lambda x: ((x > 0) & (x < 1)) | (x == 0),
    lambda x: (x >= 0.5) ^ (x <= -0.5),
    lambda x: ~(x != 0),
    lambda x: x.clamp(-0.5, 0.5),
    lambda x: x.clamp(min=0.1),
    lambda x: x.to(torch.int32),
    lambda x: x.masked_fill(x > 0, -5.0),
]
ACTIVATIONS: list[Function] = [
    F.relu,
    F.relu6,
    F.elu,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.silu,
    F.hardswish,
    F.hardsigmoid,
    F.hardtanh,
    F.softplus,
    F.softsign,
    F.mish,
    F.leaky_relu,
    F.selu,
    lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3, 0.4])),
    lambda x: F.softmax(x, 1),
    lambda x: F.log_softmax(x, -1),
    lambda x: F.threshold(x, 0.2, 0.0),
    lambda x: F.glu(x, 1),
    lambda x: F.tanhshrink(x),
]
REDUCTIONS: list[Function] = [
    lambda x: x.sum(1),
    lambda x: x.mean((2, 3)),
    lambda x: x.mean((2, 3), keepdim=True),
    lambda x: x.amax(1),
    lambda x: x.amin((1, 2)),
    lambda x: x.argmax(1),
    lambda x: x.argmin(-1, keepdim=True),
    lambda x: x.norm(dim=1),
    lambda x: x.logsumexp(1),
    lambda x: x.var(1),
    lambda x: x.std((2, 3)),
    lambda x: torch.topk(x, 3, dim=-1),
    lambda x: torch.sort(x, -1),
    lambda x: x.cumsum(-1),
    lambda x: x.max(-1),
    lambda x: (x > 0).any(1),
    lambda x: (x > -9).all(-1),
    lambda x: x.argsort(-1),
    lambda x: F.normalize(x, dim=1),
]
MOVEMENT: list[Function] = [
    lambda x: x.reshape(2, -1, 5),
    lambda x: x.flatten(1),
    lambda x: x.permute(0, 2, 3, 1),
    lambda x: x.unsqueeze(0),
    lambda x: x[:, :1].squeeze(1),
    lambda x: torch.cat([x, x * 2], 1),
    lambda x: torch.stack([x, -x], 2),
    lambda x: x.split([1, 3], 1),
    lambda x: x.chunk(2, -1),
    lambda x: x[:, 1:3, ::2, -4:-1],
    lambda x: x[:, :, 2],
    lambda x: x.flip(2, 3),
    lambda x: x.repeat(1, 2, 1, 2),
    lambda x: x[:, :1].expand(1, 4, 9, 10) + 1,
    lambda x: F.pad(x, (1, 2, 3, 0), value=0.5),
    lambda x: F.pad(x, (1, 2, 3, 1), mode="reflect"),
    lambda x: F.pad(x, (1, 2, 3, 1), mode="replicate"),
    lambda x: F.pixel_shuffle(x, 2),
    lambda x: F.pixel_unshuffle(x[:, :, :8], 2),
    lambda x: x.roll(2, -1),
    lambda x: x.narrow(-1, 2, 5),
    lambda x: torch.tril(x),
    lambda x: torch.triu(x, 1),
    lambda x: x.movedim(1, -1),
    lambda x: torch.zeros_like(x) + x,
    lambda x: torch.full_like(x, 3.0) * x,
    lambda x: x.select(1, 2),
    lambda x: x.sum().reshape(1),
    lambda x: torch.zeros_like(x > 0, dtype=torch.float32).masked_fill(x > 0, -2.5),
]
INDEXING: list[Function] = [
    lambda x: x[:, INDICES],
    lambda x: torch.gather(x, 1, INDICES.unsqueeze(-1).expand(2, 3, 8)),
    lambda x: x.index_select(1, INDICES[0]),
    lambda x: x[INDICES[0] % 2, INDICES[1]],
    lambda x: F.embedding(INDICES, x[0]),
    lambda x: F.one_hot(x.argmax(-1), 8).float(),
    lambda x: x.scatter(1, INDICES.unsqueeze(-1).expand(2, 3, 8), 0.5),
    lambda x: torch.einsum("bij,bkj->bik", x, x),
    lambda x: torch.einsum("bij->bji", x),
    lambda x: x @ x.transpose(1, 2),
    lambda x: torch.bmm(x, x.mT),
    lambda x: F.linear(x, x[0]),
    lambda x: F.layer_norm(x, (8,), torch.arange(8) / 4, torch.ones(8)),
    lambda x: F.layer_norm(x, (6, 8)),
    lambda x: F.scaled_dot_product_attention(x, x, x),
    lambda x: torch.arange(6) + x.argmax(-1),
    lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=(torch.ones(6, 6) > 0).tril()),
    lambda x: F.conv1d(x, x[:, :, :3].repeat(2, 1, 1)[:, :6], padding=1),
    lambda x: F.avg_pool1d(x, 3, 2, 1),
    lambda x: F.max_pool1d(x, 2),
    lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"),
]
NETWORKS: list[Function] = [
    lambda x: F.conv2d(x, WEIGHT, padding=1, stride=2),
    lambda x: F.conv2d(x, WEIGHT, WEIGHT[:, 0, 0, 0], dilation=2),
    lambda x: F.conv2d(x, WEIGHT[:, :1], groups=4, padding="same"),
    lambda x: F.conv2d(x, WEIGHT, padding=(0, 2)),
    lambda x: F.conv_transpose2d(x, TRANSPOSED, stride=2, padding=1),
    lambda x: F.conv_transpose2d(x, TRANSPOSED[:, :1], groups=4),
    lambda x: F.conv_transpose2d(x, TRANSPOSED, TRANSPOSED[0, :, 0, 0], 2, 1, 1),
    lambda x: F.max_pool2d(x, 3, 2, 1),
    lambda x: F.conv_transpose2d(x, TRANSPOSED, stride=3, dilation=2),
    lambda x: F.avg_pool2d(x, 3, 2, 1),
    lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    lambda x: F.instance_norm(x),
    lambda x: F.group_norm(x, 2),
    lambda x: F.batch_norm(x, x.mean((0, 2, 3)) * 0 + 0.1, torch.ones(4) * 2),
    lambda x: F.local_response_norm(x, 3),
    lambda x: F.interpolate(x, scale_factor=2.0),
    lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    lambda x: F.interpolate(x, size=(18, 30), mode="bilinear", align_corners=True),
    lambda x: F.interpolate(x, size=(18, 30)),
]


@pytest.mark.parametrize(
    ("functions", "example"),
    [
        pytest.param(ELEMENTWISE, IMAGE, id="elementwise"),
        pytest.param(ACTIVATIONS, IMAGE, id="activations"),
        pytest.param(REDUCTIONS, IMAGE, id="reductions"),
        pytest.param(MOVEMENT, IMAGE, id="movement"),
        pytest.param(INDEXING, ROWS, id="indexing"),
        pytest.param(NETWORKS, IMAGE, id="networks"),
        pytest.param([F.celu, F.logsigmoid], IMAGE, id="taken-apart-by-torch"),
    ],
)
def test_operators(functions: list[Function], example: torch.Tensor, tmp_path: Path) -> None:
    module = Several(functions).eval()
    check(module, example, tmp_path)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(8, 5, 2, bidirectional=True, batch_first=True),
        nn.GRU(8, 5, batch_first=True),
        nn.RNN(8, 5, batch_first=True),
    ],
    ids=["lstm", "gru", "rnn"],
)
def test_recurrent_layers(layer: nn.Module, tmp_path: Path) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)[0]

    check(Last().eval(), ROWS[:1], tmp_path)


def check(module: nn.Module, example: torch.Tensor, directory: Path) -> None:
    with torch.no_grad():
        wanted = module(example)
    wanted = [wanted] if isinstance(wanted, torch.Tensor) else wanted
    outputs = tuple(
        TensorSpec(f"out{i}", tuple(t.shape), str(t.dtype).removeprefix("torch."))  # type: ignore[arg-type]
        for i, t in enumerate(wanted)
    )
    inputs = (TensorSpec("x", tuple(example.shape), "float32"),)
    model = Model("net", module, None, inputs, outputs, {"x": example.numpy()}, None, (), (), "0" * 64)
    artifact = CoreMLExporter().export_float(model, directory)
    with CoreMLReference().open(artifact.path, artifact.signature) as session:
        found = session.run({"x": example.numpy()})
    for name, tensor in zip(found, wanted, strict=True):
        np.testing.assert_allclose(found[name], tensor.numpy(), rtol=2e-4, atol=2e-5, err_msg=name)
