"""Training on as a float model: recovers what an earlier step has cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compression.base import Needs, PassInputs
from edgeopt.errors import UsageError
from edgeopt.training.config import Teaching, TrainingConfig
from edgeopt.types import Model, Scheme, StepRecord

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.training.fit import Constraint


@dataclass(frozen=True, slots=True)
class FineTuning:
    """Train all weights, by labels, by what a teacher says, or by both (knowledge distillation, Hinton et al. 2015).

    Attributes:
        training: what is trained on; labels are used if the loss wants them.
        validation: judges the epochs; the best one is kept, the model as it was being one of them.
        config: how.
        teaching: what is minimized. Layers of student and teacher (`features`, `attention`) are for distillation to
            match, not for this pass.
        teacher: None takes the model as it was before this pass.
        constraint: kept to all the way, such as masks of a sparse model. It carries state, so each pass has its own.
        checkpoint_dir: keeps the state of the last finished epoch; None keeps none.
        resume: continue from there; otherwise it must hold nothing yet.
    """

    name: ClassVar[str] = "fine-tune"
    needs: ClassVar[Needs] = "training-data"
    keeps_function: ClassVar[bool] = False
    training: Dataset
    validation: Dataset | None = None
    config: TrainingConfig = field(default_factory=TrainingConfig)
    teaching: Teaching = field(default_factory=Teaching)
    teacher: Model | None = None
    constraint: Constraint | None = None
    checkpoint_dir: Path | None = None
    resume: bool = True

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        del model, scheme
        return None

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        """Train a copy.

        Raises:
            DataError: samples that don't fit the model or one another.
            UsageError: a loss, setting, teacher or checkpoint that doesn't fit.
            ConversionError: the network can't be trained, or the loss diverges.
        """
        import copy

        from edgeopt.training.fit import FitData, class_count_of, fit, record_of

        teacher = (self.teacher or model).module
        if model.module is None or teacher is None:
            raise ValueError("fine-tuning takes models with a torch module; see sources.as_torch")
        if self.teaching.features or self.teaching.attention:
            raise UsageError(
                "layers of a teacher are matched in distillation only",
                where="features" if self.teaching.features else "attention",
                fix="leave it out here, or add a distillation step",
            )
        module = copy.deepcopy(model.module)
        data = FitData(self.training, self.validation, model.inputs, class_count_of(model))
        result = fit(
            module,
            teacher,
            data,
            self.teaching,
            self.config,
            inputs.seed,
            inputs.progress,
            constraint=self.constraint,
            checkpoint_dir=self.checkpoint_dir,
            resume=self.resume,
            fingerprint="" if self.constraint is None else type(self.constraint).__qualname__,
        )
        step = StepRecord(self.name, record_of(self.config, self.teaching, self.training, inputs.seed, result))
        # Ranges of an earlier quantization-aware training belong to the weights that it left.
        return replace(model, module=module, native=None, history=(*model.history, step), input_ranges={})
