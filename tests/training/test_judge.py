"""How epochs are scored."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from edgeopt.datasets import open_dataset
from edgeopt.progress import Silent
from edgeopt.training.config import Score, TrainingConfig
from edgeopt.training.judge import Judge
from edgeopt.training.losses import load_loss
from edgeopt.training.process import accelerator_for
from edgeopt.training.quantized_module import QuantizedModule
from edgeopt.types import EstimatorSpec, LayerRules, Scheme, TensorSpec

SPECS = (TensorSpec("x", (1, 6), "float32"),)


def test_epochs_are_judged_as_the_file_computes() -> None:
    """Dropout and batch statistics belong to training alone, fake quantization does not."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    values = rng.normal(100, 1, (64, 6)).astype(np.float32)  # far from the running statistics
    network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).eval()
    module = QuantizedModule(network, [torch.zeros(1, 6)], "onnx", Scheme("w8a8", "static"), LayerRules())
    module.calibrate(lambda: ((torch.from_numpy(row[np.newaxis]),) for row in values), len(values), EstimatorSpec())
    with torch.no_grad():
        wanted = module(torch.from_numpy(values)).argmax(-1).numpy()  # in eval mode
    wanted[:16] = (wanted[:16] + 1) % 3
    data = open_dataset([(row, int(label)) for row, label in zip(values, wanted, strict=True)], SPECS, None)
    statistics = [buffer.clone() for buffer in module.buffers()]
    judge = Judge(module, network, data, SPECS, load_loss(None, True, 0.5, 2.0), 16, Silent())
    module.train()
    with accelerator_for(TrainingConfig()) as accelerator:
        assert judge.score(accelerator) == Score(0.75, 64, is_accuracy=True)
    assert module.training
    assert network.training is False
    assert all(map(torch.equal, module.buffers(), statistics))
