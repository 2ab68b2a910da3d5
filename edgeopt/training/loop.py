"""The training loop: one model, a teacher, a loss, on Hugging Face Accelerate.

`accelerate launch` starts one such process per GPU or machine; nothing here knows how many there are beyond what
Accelerate says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgeopt.errors import ConversionError, UsageError
from edgeopt.progress import Silent
from edgeopt.training.average import MovingAverage
from edgeopt.training.calls import explained, outputs_of
from edgeopt.training.checkpoint import Checkpoints, LoopState
from edgeopt.training.config import TrainingConfig, TrainingResult
from edgeopt.training.data import Batch, EpochOrder, TrainingData, parts, training_batches
from edgeopt.training.judge import Judge
from edgeopt.training.losses import Loss
from edgeopt.training.optimization import Schedule, optimizer_of
from edgeopt.training.process import accelerator_for, reproducible, seed_everything
from edgeopt.training.quantized_module import QuantizedModule
from edgeopt.training.rehearsal import rehearse, takes_batches

if TYPE_CHECKING:
    from accelerate import Accelerator

    from edgeopt.progress import Progress
    from edgeopt.types import EstimatorSpec


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
        self._average = MovingAverage(module, config.ema)
        self._best: dict[str, Tensor] = {}

    def run(self) -> TrainingResult:
        """Train. The module then is in eval mode on the CPU, with the weights of the best epoch where there is
        validation data, of the last one elsewhere.

        Raises:
            DataError: samples that don't fit the model or one another.
            UsageError: a loss or a setting that doesn't fit; a checkpoint of another run.
            ConversionError: the network can't run in training, or the loss becomes NaN or Inf.
        """
        with reproducible(), accelerator_for(self._config) as accelerator:
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
        optimizer = optimizer_of(module, config)
        self._rehearse(accelerator, next(iter(loader)))
        wrapped, optimizer, loader = accelerator.prepare(module, optimizer, loader)
        restored = self._checkpoints.restore(accelerator, self._fingerprint) if self._checkpoints is not None else None
        if restored is None:
            self._calibrate(accelerator, keep_learned=False)
            self._average.start()
            score = self._score(accelerator)
            state = LoopState(0, 0, None if score is None else 0, score, self._fingerprint)
            self._best = self._snapshot() if score is not None else {}
        else:
            state, tensors = restored
            self._average.start(_below("average", tensors, accelerator.device))
            self._best = _below("best", tensors, torch.device("cpu"))
        steps_per_epoch = math.ceil(len(loader) / config.gradient_accumulation)
        schedule = Schedule(config, steps_per_epoch * config.epochs)
        while state.epoch < config.epochs and not self._is_stuck(state):
            # Every epoch starts from its own seed, so that a resumed run has the very same random numbers.
            seed_everything(self._seed, state.epoch + 1, accelerator.process_index)
            order.epoch = state.epoch
            self._calibrate(accelerator)
            step = self._epoch(accelerator, wrapped, optimizer, loader, schedule, state)
            self._share_statistics(accelerator)
            state = self._judge(accelerator, LoopState(
                state.epoch + 1, step, state.best_epoch, state.best_score, self._fingerprint
            ))  # fmt: skip
            if self._checkpoints is not None:
                tensors = {f"average/{k}": v for k, v in self._average.tensors.items()}
                tensors |= {f"best/{k}": v for k, v in self._best.items()}
                self._checkpoints.save(accelerator, state, tensors)
        if self._best:
            module.load_state_dict(self._best)
        elif self._average.tensors:
            module.load_state_dict(self._average.tensors)
        self._calibrate(accelerator)
        return TrainingResult(state.epoch, state.best_epoch, state.best_score)

    def _epoch(
        self,
        accelerator: Accelerator,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Sequence[Batch],
        schedule: Schedule,
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
                with accelerator.autocast(), _can_train():
                    outputs = outputs_of(wrapped, arguments)
                    loss = self._loss(outputs, labels, self._taught(arguments))
                if not bool(torch.isfinite(loss)):
                    raise ConversionError(
                        f"the loss became {float(loss.detach())} in step {step + 1}",
                        where="training",
                        fix="take a smaller --lr, or --mixed-precision no",
                    )
                with _can_train():
                    accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), config.max_gradient_norm)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                self._average.update(step)
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
                if name in self._average.tensors:
                    self._average.tensors[name].copy_(broadcast(self._average.tensors[name]))

    def _rehearse(self, accelerator: Accelerator, batch: Batch) -> None:
        """Try the first batch, and find out whether samples must be run one by one."""
        module = self._module
        module.frozen_statistics = self._config.freeze_batch_norm_after <= 0
        arguments, labels = parts(tuple(tensor.to(accelerator.device) for tensor in batch), self._data.inputs)
        if not takes_batches(self._teacher, arguments, module.sample_rows):
            module.rows = module.sample_rows
            self._progress.step("Running the samples of a batch one by one: the network has a fixed batch size")
        with accelerator.autocast():
            rehearse(module, self._teacher, self._loss, arguments, labels)

    def _taught(self, arguments: tuple[Tensor, ...]) -> list[Tensor]:
        if not self._loss.needs_teacher:
            return []
        with torch.no_grad():
            return outputs_of(self._teacher, arguments, self._module.rows)

    def _judge(self, accelerator: Accelerator, state: LoopState) -> LoopState:
        """The state with the new epoch's score, if it is the best."""
        with self._average.in_place():
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
        data = self._data
        if data.validation is None:
            return None
        self._calibrate(accelerator)
        judge = Judge(
            self._module, self._teacher, data.validation, data.inputs, self._loss, self._config.batch_size,
            self._progress,
        )  # fmt: skip
        return judge.score(accelerator)

    def _calibrate(self, accelerator: Accelerator, *, keep_learned: bool = True) -> None:
        data = self._data

        def batches() -> Iterator[tuple[Tensor, ...]]:
            return (tuple(t.to(accelerator.device) for t in arguments) for arguments in data.calibration())

        self._module.calibrate(batches, data.count, self._estimator, keep_learned=keep_learned)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self._module.state_dict().items()}


def _can_train() -> AbstractContextManager[None]:
    return explained("the network can't be trained")


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


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters want no gradients."""
    return copy.deepcopy(module).eval().requires_grad_(False)
