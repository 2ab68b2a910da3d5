from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from edgeopt.compression.base import PassInputs, run_pass
from edgeopt.compression.pruning.analysis import analyse
from edgeopt.compression.pruning.removal import remove_units
from edgeopt.compression.pruning.structured import StructuredPruning
from edgeopt.errors import ConversionError
from edgeopt.progress import Silent
from edgeopt.types import EstimatorSpec, LayerRules, Model, Scheme, StepRecord, TensorSpec

INPUTS = PassInputs(Scheme("w8a8", "static"), None, 0, 0, Silent(), EstimatorSpec("min-max"), LayerRules())


def model_of(net: nn.Module, width: int = 6) -> Model:
    x = np.random.default_rng(0).normal(size=(1, width)).astype(np.float32)
    spec = TensorSpec("x", (1, width), "float32")
    return Model("m", net.eval(), None, (spec,), (), {"x": x}, None, (), (), "", {"0": (0.0, 1.0)})


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))


def test_the_old_model_is_untouched_and_frozen_weights_stay_frozen() -> None:
    net = small_net()
    net[0].weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    model = model_of(net)
    small = remove_units(model, analyse(model, ("channels",), ()), {"0": (1, 3), "2": (0,)})
    assert isinstance(small.module, nn.Sequential)
    assert [tuple(p.shape) for p in small.module.parameters()] == [(6, 6), (6,), (3, 6), (3,), (3, 3), (3,)]
    assert [p.requires_grad for p in small.module.parameters()] == [False] + [True] * 5
    assert not small.module.training
    assert small.input_ranges == {}
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    left = [0, 2, 4, 5, 6, 7]
    assert torch.equal(small.module[0].weight, net[0].weight[left])
    assert torch.equal(small.module[2].weight, net[2].weight[1:][:, left])


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ({"9": (0,)}, "no group '9'"),
        ({"2": (0, 1, 2, 3)}, "would lose all its units"),
        ({"2": (4,)}, "units 0 to 3"),
        ({"2": (1, 1)}, "each once"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: dict[str, tuple[int, ...]], problem: str) -> None:
    model = model_of(small_net())
    with pytest.raises(ValueError, match=problem):
        remove_units(model, analyse(model, ("channels",), ()), plan)


def test_protected_layers_keep_their_outputs_but_may_lose_inputs() -> None:
    model = model_of(small_net())
    prunable = analyse(model, ("channels",), ("2",))
    assert [group.name for group in prunable.groups] == ["0"]
    assert {kept.layer: kept.reason for kept in prunable.kept}["2"] == "is protected"


def test_patterns_do_not_see_the_adapter() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edgeopt_model = small_net()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.edgeopt_model(x)
            return result

    names = [group.name for group in analyse(model_of(Adapter()), ("channels",), ("0",)).groups]
    assert names == ["edgeopt_model.2"]


def test_parametrized_weights_are_kept() -> None:
    net = small_net()
    net[2] = parametrizations.weight_norm(net[2])
    prunable = analyse(model_of(net), ("channels",), ())
    assert [group.name for group in prunable.groups] == []
    assert "parametrization" in {kept.layer: kept.reason for kept in prunable.kept}["0"]


def test_an_unused_layer_that_shares_a_weight_follows() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.used = nn.Linear(6, 8), nn.Linear(8, 4)
            self.alias, self.out = nn.Linear(8, 4), nn.Linear(4, 2)
            self.alias.weight = self.used.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.out(self.used(self.shared(x)))
            return result

    model = model_of(Aliased())
    prunable = analyse(model, ("channels",), ())
    assert prunable.groups[0].name == "shared"
    small = remove_units(model, prunable, {"shared": (2,)}).module
    assert isinstance(small, Aliased)
    assert small.alias.weight is small.used.weight
    assert small.alias.in_features == 7


def test_the_pass_records_one_step() -> None:
    model = model_of(small_net())
    prunable = analyse(model, ("channels",), ())
    pass_ = StructuredPruning(prunable, {"0": (1, 2), "2": (0,)}, {"importance": "l2"})
    result = run_pass(pass_, model, INPUTS)
    config = {"importance": "l2", "removed_channels": 3, "removed_heads": 0, "removed_blocks": 0}
    assert result.history == (StepRecord("prune", config),)
    with pytest.raises(ConversionError, match="removes nothing"):
        run_pass(StructuredPruning(prunable, {}), model, INPUTS)


def test_exported_graphs_are_refused_in_one_line() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight)

    with pytest.raises(ConversionError, match=r"exported graph.*give the model as a Python factory"):
        analyse(model_of(torch.fx.symbolic_trace(Functional())), ("channels",), ())
    traced = torch.fx.symbolic_trace(small_net())
    assert [group.name for group in analyse(model_of(traced), ("channels",), ()).groups] == ["0", "2"]


def test_a_network_that_does_not_run_is_refused() -> None:
    with pytest.raises(ConversionError, match="m: does not run on its example inputs"):
        analyse(model_of(small_net(), width=5), ("channels",), ())
