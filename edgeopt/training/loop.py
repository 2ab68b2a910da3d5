"""The training loop: one model, a teacher, a loss, on Hugging Face Accelerate.

`accelerate launch` starts one such process per GPU or machine; nothing here knows how many there are beyond what
Accelerate says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgeopt.errors import ConversionError
from edgeopt.progress import Silent
from edgeopt.training.average import MovingAverage
from edgeopt.training.calls import explained, outputs_of
from edgeopt.training.checkpoint import Checkpoints, LoopState
from edgeopt.training.config import TrainingConfig, TrainingResult
from edgeopt.training.constraint import Constraint, Tightening
from edgeopt.training.data import Batch, EpochOrder, Kept, Parts, TrainingData, parts, training_batches
from edgeopt.training.judge import Judge
from edgeopt.training.losses import Loss
from edgeopt.training.optimization import Schedule, optimizer_of
from edgeopt.training.process import accelerator_for, reproducible, seed_everything
from edgeopt.training.rehearsal import free_axes, rehearse, takes_batches
from edgeopt.training.survey import Survey, survey
from edgeopt.training.teacher_cache import TeacherCache
from edgeopt.training.trainable import Trainable, thawed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from edgeopt.progress import Progress


class Trainer:
    """Trains a network in place.

    Args:
        module: what is trained.
        teacher: shares no tensor with it; None where the loss needs none.
        data, loss, config: see there.
        seed: of the order of samples and of dropout.
        progress: told about every epoch.
        checkpoints: where the state is kept after every epoch; None keeps none.
        fingerprint: identifies the run for `Checkpoints`.
        constraint: kept to all the way.
    """

    def __init__(
        self,
        module: Trainable,
        teacher: nn.Module | None,
        data: TrainingData,
        loss: Loss,
        config: TrainingConfig,
        seed: int,
        progress: Progress,
        checkpoints: Checkpoints | None,
        fingerprint: str,
        constraint: Constraint | None = None,
    ) -> None:
        self._module = module
        self._teacher = None if teacher is None else Trainable(teacher, module.sample_rows).eval()
        self._data = data
        self._loss = loss
        self._config = config
        self._seed = seed
        self._progress = progress
        self._checkpoints = checkpoints
        self._fingerprint = fingerprint
        self._constraint = constraint
        self._average = MovingAverage(module, config.ema, keep_zeros=constraint is not None)
        self._best: dict[str, Tensor] = {}
        self._training = Survey(data.training)
        self._validation = None if data.validation is None else Survey(data.validation)
        self._kept: Kept | None = None
        self._kept_validation: Kept | None = None

    def run(self) -> TrainingResult:
        """Train. The module then is in eval mode on the CPU, with the weights of the best epoch where there is
        validation data, of the last one elsewhere.

        Raises:
            DataError: samples that don't fit the model or one another.
            UsageError: a loss or a setting that doesn't fit; a checkpoint of another run.
            ConversionError: the network can't run in training, or the loss becomes NaN or Inf.
        """
        with _can_train():
            self._module.train().eval()  # exported graphs may refuse
        with ExitStack() as stack:
            stack.enter_context(reproducible())
            stack.enter_context(thawed(self._module.network))
            stack.callback(self._leave)
            if self._config.gradient_checkpointing:
                stack.enter_context(self._module.checkpointed())
            return self._run(stack.enter_context(accelerator_for(self._config)))

    def _leave(self) -> None:
        self._module.zero_grad(set_to_none=True)
        self._module.to("cpu").eval()

    def _run(self, accelerator: Accelerator) -> TrainingResult:
        config, module = self._config, self._module
        if not accelerator.is_main_process:
            self._progress = Silent()
        if self._teacher is not None:
            self._teacher.to(accelerator.device)
        self._survey()
        order = EpochOrder(self._training.data, self._seed, config.batch_size, self._training.sizes)
        module.to(accelerator.device)
        optimizer = optimizer_of(module, config)
        self._rehearse(accelerator, next(iter(self._batches(order))))
        if self._constraint is not None:
            self._constraint.start(module.network)
        self._keep_teaching(accelerator)
        wrapped, optimizer, loader = accelerator.prepare(module, optimizer, self._batches(order))
        restored = self._checkpoints.restore(accelerator, self._fingerprint) if self._checkpoints is not None else None
        if restored is None:
            self._calibrate(accelerator, keep_learned=False)
            self._average.start()
            state = self._judge(accelerator, LoopState(0, 0, None, None, self._fingerprint))
        else:
            state, tensors = restored
            self._average.start(_below("average", tensors, accelerator.device))
            self._best = _below("best", tensors, torch.device("cpu"))
            if self._constraint is not None:
                self._constraint.restore(_below("constraint", tensors, accelerator.device))
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
                if self._constraint is not None:
                    tensors |= {f"constraint/{k}": v for k, v in self._constraint.state().items()}
                self._checkpoints.save(accelerator, state, tensors)
        if self._best:
            module.load_state_dict(self._best)
        elif self._average.tensors:
            module.load_state_dict(self._average.tensors)
        self._calibrate(accelerator)
        return TrainingResult(state.epoch, state.best_epoch, state.best_score)

    def _survey(self) -> None:
        """Read the samples once, where they differ in length."""
        data = self._data
        self._training = survey(data.training, data.inputs, self._progress)
        if data.validation is not None:
            self._validation = survey(data.validation, data.inputs, self._progress)

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
            taken = parts(batch, self._data.inputs, self._kept)
            with accelerator.accumulate(wrapped):
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate(step)
                with accelerator.autocast(), _can_train():
                    outputs = outputs_of(wrapped, taken.arguments)
                    loss = self._loss(outputs, taken.labels, self._taught(taken), taken.sizes)
                    penalty = None if self._constraint is None else self._constraint.penalty()
                    loss = loss if penalty is None else loss + penalty
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
                if self._constraint is not None:
                    self._constraint.after_step(step, schedule.steps)
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
        module, teacher = self._module, self._teacher
        module.frozen_statistics = self._config.freeze_batch_norm_after <= 0
        taken = parts(tuple(tensor.to(accelerator.device) for tensor in batch), self._data.inputs)
        networks: dict[str, Trainable | None] = {"network": module, "teacher": teacher}
        for name, network in networks.items():
            if network is not None and not takes_batches(network.network.eval(), taken.arguments, network.sample_rows):
                network.rows = network.sample_rows
                self._progress.step(f"Running the samples of a batch one by one: the {name} has a fixed batch size")
        with accelerator.autocast():
            self._loss = replace(self._loss, axes=free_axes(module, taken.arguments, self._data.inputs))
            rehearse(module, teacher, self._loss, taken.arguments, taken.labels, taken.sizes)

    def _batches(self, order: EpochOrder) -> DataLoader[Batch]:
        return training_batches(self._training.data, self._data.inputs, self._config.batch_size, order, self._kept)

    def _keep_teaching(self, accelerator: Accelerator) -> None:
        """Compute the teacher's outputs for all samples now, if they are to be kept."""
        data = self._data
        if data.cache is None or self._teacher is None:
            return
        size = self._config.batch_size
        cache = TeacherCache(data.cache, self._teacher, data.inputs, size, accelerator.device, self._progress)
        with accelerator.main_process_first():
            self._kept = cache.of(data.training)
            # Labelled samples are judged by their labels.
            if data.validation is not None and not data.validation.is_labelled:
                self._kept_validation = cache.of(data.validation)

    def _taught(self, batch: Parts) -> Sequence[Tensor]:
        if batch.taught is not None:
            return batch.taught
        if self._teacher is None:
            return ()
        with torch.no_grad():
            return outputs_of(self._teacher, batch.arguments)

    def _judge(self, accelerator: Accelerator, state: LoopState) -> LoopState:
        """The state with the epoch's score, if it is the best; as it was, without validation data."""
        if isinstance(self._constraint, Tightening) and not self._constraint.is_settled():
            return state
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
        if self._validation is None:
            return None
        self._calibrate(accelerator)
        judge = Judge(
            self._module, self._teacher, self._validation.data, data.inputs, self._loss, self._config.batch_size,
            self._progress, self._kept_validation, self._validation.sizes,
        )  # fmt: skip
        return judge.score(accelerator).value

    def _calibrate(self, accelerator: Accelerator, *, keep_learned: bool = True) -> None:
        calibration = self._data.calibration
        if calibration is None:
            return

        def batches() -> Iterator[tuple[Tensor, ...]]:
            return (tuple(t.to(accelerator.device) for t in arguments) for arguments in calibration.samples())

        self._module.calibrate(batches, calibration.count, calibration.estimator, keep_learned=keep_learned)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self._module.state_dict().items()}


def _can_train() -> AbstractContextManager[None]:
    return explained("the network can't be trained")


def _below(prefix: str, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {name.removeprefix(start): t.to(device) for name, t in tensors.items() if name.startswith(start)}


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters want no gradients."""
    return copy.deepcopy(module).eval().requires_grad_(False)
