from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edgeopt.compression.pruning.check import Proof
from edgeopt.compression.pruning.groups import PruningGroup, Slice
from edgeopt.types import Model, TensorSpec


def model_of(net: nn.Module, *shape: int) -> Model:
    # Zeros are a poor example on purpose: the proof must not rely on it.
    x = np.zeros(shape, dtype=np.float32)
    return Model("m", net.eval(), None, (TensorSpec("x", shape, "float32"),), (), {"x": x}, None, (), (), "")


def group(name: str, reader: str, units: int, mapping: list[int] | None = None) -> PruningGroup:
    own = np.arange(units)[:, None]
    read = own if mapping is None else np.array(mapping)[:, None]
    return PruningGroup(name, "channels", units, 1, (Slice(name, "out", own), Slice(reader, "in", read)))


def test_right_groups_pass_and_a_wrong_mapping_is_found_even_where_weights_are_zero() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    proof = Proof(model_of(net, 1, 4))
    right, wrong = group("0", "2", 6), group("2", "4", 5, [1, 2, 3, 4, 0])
    assert proof.objection([right]) is None
    passed, reasons = proof.proven([right, wrong])
    assert passed == [right]
    assert list(reasons) == ["2"]


def test_an_operator_over_the_channels_is_found() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            result: Tensor = self.b(x) + x.mean(-1, keepdim=True)
            return result

    reason = Proof(model_of(Mean(), 1, 4)).objection([group("a", "b", 6)])
    assert reason == "more than the layers that read its channels depends on them"


def test_what_nothing_depends_on_is_not_taken_for_proven() -> None:
    class Ignored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * self.b(self.a(x))

    _, reasons = Proof(model_of(Ignored(), 1, 4)).proven([group("a", "b", 6)])
    assert reasons == {"a": "no output depends on what reads its channels"}


def test_normalization_over_channels_is_proven_without_its_statistics() -> None:
    class OwnNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight

    net = nn.Sequential(nn.Linear(4, 6), OwnNorm(), nn.LayerNorm(6), nn.Linear(6, 2))
    own = np.arange(6)[:, None]
    slices = (Slice("0", "out", own), Slice("1", "out", own, "weight"), Slice("2", "out", own), Slice("3", "in", own))
    assert Proof(model_of(net, 1, 4)).objection([PruningGroup("0", "channels", 6, 1, slices)]) is None
