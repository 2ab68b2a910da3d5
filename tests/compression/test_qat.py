"""The pass and its loop: what is kept, what a killed run does, what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from edgeopt.compression.base import PassInputs, run_pass
from edgeopt.compression.qat import QuantizationAwareTraining
from edgeopt.datasets import open_dataset
from edgeopt.errors import ConversionError, DataError, UsageError
from edgeopt.progress import Silent
from edgeopt.training.config import TrainingConfig
from edgeopt.types import EstimatorSpec, LayerRules, Model, Sample, Scheme, TensorSpec

SPECS = (TensorSpec("x", (1, 6), "float32"),)
RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(48, 6)).astype(np.float32)
ITEMS = [(row, int(row[0] + row[1] > 0)) for row in VALUES]
T = TypeVar("T")


class KilledError(Exception):
    """Stands for a power cut."""


class Dies(Silent):
    """Dies when an epoch begins."""

    def __init__(self, epoch: int) -> None:
        self._title = f"Training, epoch {epoch} "

    def track(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        if title.startswith(self._title):
            raise KilledError
        return super().track(items, title, total)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2)
    )  # fmt: skip
    return layers.eval()


def model(module: nn.Module | None = None) -> Model:
    return Model(
        "net", module or network(), None, SPECS, (TensorSpec("y", (1, 2), "float32"),), {"x": VALUES[:1]}, None, (),
        (), "0" * 64,
    )  # fmt: skip


def training(config: TrainingConfig, **more: object) -> QuantizationAwareTraining:
    pass_ = QuantizationAwareTraining("onnx", open_dataset(ITEMS, SPECS, None), config)
    return replace(pass_, **more)


def inputs(progress: Silent | None = None) -> PassInputs:
    data = open_dataset(ITEMS[:8], SPECS, None)

    def samples() -> Iterator[Sample]:
        return iter(data)

    return PassInputs(
        Scheme("w8a8", "static"), samples, 8, 0, progress or Silent(), EstimatorSpec(), LayerRules()
    )  # fmt: skip


CONFIG = TrainingConfig(epochs=3, batch_size=8, learning_rate=1e-2)


def state(result: Model) -> dict[str, torch.Tensor]:
    assert result.module is not None
    return result.module.state_dict()


def same(one: Model, other: Model) -> bool:
    return all(torch.equal(tensor, state(other)[name]) for name, tensor in state(one).items())


def test_trains_deterministically_and_leaves_the_random_state_alone() -> None:
    source = model()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = run_pass(training(CONFIG), source, inputs())
    assert torch.equal(torch.rand(1), expected)
    second = run_pass(training(CONFIG), source, inputs())
    assert same(first, second)
    assert not same(first, model())
    assert first.history[-1].step == "quantization-aware-training"
    assert first.history[-1].config["epochs_run"] == 3


@pytest.mark.parametrize("more", [{}, {"learned": True}])
def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path, more: dict[str, object]) -> None:
    config = replace(CONFIG, ema=0.9)
    settings = {**more, "validation": open_dataset(ITEMS[:16], SPECS, None)}
    whole = run_pass(training(config, **settings), model(), inputs())
    with pytest.raises(KilledError):
        run_pass(training(config, **settings, checkpoint_dir=tmp_path), model(), inputs(Dies(3)))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0002"]
    (tmp_path / ".epoch-0003.partial").mkdir()  # what a kill in the middle of writing leaves
    resumed = run_pass(training(config, **settings, checkpoint_dir=tmp_path, resume=True), model(), inputs())
    assert same(whole, resumed)
    assert whole.input_ranges == resumed.input_ranges
    assert bool(whole.input_ranges) == bool(more)


class Checkpointing(nn.Module):
    """Checkpoints the forward of its block, as transformers does: outside its hooks, and so behind our back."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(6, 2)
        self.how: dict[str, object] | None = None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, object]) -> None:
        self.how = gradient_checkpointing_kwargs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):  # the second call has ranges of its own
            if self.how is None or not self.training:
                x = x + self.block.forward(x)
            else:
                x = x + checkpoint(self.block.forward, x, **self.how)
        result: torch.Tensor = self.head(x)
        return result


@pytest.mark.parametrize("learned", [False, True])
def test_checkpointing_gradients_changes_no_bit(learned: bool) -> None:
    torch.manual_seed(0)
    source = model(Checkpointing().eval())
    plain = run_pass(training(CONFIG, learned=learned), source, inputs())
    saving = run_pass(training(replace(CONFIG, gradient_checkpointing=True), learned=learned), source, inputs())
    assert not same(plain, source)
    assert same(plain, saving)


class Incapable(Checkpointing):
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, object]) -> None:
        del gradient_checkpointing_kwargs
        raise ValueError("Incapable does not support gradient checkpointing.")


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    run_pass(training(replace(CONFIG, epochs=1), checkpoint_dir=tmp_path), model(), inputs())
    with pytest.raises(UsageError, match="holds a checkpoint of an earlier run"):
        run_pass(training(CONFIG, checkpoint_dir=tmp_path), model(), inputs())
    with pytest.raises(UsageError, match="another model, data or settings"):
        run_pass(training(CONFIG, checkpoint_dir=tmp_path, resume=True), model(), inputs())


def test_other_calibration_samples_or_another_loss_are_another_run(tmp_path: Path) -> None:
    loss = tmp_path / "loss.py"
    loss.write_text("def l(outputs, labels):\n    return outputs.square().mean()\n")
    first = training(replace(CONFIG, epochs=1), checkpoint_dir=tmp_path / "kept", loss=f"{loss}:l")
    resumed = replace(first, resume=True)
    run_pass(first, model(), inputs())
    run_pass(resumed, model(), inputs())
    others = [Sample({"x": VALUES[i : i + 1]}, None, str(i)) for i in range(8, 16)]
    with pytest.raises(UsageError, match="another model, data or settings"):
        run_pass(resumed, model(), replace(inputs(), samples=lambda: iter(others)))
    loss.write_text("def l(outputs, labels):\n    return outputs.abs().mean()\n")
    with pytest.raises(UsageError, match="another model, data or settings"):
        run_pass(resumed, model(), inputs())


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    run_pass(training(config, checkpoint_dir=tmp_path), model(), inputs())
    (tmp_path / "epoch-0001" / "optimizer.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UsageError, match="no checkpoint that can be read"):
        run_pass(training(config, checkpoint_dir=tmp_path, resume=True), model(), inputs())


def test_stops_early_and_keeps_the_best() -> None:
    validation = open_dataset(ITEMS, SPECS, None)
    config = replace(CONFIG, epochs=30, learning_rate=1e-2, patience=2)
    result = run_pass(training(config, validation=validation), model(), inputs())
    ran, best = result.history[-1].config["epochs_run"], result.history[-1].config["best_epoch"]
    assert isinstance(ran, int)
    assert isinstance(best, int)
    assert ran < 30
    assert ran == best + 2


def test_training_that_only_harms_returns_the_model_as_it_was() -> None:
    good = run_pass(training(replace(CONFIG, epochs=20), loss="cross-entropy", alpha=1.0), model(), inputs())
    validation = open_dataset(ITEMS, SPECS, None)
    # Labels turned round: every epoch makes it worse.
    wrong = open_dataset([(row, 1 - label) for row, label in ITEMS], SPECS, None)
    config = replace(CONFIG, learning_rate=0.05)
    result = run_pass(training(config, training=wrong, validation=validation, loss="cross-entropy", alpha=1.0),
                      replace(good, history=()), inputs())  # fmt: skip
    assert result.history[-1].config["best_epoch"] == 0
    assert same(result, good)


def test_batch_norm_frozen_from_the_start_keeps_its_statistics() -> None:
    result = run_pass(training(replace(CONFIG, freeze_batch_norm_after=0.0)), model(), inputs())
    assert torch.equal(state(result)["1.running_mean"], state(model())["1.running_mean"])
    moving = run_pass(training(replace(CONFIG, freeze_batch_norm_after=1.0)), model(), inputs())
    assert not torch.equal(state(moving)["1.running_mean"], state(model())["1.running_mean"])


def test_accumulated_gradients_and_bf16_train() -> None:
    config = replace(CONFIG, gradient_accumulation=2, mixed_precision="bf16", optimizer="sgd")
    result = run_pass(training(config), model(), inputs())
    assert not same(result, model())
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in state(result).values())


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.relu(self.first(x)).view(1, 8))
        return result


class FreeBatch(FixedBatch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.relu(self.first(x)))
        return result


def test_a_network_with_a_fixed_batch_trains_as_one_without() -> None:
    fixed = run_pass(training(CONFIG), model(FixedBatch().eval()), inputs())
    free = run_pass(training(CONFIG), model(FreeBatch().eval()), inputs())
    assert not same(fixed, model(FixedBatch().eval()))
    for name, tensor in state(fixed).items():
        torch.testing.assert_close(tensor, state(free)[name], atol=2e-3, rtol=1e-2)
    judged = training(CONFIG, validation=open_dataset(ITEMS[:12], SPECS, None))
    assert run_pass(judged, model(FixedBatch().eval()), inputs()).history[-1].config["best_epoch"] is not None


def test_ranges_of_an_earlier_training_do_not_outlive_its_weights() -> None:
    learned = run_pass(training(CONFIG, learned=True), model(), inputs())
    again = run_pass(training(CONFIG), replace(learned, history=()), inputs())
    assert learned.input_ranges
    assert not again.input_ranges


def test_a_model_whose_parameters_are_all_frozen_is_trained_all_the_same() -> None:
    frozen = network().requires_grad_(False)
    assert not same(run_pass(training(CONFIG), model(frozen), inputs()), model())


def test_refusals() -> None:
    with pytest.raises(ConversionError, match="loss became"):
        run_pass(training(replace(CONFIG, learning_rate=1e30, max_gradient_norm=1e30)), model(), inputs())
    with pytest.raises(UsageError, match="does not offer it"):
        run_pass(training(replace(CONFIG, gradient_checkpointing=True)), model(), inputs())
    with pytest.raises(UsageError, match="Incapable does not support"):
        run_pass(training(replace(CONFIG, gradient_checkpointing=True)), model(Incapable().eval()), inputs())
    with pytest.raises(ConversionError, match="not w4"):
        run_pass(training(CONFIG), model(), replace(inputs(), scheme=Scheme("w4", "none")))
    with pytest.raises(UsageError, match="one sample at a time"):
        run_pass(training(replace(CONFIG, batch_size=1)), model(), inputs())
    with pytest.raises(DataError, match="training data: has the label 7, and the model has 2 classes"):
        run_pass(training(CONFIG, training=open_dataset([(row, 7) for row in VALUES], SPECS, None)), model(), inputs())
    with pytest.raises(DataError, match="validation data: has the label 7"):
        run_pass(
            training(CONFIG, validation=open_dataset([(row, 7) for row in VALUES], SPECS, None)), model(), inputs()
        )
    other = replace(model(), inputs=(TensorSpec("z", (1, 6), "float32"),), example_inputs={"z": VALUES[:1]})
    with pytest.raises(DataError, match="lacks the input"):
        run_pass(training(CONFIG), other, inputs())


class OddColumnsAreZero:
    def start(self, module: nn.Module) -> None:
        self._weight = module.get_parameter("0.weight")
        self._apply()

    def penalty(self) -> torch.Tensor | None:
        return None

    def after_step(self, step: int, steps: int) -> None:
        del step, steps
        self._apply()

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        del state

    def _apply(self) -> None:
        with torch.no_grad():
            self._weight[:, 1::2] = 0


@pytest.mark.parametrize("learned", [False, True])
def test_zeros_stay_zeros(learned: bool) -> None:
    config = replace(CONFIG, ema=0.9)
    sparse = run_pass(training(config, learned=learned, constraint=OddColumnsAreZero()), model(), inputs())
    weight = state(sparse)["0.weight"]
    assert not weight[:, 1::2].any()
    assert weight[:, ::2].any(0).all()


def test_statistics_that_lag_behind_do_not_change_the_network_that_training_begins_with() -> None:
    """As training with frozen statistics leaves them; batch statistics would give another network at once."""
    source = model()
    assert source.module is not None
    with torch.no_grad():
        norm = source.module[1]
        norm.running_var *= 5
        norm.running_mean += 1
    kept = replace(CONFIG, epochs=1, learning_rate=1e-9, warmup=0.0, freeze_batch_norm_after=1.0)
    result = run_pass(training(kept, loss="distillation"), source, inputs())
    assert result.module is not None
    x = torch.from_numpy(VALUES)
    torch.testing.assert_close(result.module(x), source.module(x), rtol=0.1, atol=0.1)
