"""Training a student on what a teacher makes of the same samples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compression.base import Needs, PassInputs
from edgeopt.compression.layers import arguments_of
from edgeopt.errors import UsageError
from edgeopt.training.config import Teaching, TrainingConfig, TrainingResult
from edgeopt.types import Model, Scheme, StepRecord, TensorSpec

if TYPE_CHECKING:
    from edgeopt.compression.distil.views import Matching
    from edgeopt.compression.sparsity.constraints import KeptZeros
    from edgeopt.datasets.base import Dataset


@dataclass(frozen=True, slots=True)
class Distillation:
    """Train the model to do as the teacher does (Hinton et al. 2015).

    Beside the outputs, `teaching` may name pairs of layers (see `edgeopt.compression.distil.features`) and attention
    maps to match. What that adds to the student while it trains is gone from the result. A sparse student stays sparse.

    Attributes:
        teacher: takes the student's inputs and gives outputs of the same shapes.
        training: what is trained on.
        validation: judges the epochs; the best one is kept, the untrained student being one of them.
        teaching: what is minimized; `teaching.teacher_cache` keeps the teacher's outputs.
        config: how.
        checkpoint_dir: keeps the state of the last finished epoch, from which a killed run goes on; None keeps none.
    """

    name: ClassVar[str] = "distil"
    needs: ClassVar[Needs] = "training-data"
    keeps_function: ClassVar[bool] = False
    teacher: Model
    training: Dataset
    validation: Dataset | None = None
    teaching: Teaching = field(default_factory=lambda: Teaching(loss="distillation"))
    config: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint_dir: Path | None = None

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        del model, scheme
        return None

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        """Train.

        Raises:
            UsageError: a teacher, pair of layers, loss, setting or checkpoint that doesn't fit.
            DataError: samples that don't fit the model or one another.
            ConversionError: the student has nothing to train or can't run in training, or the loss diverges.
        """
        import copy

        from edgeopt.compression.distil.views import StudentView, TeacherView, match
        from edgeopt.training.fit import FitData, class_count_of, fit
        from edgeopt.training.trainable import thawed

        if model.module is None:
            raise ValueError("run_pass checks for a module")
        if self.teacher.module is None:
            raise ValueError("a teacher needs a torch module; see sources.as_torch")
        check_inputs(model, self.teacher)
        if self.teaching.attention and self.config.gradient_checkpointing:
            raise UsageError(
                "attention maps can't be watched while layers are run a second time",
                where="attention",
                fix="leave --gradient-checkpointing out, or match hidden states with --features",
            )
        network = copy.deepcopy(model.module)
        arguments = arguments_of(model.inputs, model.example_inputs)
        matching = match(
            network, self.teacher.module, arguments, self.teaching.features, attention=self.teaching.attention
        )
        data = FitData(self.training, self.validation, model.inputs, class_count_of(model))
        # Projections always want gradients, so that the loop can't see that the network itself is frozen.
        with thawed(network):
            result = fit(
                StudentView(network, matching, inputs.seed),
                TeacherView(self.teacher.module, matching),
                data,
                self.teaching,
                self.config,
                inputs.seed,
                inputs.progress,
                outputs=matching.outputs if matching.has_features else None,
                constraint=_zeros_of(model),
                checkpoint_dir=self.checkpoint_dir,
            )
        step = StepRecord("distil", self._record(inputs.seed, matching, result))
        # Ranges of an earlier training belong to the weights that it left.
        return replace(model, module=network, native=None, history=(*model.history, step), input_ranges={})

    def _record(
        self, seed: int, matching: Matching, result: TrainingResult
    ) -> dict[str, str | int | float | bool | None]:
        from edgeopt.training.fit import record_of

        return {
            "teacher": self.teacher.name,
            "teacher_sha256": self.teacher.source_sha256,
            "feature_pairs": len(matching.pairs),
            "attention_maps": len(matching.maps),
            **record_of(self.config, self.teaching, self.training, seed, result),
        }


def _zeros_of(student: Model) -> KeptZeros | None:
    """What keeps the zeros of a sparse student, under the names that its weights have in a `StudentView`."""
    from edgeopt.compression.sparsity.constraints import KeptZeros, kept_zeros

    kept = kept_zeros(student)
    return None if kept is None else KeptZeros({f"network.{name}": mask for name, mask in kept.masks.items()})


def check_inputs(student: Model, teacher: Model) -> None:
    """Raises UsageError where the teacher takes other inputs than the student."""
    mine, theirs = (tuple(map(_signature, model.inputs)) for model in (student, teacher))
    if mine != theirs:
        raise UsageError(
            f"takes {', '.join(theirs)}, and the student {', '.join(mine)}",
            where=f"teacher {teacher.name!r}",
            fix="take a teacher with the student's inputs",
        )


def _signature(spec: TensorSpec) -> str:
    """Dynamic dimensions are alike, whatever their bounds: the data decide what both are run on."""
    sizes = ",".join(str(size) if isinstance(size, int) else "?" for size in spec.shape)
    return f"{spec.name}={spec.dtype}[{sizes}]"
