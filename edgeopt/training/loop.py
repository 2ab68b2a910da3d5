"""The training loop: one model, a teacher, a loss, on Hugging Face Accelerate.

`accelerate launch` starts one such process per GPU or machine; nothing here knows how many there are beyond what
Accelerate says.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgeopt.errors import ConversionError, DataError, UsageError
from edgeopt.progress import Silent
from edgeopt.training.checkpoint import Checkpoints, LoopState
from edgeopt.training.config import TrainingConfig, TrainingResult
from edgeopt.training.data import EpochOrder, arguments_of, parts, training_batches, validation_batches
from edgeopt.training.losses import Loss, class_scores
from edgeopt.training.quantized_module import QuantizedModule

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator

    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress
    from edgeopt.types import EstimatorSpec, Sample, TensorSpec


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is trained on.

    Attributes:
        training: shuffled anew in every epoch.
        validation: judges the epochs; None keeps the last one.
        calibration: a fresh stream of samples for activation ranges at each call; count: how many.
        inputs: the model's.
    """

    training: Dataset
    validation: Dataset | None
    calibration: Callable[[], Iterator[Sample]]
    count: int
    inputs: tuple[TensorSpec, ...]


class Trainer:
    """Trains a `QuantizedModule` in place.

    Args:
        module: what is trained.
        teacher: the float model, in eval mode.
        data, loss, config, estimator: see there.
        seed: of the order of samples and of dropout.
        progress: told about every epoch.
        checkpoints: where the state is kept after every epoch; None keeps none.
        fingerprint: identifies the run for `Checkpoints`.
    """

    def __init__(
        self,
        module: QuantizedModule,
        teacher: nn.Module,
        data: TrainingData,
        loss: Loss,
        config: TrainingConfig,
        estimator: EstimatorSpec,
        seed: int,
        progress: Progress,
        checkpoints: Checkpoints | None,
        fingerprint: str,
    ) -> None:
        self._module = module
        self._teacher = teacher
        self._data = data
        self._loss = loss
        self._config = config
        self._estimator = estimator
        self._seed = seed
        self._progress = progress
        self._checkpoints = checkpoints
        self._fingerprint = fingerprint
        self._average: dict[str, Tensor] = {}
        self._best: dict[str, Tensor] = {}

    def run(self) -> TrainingResult:
        """Train. The module then is in eval mode on the CPU, with the weights of the best epoch where there is
        validation data, of the last one elsewhere.

        Raises:
            DataError: samples that don't fit the model or one another.
            UsageError: a loss or a setting that doesn't fit; a checkpoint of another run.
            ConversionError: the loss becomes NaN or Inf.
        """
        with _reproducible(), _accelerator(self._config) as accelerator:
            result = self._run(accelerator)
        self._module.to("cpu").eval()
        return result

    def _run(self, accelerator: Accelerator) -> TrainingResult:
        config, module = self._config, self._module
        if not accelerator.is_main_process:
            self._progress = Silent()
        self._teacher.to(accelerator.device).eval()
        order = EpochOrder(self._data.training, self._seed)
        loader = training_batches(self._data.training, self._data.inputs, config.batch_size, order)
        module.to(accelerator.device)
        if config.gradient_checkpointing:
            _checkpoint_gradients(module)
        wrapped, optimizer, loader = accelerator.prepare(module, _optimizer(module, config), loader)
        restored = self._checkpoints.restore(accelerator, self._fingerprint) if self._checkpoints is not None else None
        if restored is None:
            self._calibrate(accelerator, keep_learned=False)
            self._start_average()
            score = self._score(accelerator)
            state = LoopState(0, 0, None if score is None else 0, score, self._fingerprint)
            self._best = self._snapshot() if score is not None else {}
        else:
            state, tensors = restored
            self._average = _below("average", tensors, accelerator.device)
            self._best = _below("best", tensors, torch.device("cpu"))
        steps_per_epoch = math.ceil(len(loader) / config.gradient_accumulation)
        schedule = _Schedule(config, steps_per_epoch * config.epochs)
        while state.epoch < config.epochs and not self._is_stuck(state):
            # Every epoch starts from its own seed, so that a resumed run has the very same random numbers.
            _seed_everything(self._seed, state.epoch + 1, accelerator.process_index)
            order.epoch = state.epoch
            self._calibrate(accelerator)
            step = self._epoch(accelerator, wrapped, optimizer, loader, schedule, state)
            self._share_statistics(accelerator)
            state = self._judge(accelerator, LoopState(
                state.epoch + 1, step, state.best_epoch, state.best_score, self._fingerprint
            ))  # fmt: skip
            if self._checkpoints is not None:
                tensors = {f"average/{k}": v for k, v in self._average.items()}
                tensors |= {f"best/{k}": v for k, v in self._best.items()}
                self._checkpoints.save(accelerator, state, tensors)
        if self._best:
            module.load_state_dict(self._best)
        elif self._average:
            module.load_state_dict(self._average)
        self._calibrate(accelerator)
        return TrainingResult(state.epoch, state.best_epoch, state.best_score)

    def _epoch(
        self,
        accelerator: Accelerator,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Sequence[tuple[Tensor, ...]],
        schedule: _Schedule,
        state: LoopState,
    ) -> int:
        step, config = state.step, self._config
        title = f"Training, epoch {state.epoch + 1} of {config.epochs}"
        for batch in self._progress.track(loader, title, len(loader)):
            self._module.frozen_statistics = step >= schedule.freeze_at
            wrapped.train()
            arguments, labels = parts(batch, self._data.inputs)
            with accelerator.accumulate(wrapped):
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate(step)
                with accelerator.autocast():
                    outputs = _outputs(wrapped, arguments)
                    loss = self._loss(outputs, labels, self._taught(arguments))
                if not bool(torch.isfinite(loss)):
                    raise ConversionError(
                        f"the loss became {float(loss.detach())} in step {step + 1}",
                        where="training",
                        fix="take a smaller --lr, or --mixed-precision no",
                    )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), config.max_gradient_norm)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                self._update_average(step)
        return step

    def _share_statistics(self, accelerator: Accelerator) -> None:
        """Give every process the first one's running statistics: it judges by them, and only they are kept.

        Distributed training does so at the next batch, and knows nothing of averages.
        """
        from accelerate.utils import broadcast

        if accelerator.num_processes == 1:
            return
        for name, buffer in self._module.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(broadcast(buffer))
                if name in self._average:
                    self._average[name].copy_(broadcast(self._average[name]))

    def _taught(self, arguments: tuple[Tensor, ...]) -> list[Tensor]:
        if not self._loss.needs_teacher:
            return []
        with torch.no_grad():
            return _outputs(self._teacher, arguments)

    def _judge(self, accelerator: Accelerator, state: LoopState) -> LoopState:
        """The state with the new epoch's score, if it is the best."""
        with self._averaged():
            score = self._score(accelerator)
            if score is None or (state.best_score is not None and score <= state.best_score):
                return state
            self._best = self._snapshot()
        return LoopState(state.epoch, state.step, state.epoch, score, state.fingerprint)

    def _is_stuck(self, state: LoopState) -> bool:
        patience = self._config.patience
        return patience is not None and state.best_epoch is not None and state.epoch - state.best_epoch >= patience

    def _score(self, accelerator: Accelerator) -> float | None:
        """Of the module as it is now, its ranges found anew; None without validation data."""
        data = self._data.validation
        if data is None:
            return None
        self._calibrate(accelerator)
        batches = validation_batches(data, self._data.inputs, self._config.batch_size)
        good = torch.zeros((), dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for index, batch in enumerate(self._progress.track(batches, "Validating", len(batches))):
                if index % accelerator.num_processes != accelerator.process_index:
                    continue
                arguments, labels = parts(tuple(tensor.to(accelerator.device) for tensor in batch), self._data.inputs)
                value, weight = self._batch_score(_outputs(self._module, arguments), labels, arguments)
                good, total = good + value, total + weight
        sums = accelerator.reduce(torch.stack([good, total]).float().to(accelerator.device), "sum")
        if not float(sums[1]):
            raise DataError("has no sample with a label that counts", where="validation data")
        return float(sums[0] / sums[1])

    def _batch_score(
        self, outputs: list[Tensor], labels: Tensor | None, arguments: tuple[Tensor, ...]
    ) -> tuple[float, float]:
        scores = class_scores(outputs)
        classes = labels is not None and not labels.is_floating_point()
        if classes and labels is not None and scores is not None and labels.shape == scores.shape[:-1]:
            counted = labels >= 0
            return float(((scores.argmax(-1) == labels) & counted).sum()), float(counted.sum())
        count = len(outputs[0])
        return -float(self._loss(outputs, labels, self._taught(arguments))) * count, count

    def _calibrate(self, accelerator: Accelerator, *, keep_learned: bool = True) -> None:
        data = self._data

        def batches() -> Iterator[tuple[Tensor, ...]]:
            return (arguments_of(sample, data.inputs, accelerator.device) for sample in data.calibration())

        self._module.calibrate(batches, data.count, self._estimator, keep_learned=keep_learned)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self._module.state_dict().items()}

    def _start_average(self) -> None:
        if self._config.ema is not None:
            self._average = {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}

    def _update_average(self, step: int) -> None:
        if self._config.ema is None:
            return
        # Early steps forget faster, so that the average does not stay at the start.
        decay = min(self._config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in self._module.state_dict().items():
                if tensor.is_floating_point():
                    self._average[name].lerp_(tensor, 1 - decay)
                else:
                    self._average[name].copy_(tensor)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the module, inside the block."""
        if not self._average:
            yield
            return
        own = {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}
        self._module.load_state_dict(self._average)
        try:
            yield
        finally:
            self._module.load_state_dict(own)


class _Schedule:
    """Learning rate by step: a linear warm-up, then half a cosine to zero (Loshchilov and Hutter 2017)."""

    def __init__(self, config: TrainingConfig, steps: int) -> None:
        self._peak = config.learning_rate
        self._steps = max(steps, 1)
        self._warmup = round(config.warmup * steps)
        self.freeze_at = math.inf if config.freeze_batch_norm_after >= 1 else config.freeze_batch_norm_after * steps

    def rate(self, step: int) -> float:
        if step < self._warmup:
            return self._peak * (step + 1) / self._warmup
        share = (step - self._warmup) / max(self._steps - self._warmup, 1)
        return self._peak * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _optimizer(module: QuantizedModule, config: TrainingConfig) -> torch.optim.Optimizer:
    scales = {id(parameter) for parameter in module.quantization_parameters()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # Only matrices and kernels are drawn to zero.
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in scales]
    rest = [p for p in trained if p.dim() <= 1 or id(p) in scales]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UsageError("the model has no parameters that can be trained", where="training")
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def _outputs(module: nn.Module, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(module(*arguments)) if isinstance(leaf, Tensor)]


def _below(prefix: str, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {name.removeprefix(start): t.to(device) for name, t in tensors.items() if name.startswith(start)}


def _checkpoint_gradients(module: QuantizedModule) -> None:
    how = {"use_reentrant": False, "context_fn": module.checkpoint_contexts}
    for part in module.network.modules():
        # transformers renames the method: the old name warns where the new one is.
        for word in ("activation", "gradient"):
            enable = getattr(part, f"{word}_checkpointing_enable", None)
            if callable(enable):
                try:
                    enable(**{f"{word}_checkpointing_kwargs": how})
                except ValueError as error:
                    raise UsageError(str(error), where="gradient-checkpointing", fix="leave it out") from error
                return
    raise UsageError(
        "the model does not offer it (no gradient_checkpointing_enable)",
        where="gradient-checkpointing",
        fix="leave it out, or use a smaller --batch-size with --gradient-accumulation",
    )


def _seed_everything(seed: int, epoch: int, process: int) -> None:
    value = int(np.random.SeedSequence((seed, epoch, process)).generate_state(1)[0])
    torch.manual_seed(value)
    np.random.seed(value)  # the user's own augmentation may draw from it
    random.seed(value)


@contextmanager
def _reproducible() -> Iterator[None]:
    """Leave every random state as it was found."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@contextmanager
def _accelerator(config: TrainingConfig) -> Iterator[Accelerator]:
    """One Accelerator; its process-wide settings end with it, so that the next run may have others."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedDataParallelKwargs

    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        kwargs_handlers=[unused],
    )
    try:
        yield accelerator
    finally:
        accelerator.free_memory()
        if accelerator.num_processes > 1:
            PartialState().destroy_process_group()
        AcceleratorState._reset_state()
        GradientState._reset_state()


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters want no gradients."""
    return copy.deepcopy(module).eval().requires_grad_(False)
