"""Fine-tuning with the quantized file's own arithmetic in the forward pass (quantization-aware training)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgeopt.compression.base import Needs, PassInputs, state_digest
from edgeopt.compression.layers import arguments_of
from edgeopt.errors import DataError
from edgeopt.training.config import Teaching, TrainingConfig
from edgeopt.types import Format, Model, Sample, Scheme, StepRecord

if TYPE_CHECKING:
    import torch

    from edgeopt.datasets.base import Dataset
    from edgeopt.training.constraint import Constraint
    from edgeopt.training.loop import Trainer
    from edgeopt.training.losses import Loss
    from edgeopt.training.quantized_module import QuantizedModule

_PRECISIONS = ("w8a8", "w8a16", "w8")


@dataclass(frozen=True, slots=True)
class QuantizationAwareTraining:
    """Train the weights so that the file that `format` makes of them loses as little as possible.

    The network is trained with fake quantization where the format's file computes in integers, batch normalization
    being folded as there (see `edgeopt.training.plan`), by straight-through gradients (Bengio et al. 2013; Jacob et
    al. 2018). The result is an ordinary float model; where `learned` is set its weights lie on their int8 grid and
    `Model.input_ranges` holds the ranges that were trained.

    Attributes:
        format: of the file that will be exported.
        training: what is trained on; labels are used if the loss wants them.
        config: how.
        validation: judges the epochs; the best one is kept, the untrained model being one of them.
        loss: see `edgeopt.training.losses.load_loss`.
        alpha: weight of a task loss; the rest is distillation from the float model.
        temperature: of distillation.
        label_smoothing: of cross-entropy.
        learned: train scales and ranges too (LSQ).
        checkpoint_dir: keeps the state of the last finished epoch; None keeps none.
        resume: continue from there.
        constraint: kept to all the way, such as masks of a sparse model, whose zeros int8 keeps. It is started
            with a copy of the network, so parameters must be found by their names.
    """

    name: ClassVar[str] = "qat"
    needs: ClassVar[Needs] = "training-data"
    keeps_function: ClassVar[bool] = False
    format: Format
    training: Dataset
    config: TrainingConfig
    validation: Dataset | None = None
    loss: str | None = None
    alpha: float = 0.5
    temperature: float = 2.0
    learned: bool = False
    checkpoint_dir: Path | None = None
    resume: bool = False
    constraint: Constraint | None = None
    label_smoothing: float = 0.0

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        del model
        if scheme.precision not in _PRECISIONS:
            return f"it simulates {', '.join(_PRECISIONS)}, not {scheme.precision}"
        odd = {
            "asymmetric weights": not scheme.weight_symmetric,
            "per-group weights": scheme.weight_granularity == "per-group",
            "power-of-two scales": scheme.scale != "any",
            f"the {scheme.weight_estimator} weight estimator": scheme.weight_estimator != "max",
            f"{scheme.weight_values} weights": scheme.weight_values != "linear",
        }
        unknown = next((what for what, is_so in odd.items() if is_so), None)
        return None if unknown is None else f"it does not simulate {unknown}"

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        """Train.

        Raises:
            DataError: samples that don't fit the model or one another.
            UsageError: a loss, setting or checkpoint that doesn't fit.
            ConversionError: nothing would be quantized, or the network can't run in batches, or the loss diverges.
        """
        import copy

        from edgeopt.training.batch_norm import with_current_statistics
        from edgeopt.training.fit import class_count_of, record_of
        from edgeopt.training.losses import load_loss
        from edgeopt.training.quantized_module import QuantizedModule

        if model.module is None or inputs.samples is None:
            raise ValueError("run_pass checks for a module and samples")
        loss = load_loss(
            self.loss,
            self.training.is_labelled,
            self.alpha,
            self.temperature,
            class_count_of(model),
            self.label_smoothing,
        )
        # The parts that a network that writes is exported to have fixed shapes.
        is_static = model.generation is not None or not any(spec.is_dynamic for spec in model.inputs)
        network = model.module
        if self.config.freeze_batch_norm_after > 0:
            network = with_current_statistics(network, _arguments(model, inputs.samples()))
        quantized = QuantizedModule(
            network,
            arguments_of(model.inputs, model.example_inputs),
            self.format,
            inputs.scheme,
            inputs.rules,
            is_static=is_static,
            learned=self.learned,
        )
        result = self._trainer(quantized, model, inputs, loss).run()
        teaching = Teaching(self.loss, self.alpha, self.temperature, label_smoothing=self.label_smoothing)
        record = record_of(self.config, teaching, self.training, inputs.seed, result)
        step = StepRecord("quantization-aware-training", {**record, "learned_ranges": self.learned})
        return replace(
            model,
            # Learned scales are of use without any training.
            module=copy.deepcopy(model.module)
            if result.best_epoch == 0 and not self.learned
            else quantized.trained(network),
            native=None,
            history=(*model.history, step),
            # Ranges of an earlier training belong to the weights that it left.
            input_ranges=quantized.learned_ranges(),
        )

    def _trainer(self, quantized: QuantizedModule, model: Model, inputs: PassInputs, loss: Loss) -> Trainer:
        from edgeopt.training.checkpoint import Checkpoints
        from edgeopt.training.data import Calibration, TrainingData
        from edgeopt.training.loop import Trainer, frozen_copy

        assert model.module is not None

        def samples() -> Iterator[tuple[torch.Tensor, ...]]:
            assert inputs.samples is not None
            return (arguments_of(model.inputs, sample.inputs) for sample in inputs.samples())

        checkpoints = None
        if self.checkpoint_dir is not None:
            checkpoints = Checkpoints(self.checkpoint_dir, resume=self.resume)
        calibration = Calibration(samples, inputs.count, inputs.estimator)
        return Trainer(
            quantized,
            frozen_copy(model.module) if loss.needs_teacher else None,
            TrainingData(self.training, self.validation, model.inputs, calibration),
            loss,
            self.config,
            inputs.seed,
            inputs.progress,
            checkpoints,
            self._fingerprint(model, inputs, loss) if checkpoints is not None else "",
            self.constraint,
        )

    def _fingerprint(self, model: Model, inputs: PassInputs, loss: Loss) -> str:
        """Of everything that decides the result."""
        assert model.module is not None
        assert inputs.samples is not None
        validation = None if self.validation is None else self.validation.fingerprint()
        settings = (
            self.format, self.config, self.loss, loss.source, loss.class_count, self.alpha, self.temperature,
            self.learned, self.label_smoothing, inputs.scheme, inputs.rules, inputs.seed, inputs.count,
            inputs.estimator, self.training.fingerprint(), validation, state_digest(model.module),
            None if self.constraint is None else type(self.constraint).__qualname__,
        )  # fmt: skip
        digest = hashlib.sha256(repr(settings).encode())
        for sample in inputs.progress.track(inputs.samples(), "Identifying the data", inputs.count):
            for spec in model.inputs:
                digest.update(np.ascontiguousarray(sample.inputs[spec.name]).tobytes())
        return digest.hexdigest()


def _arguments(model: Model, samples: Iterator[Sample]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The network's arguments; raises DataError for a sample that lacks one."""
    for sample in samples:
        for spec in model.inputs:
            if spec.name not in sample.inputs:
                raise DataError(f"lacks the input {spec.name!r}", where=f"calibration sample {sample.name!r}")
        yield arguments_of(model.inputs, sample.inputs)
