"""What the first batch tells before training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgeopt.errors import ConversionError, UsageError
from edgeopt.training.losses import load_loss
from edgeopt.training.quantized_module import QuantizedModule
from edgeopt.training.rehearsal import rehearse, takes_batches
from edgeopt.types import LayerRules, Scheme


class Then(nn.Module):
    """A layer, then some code."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        match self.code:
            case "view":
                return x.view(1, 4)
            case "flatten":
                return x.view(1, -1)
            case "mix":
                return x - x.mean(0)
            case "squeeze":
                return x.squeeze()
            case "refuse" if self.training:
                raise NotImplementedError("only for inference")
        return x


@pytest.mark.parametrize(
    ("code", "expected"),
    [("", True), ("squeeze", True), ("view", False), ("flatten", False), ("mix", False)],
)
def test_tells_whether_a_network_takes_batches(code: str, expected: bool) -> None:
    torch.manual_seed(0)
    network = Then(code).eval()
    assert takes_batches(network, (torch.randn(5, 6),), (1,)) is expected
    assert takes_batches(network, (torch.randn(1, 6),), (1,))


def test_an_exported_graph_with_a_fixed_batch_takes_none() -> None:
    graph = torch.export.export(Then("").eval(), (torch.randn(1, 6),)).module()
    assert not takes_batches(graph, (torch.randn(5, 6),), (1,))


def module_of(network: nn.Module) -> QuantizedModule:
    return QuantizedModule(network, [torch.randn(1, 6)], "onnx", Scheme("w8a8", "static"), LayerRules())


def test_a_rehearsal_leaves_no_trace() -> None:
    network = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    module = module_of(network)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    rehearse(module, network, load_loss(None, False, 0.5, 2.0), (torch.randn(5, 6),), None)
    assert not module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_what_fails_in_training_is_one_line() -> None:
    loss, batch = load_loss(None, False, 0.5, 2.0), (torch.randn(5, 6),)
    refusing = Then("refuse").eval()
    with pytest.raises(ConversionError, match="can't be trained: NotImplementedError: only for inference"):
        rehearse(module_of(refusing), refusing, loss, batch, None)
    with pytest.raises(ConversionError, match="can't run the training samples: RuntimeError"):
        takes_batches(refusing, (torch.randn(5, 7),), (1,))
    normed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(UsageError, match="one sample at a time; give more training samples"):
        rehearse(module_of(normed), normed, loss, (torch.randn(1, 6),), None)


def test_samples_that_run_one_by_one_freeze_batch_statistics() -> None:
    network = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    module = module_of(network)
    module.rows = module.sample_rows
    module.train()
    assert not module.network.get_submodule("1").training
    assert module.network.get_submodule("2").training
