"""Sparsification as passes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.base import PassInputs, run_pass
from edgeopt.compression.fine_tune import FineTuning
from edgeopt.compression.fold_batch_norm import FoldBatchNorm
from edgeopt.compression.sparsity.constraints import KeptZeros
from edgeopt.compression.sparsity.passes import SparseTraining, Sparsification
from edgeopt.compression.sparsity.pattern import is_two_of_four
from edgeopt.datasets import open_dataset
from edgeopt.errors import ConversionError, UsageError
from edgeopt.progress import Silent
from edgeopt.training.config import TrainingConfig
from edgeopt.types import EstimatorSpec, LayerRules, Model, Sample, Scheme, TensorSpec

SPECS = (TensorSpec("x", (1, 3, 8, 8), "float32"),)
IMAGES = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32)
DATA = open_dataset([(image, index % 4) for index, image in enumerate(IMAGES)], SPECS, None)


def model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1),
        nn.ReLU(), nn.Flatten(), nn.Linear(256, 4),
    )  # fmt: skip
    outputs = (TensorSpec("y", (1, 4), "float32"),)
    return Model("net", net.eval(), None, SPECS, outputs, {"x": IMAGES[:1]}, None, (), (), "0" * 64)


def inputs() -> PassInputs:
    def samples() -> Iterator[Sample]:
        return iter(DATA)

    return PassInputs(Scheme("w8a8", "static"), samples, 16, 0, Silent(), EstimatorSpec(), LayerRules())


def parameter(source: Model, name: str) -> torch.Tensor:
    assert source.module is not None
    return source.module.get_parameter(name).detach()


def test_the_record_says_what_is_true() -> None:
    result = run_pass(Sparsification(to=0.6, scope="per-layer", protect=("4",)), model(), inputs())
    (step,) = result.history
    zeros = {name: int((parameter(result, name) == 0).sum()) for name in ("0.weight", "4.weight", "7.weight")}
    assert zeros == {"0.weight": 130, "4.weight": 0, "7.weight": 615}
    assert step.step == "sparsify"
    assert step.config["zeros"] == round(745 / 1240, 6)
    assert step.config["zeros_of_densest_layer"] == round(615 / 1024, 6)
    assert step.config["zeros_of_sparsest_layer"] == round(130 / 216, 6)
    assert result.module is not None
    assert step.config["zeros_of_all_parameters"] == round(745 / sum(p.numel() for p in result.module.parameters()), 6)
    assert step.config["sparse_layers"] == 2


def test_two_of_four_leaves_layers_with_too_few_inputs_dense() -> None:
    result = run_pass(Sparsification(to=0.9, pattern="2:4"), model(), inputs())
    assert bool(parameter(result, "0.weight").all())
    assert is_two_of_four(parameter(result, "4.weight"), 1)
    assert is_two_of_four(parameter(result, "7.weight"), 1)
    assert result.history[-1].config["zeros"] == result.history[-1].config["to"] == 0.5
    with pytest.raises(UsageError, match="no layer has four inputs"):
        run_pass(Sparsification(pattern="2:4", protect=("4", "7")), model(), inputs())


def test_folding_batch_normalization_keeps_zeros() -> None:
    sparse = run_pass(Sparsification(to=0.7), model(), inputs())
    folded = run_pass(FoldBatchNorm(), sparse, inputs())
    assert torch.equal(parameter(sparse, "0.weight") == 0, parameter(folded, "0.weight") == 0)


def test_a_tensor_read_by_two_layers_is_one() -> None:
    source = model()
    assert source.module is not None
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    spec = TensorSpec("x", (1, 6), "float32")
    tied = Model("net", net.eval(), None, (spec,), (), {"x": IMAGES[:1, 0, 0, :6]}, None, (), (), "0" * 64)
    result = run_pass(Sparsification(to=0.5), tied, inputs())
    assert result.history[-1].config["sparse_layers"] == 1
    assert result.module is not None
    assert result.module[2].weight is result.module[0].weight  # type: ignore[index]
    assert int((parameter(result, "0.weight") == 0).sum()) == 18


def test_a_training_that_loses_zeros_is_not_believed() -> None:
    class Forgets(KeptZeros):
        def after_step(self, step: int, steps: int) -> None:
            del step, steps

    source = model()
    mask = torch.rand_like(parameter(source, "7.weight")) > 0.5
    config = TrainingConfig(epochs=1, batch_size=4)
    for constraint, is_good in ((KeptZeros({"7.weight": mask}), True), (Forgets({"7.weight": mask}), False)):
        pass_ = SparseTraining(constraint, 0.45, FineTuning(DATA, config=config), {"method": "magnitude"})
        if is_good:
            result = run_pass(pass_, source, inputs())
            assert result.history[-1].config["method"] == "magnitude"
            assert torch.equal(parameter(result, "7.weight") != 0, mask)
        else:
            with pytest.raises(ConversionError, match=r"training left [0-9.]+% zeros of the 45\.00%"):
                run_pass(pass_, source, inputs())
