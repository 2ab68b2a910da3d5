"""What each step of a compression recipe can be told; plain values, so that reading a configuration stays cheap.

A recipe is a sequence of these: prune -> distil -> qat, say. `edgeopt.tuning` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edgeopt.training.config import Teaching, TrainingConfig

#: Whatever is lost by making a model smaller is more than what int8 costs, and wants larger steps.
#: Batch normalization follows it to the end: statistics that stay behind would be part of the function.
_RECOVERY = TrainingConfig(learning_rate=3e-4, freeze_batch_norm_after=1.0)
_TRAINING, _TEACHING = TrainingConfig(), Teaching()
_SOFT_LABELS = Teaching(loss="distillation")

Importance = Literal[
    "l1", "l2", "mean-abs", "gradient", "taylor", "hessian", "activation", "batch-norm-scale", "random"
]  # fmt: skip
ScheduleName = Literal["one-shot", "iterative", "cubic"]
GoalName = Literal["ratio", "macs", "parameters", "size", "latency"]


@dataclass(frozen=True, slots=True)
class Goal:
    """How small the model is to become.

    Attributes:
        what: "ratio" is the share of prunable channels to remove; the others are costs to reach: multiply-accumulate
            operations of one inference, parameters, bytes of the target's exported file, and its latency (ms).
        value: 0..1 for a ratio; else the cost to reach.
        is_share: the value is a share of what the model of before costs ("0.6x"), not an absolute figure.
    """

    what: GoalName
    value: float
    is_share: bool = False


@dataclass(frozen=True, slots=True)
class Prune:
    """Structured pruning: remove channels, attention heads or whole residual blocks.

    Attributes:
        to: how small.
        remove: what may be removed.
        importance: how the worth of a unit is judged; None takes "taylor" with training data, else "activation"
            with samples, else "l2".
        scope: compare units over the whole network, or remove the same share of every layer.
        multiple: widths end on multiples of this; None takes the device profile's.
        protect: patterns of layers that keep their width.
        max_ratio: largest share that one layer may lose.
        schedule: one-shot; or in `rounds` with fine-tuning between them, by equal or by cubically falling parts
            (Zhu and Gupta 2017).
        rounds: of "iterative" and "cubic".
        max_drop: score that may be lost on the validation data; the first round that loses more is undone, and the
            step ends there. None goes on to the goal.
        round_epochs: of fine-tuning after every round but the last, whose epochs are `training.epochs`.
        training, teaching: of the recovery; the teacher is the model before this step.
        group_lasso: strength of the penalty on removable units while fine-tuning between rounds; 0 has none.
    """

    to: Goal = Goal("macs", 0.5, is_share=True)
    remove: tuple[Literal["channels", "heads", "blocks"], ...] = ("channels", "heads")
    importance: Importance | None = None
    scope: Literal["global", "per-layer"] = "global"
    multiple: int | None = None
    protect: tuple[str, ...] = ()
    max_ratio: float = 0.9
    schedule: ScheduleName = "iterative"
    rounds: int = 3
    max_drop: float | None = None
    round_epochs: int = 1
    training: TrainingConfig = _RECOVERY
    teaching: Teaching = _TEACHING
    group_lasso: float = 0.0


@dataclass(frozen=True, slots=True)
class Sparsify:
    """Unstructured and N:M sparsity: weights become zero, shapes stay.

    Attributes:
        to: share of zeros; ignored by the pattern "2:4", which has half.
        pattern: any weight, or two of every four along the input dimension.
        method: by magnitude (Han et al. 2015), or by movement (Sanh et al. 2020), which needs training.
        scope: compare weights over the whole network, or within each layer.
        schedule, rounds: how the share grows while training.
        protect: patterns of layers that stay dense.
        l1: strength of the penalty on weights while training; 0 has none.
        max_drop: as in `Prune`.
        training, teaching: of the training with masks; the teacher is the model before this step.
    """

    to: float = 0.5
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    method: Literal["magnitude", "movement"] = "magnitude"
    scope: Literal["global", "per-layer"] = "global"
    schedule: ScheduleName = "cubic"
    rounds: int = 4
    protect: tuple[str, ...] = ()
    l1: float = 0.0
    max_drop: float | None = None
    training: TrainingConfig = _RECOVERY
    teaching: Teaching = _TEACHING


@dataclass(frozen=True, slots=True)
class Factorize:
    """Low-rank factorization of linear layers and convolutions.

    Attributes:
        to: cost of the whole model to reach (macs, parameters, size or latency); None goes by `energy`.
        energy: share of the (activation-weighted) squared singular values that every layer keeps.
        activation_aware: weight directions by how strongly calibration data use them.
        multiple: ranks end on multiples of this; None takes the device profile's.
        protect: patterns of layers that stay whole.
        training, teaching: of the recovery.
    """

    to: Goal | None = None
    energy: float = 0.95
    activation_aware: bool = True
    multiple: int | None = None
    protect: tuple[str, ...] = ()
    training: TrainingConfig = _RECOVERY
    teaching: Teaching = _TEACHING


@dataclass(frozen=True, slots=True)
class Distil:
    """Train the model as a student.

    Attributes:
        teacher: model as for `edgeopt export`; None is the model as it was loaded, before any step.
        teacher_weights: for a factory.
        student: "model" trains the model as it is; "derived" first makes it narrower by `width` and shallower by
            `depth`, starting from the teacher's own most important weights; "search" finds both under `to`; any other
            word is a network of another architecture, named as for `edgeopt export`, that takes the model's place.
        width, depth: multipliers in 0..1 of channels and of repeated blocks.
        to: budget of "search".
        trials: architectures that "search" tries.
        sequence_level: train a generator on what the teacher writes (Kim and Rush 2016).
        training, teaching: as elsewhere.
    """

    teacher: str | None = None
    teacher_weights: Path | None = None
    student: str = "model"
    width: float = 1.0
    depth: float = 1.0
    to: Goal | None = None
    trials: int = 12
    sequence_level: bool = False
    training: TrainingConfig = _RECOVERY
    teaching: Teaching = _SOFT_LABELS

    @property
    def taught(self) -> Teaching:
        """`teaching` as the student meets it: tokens that the teacher wrote are what is learned, and its scores for
        them the rest of the mixture."""
        if self.sequence_level and self.teaching.loss in (None, "distillation"):
            return replace(self.teaching, loss="cross-entropy")
        return self.teaching


@dataclass(frozen=True, slots=True)
class Qat:
    """Quantization-aware training for the target's file; see `QuantizationAwareTraining`."""

    learned: bool = False
    training: TrainingConfig = _TRAINING
    teaching: Teaching = _TEACHING


Step = Prune | Sparsify | Factorize | Distil | Qat
