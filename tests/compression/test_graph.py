from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.graph import capture
from edgeopt.types import Model, TensorSpec


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = kind(4, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.recurrent(x)[0]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_layers_are_captured_without_a_warning(kind: type[nn.RNNBase]) -> None:
    # Regression: torch warns of the layer's own list of weights. Warnings are errors here.
    spec = TensorSpec("x", (1, 5, 4), "float32")
    module = Recurrent(kind).eval()
    model = Model("m", module, None, (spec,), (), {"x": np.ones((1, 5, 4), np.float32)}, None, (), (), "")
    assert any("recurrent" in name for name in capture(model).owned.values())
