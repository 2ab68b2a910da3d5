"""How training is set up, and what it came to; knows no framework."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How to train.

    Attributes:
        epochs: passes over the training data.
        batch_size: samples per step and process.
        learning_rate: its peak, after the warm-up; from there it falls along half a cosine to zero.
        optimizer: AdamW (Loshchilov and Hutter 2019), or SGD with momentum 0.9.
        weight_decay: decoupled for AdamW; biases, normalizations and learned scales are left out.
        warmup: share of the steps in which the rate rises from zero.
        freeze_batch_norm_after: share of the steps after which batch normalization keeps its running statistics, as
            the file will; 1 never freezes, 0 freezes from the start.
        ema: decay of the moving average of the weights, which is what is judged and kept; None keeps the weights.
        patience: epochs without a better validation score after which training stops; None never does.
        mixed_precision: type of the matrix products; rounding onto the grid is always float32.
        gradient_accumulation: batches per step.
        gradient_checkpointing: compute activations again in the backward pass, where the model offers it.
        max_gradient_norm: longer gradients are shortened to it.
    """

    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 1e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 1e-4
    warmup: float = 0.05
    freeze_batch_norm_after: float = 0.5
    ema: float | None = None
    patience: int | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    max_gradient_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class Teaching:
    """What training minimizes.

    Attributes:
        loss, alpha, temperature: see `edgeopt.training.losses.load_loss`.
        features: "student layer=teacher layer" (or one path for both): their outputs are matched, through a learned
            projection where the shapes differ.
        feature_weight: of that term.
        attention: whether attention maps of equal shape are matched too.
        teacher_cache: folder that keeps the teacher's outputs in float32, for data that are the same in every epoch;
            None computes them anew.
        label_smoothing: share of a label that cross-entropy spreads evenly over all classes.
    """

    loss: str | None = None
    alpha: float = 0.5
    temperature: float = 2.0
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    attention: bool = False
    teacher_cache: Path | None = None
    label_smoothing: float = 0.0


@dataclass(frozen=True, slots=True)
class Score:
    """How good a model is on some data, higher being better.

    Attributes:
        value: accuracy, or the negative mean of a loss.
        count: how many labels, or samples, it is the mean over.
        is_accuracy: which of the two.
    """

    value: float
    count: int
    is_accuracy: bool


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """`epochs`: how many ran. `best_epoch`: the one that was kept, 0 being the untrained model; `score`: accuracy
    where labels are class indices, else the negative loss, on the validation data (of the simulated file, where one
    is simulated). Both are None where no epoch was chosen by validation data."""

    epochs: int
    best_epoch: int | None
    score: float | None
