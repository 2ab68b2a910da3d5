"""`edgeopt qat`: fine-tune a model for int8, then export and prove it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeopt.cli.console import JsonFlag, bundle_document, missed_checks, print_json, stdout, work
from edgeopt.config_keys import KEYS, Key
from edgeopt.errors import GateError, UsageError

if TYPE_CHECKING:
    from edgeopt.types import Bundle

_KEYS: dict[str, Key] = {key.name: key for key in KEYS}
#: The keys of edgeopt.toml that matter most here; the others are taken from the file.
_FLAGS = (
    "model", "example", "weights", "name", "input", "task", "target", "calibration", "num_calibration_samples",
    "evaluation", "preprocessing", "metric", "seed", "estimator", "percentile", "keep_float", "max_accuracy_drop",
    "min_agreement", "threads", "output_dir",
)  # fmt: skip
_TRAINING = "Training"


class Precision(StrEnum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class Optimizer(StrEnum):
    adamw = "adamw"
    sgd = "sgd"


def _flag(name: str) -> Any:
    key = _KEYS[name]
    return typer.Option(
        f"--{key.spelling}", help=key.help, rich_help_panel=key.group, metavar=key.metavar or None, show_default=False
    )


def _training(text: str, *spellings: str, **more: Any) -> Any:
    return typer.Option(*spellings, help=text, rich_help_panel=_TRAINING, **more)


def qat(
    context: typer.Context,
    train: Annotated[
        str, _training("Training data: whatever --calibration takes; labels are used if there are any.", "--train")
    ],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=_KEYS["model"].help, show_default=False)] = None,
    example: Annotated[str | None, _flag("example")] = None,
    weights: Annotated[Path | None, _flag("weights")] = None,
    name: Annotated[str | None, _flag("name")] = None,
    input: Annotated[list[str] | None, _flag("input")] = None,  # noqa: A002  (the flag's name)
    task: Annotated[str | None, _flag("task")] = None,
    target: Annotated[list[str] | None, _flag("target")] = None,
    calibration: Annotated[str | None, _flag("calibration")] = None,
    num_calibration_samples: Annotated[str | None, _flag("num_calibration_samples")] = None,
    evaluation: Annotated[str | None, _flag("evaluation")] = None,
    preprocessing: Annotated[Path | None, _flag("preprocessing")] = None,
    metric: Annotated[str | None, _flag("metric")] = None,
    seed: Annotated[str | None, _flag("seed")] = None,
    estimator: Annotated[str | None, _flag("estimator")] = None,
    percentile: Annotated[str | None, _flag("percentile")] = None,
    keep_float: Annotated[list[str] | None, _flag("keep_float")] = None,
    max_accuracy_drop: Annotated[str | None, _flag("max_accuracy_drop")] = None,
    min_agreement: Annotated[str | None, _flag("min_agreement")] = None,
    threads: Annotated[str | None, _flag("threads")] = None,
    output_dir: Annotated[Path | None, _flag("output_dir")] = None,
    validation: Annotated[
        str | None, _training("Data that judge the epochs; the best one is kept. Default: the last one is.")
    ] = None,
    epochs: Annotated[int, _training("Passes over the training data.", min=1)] = 5,
    lr: Annotated[float, _training("Peak learning rate; it falls to zero along a cosine.", min=1e-9, max=10.0)] = 1e-4,
    batch_size: Annotated[int, _training("Samples per step and process.", min=1)] = 32,
    optimizer: Annotated[Optimizer, _training("What turns gradients into steps.")] = Optimizer.adamw,
    weight_decay: Annotated[float, _training("Of matrices and kernels.", min=0.0)] = 1e-4,
    warmup: Annotated[float, _training("Share of the steps in which the rate rises.", min=0.0, max=1.0)] = 0.05,
    loss: Annotated[
        str | None,
        _training(
            "distillation (from the float model), cross-entropy, mse or file.py:function. Default: cross-entropy with "
            "labels, distillation without."
        ),
    ] = None,
    alpha: Annotated[float, _training("Weight of the task loss; the rest is distillation.", min=0.0, max=1.0)] = 0.5,
    temperature: Annotated[float, _training("Of distillation.", min=0.01)] = 2.0,
    freeze_batch_norm_after: Annotated[
        float, _training("Share of the steps with batch statistics; afterwards as in the file.", min=0.0, max=1.0)
    ] = 0.5,
    lsq: Annotated[bool, _training("Train scales and ranges too (learned step size).", "--lsq/--no-lsq")] = False,
    ema: Annotated[
        float | None, _training("Keep the moving average of the weights with this decay.", min=0.0, max=0.99999)
    ] = None,
    patience: Annotated[
        int | None, _training("Stop after so many epochs that were no better. Needs --validation.", min=1)
    ] = None,
    mixed_precision: Annotated[Precision, _training("Type of the matrix products.")] = Precision.no,
    gradient_accumulation: Annotated[int, _training("Batches per step.", min=1)] = 1,
    gradient_checkpointing: Annotated[
        bool, _training("Compute activations twice, to save memory.", "--gradient-checkpointing")
    ] = False,
    checkpoint_dir: Annotated[Path | None, _training("Keep the last finished epoch there.", metavar="DIR")] = None,
    resume: Annotated[bool, _training("Continue from --checkpoint-dir.", "--resume")] = False,
    save_weights: Annotated[
        Path | None, _training("Write the trained weights there.", metavar="FILE.safetensors")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Configuration. Default: ./edgeopt.toml.", show_default=False),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Fine-tune a model with the arithmetic of the int8 file, then export and prove it as 'edgeopt export' does.

    Example: edgeopt qat net.py:build --train pictures/train --validation pictures/val --target android-int8

    For several GPUs or machines start it with 'accelerate launch -m edgeopt qat ...'.
    """
    flags = locals()  # the parameters, under the names of the keys
    from edgeopt.config import load_config

    settings = load_config(config, {key: flags[key] for key in _FLAGS})
    if settings.model is None and settings.example is None:
        raise UsageError(
            "nothing to train", fix="give a model (edgeopt qat net.py:build --train DATA), or a built-in --example"
        )
    _check(patience, validation, resume, checkpoint_dir, save_weights)
    with work(context) as progress:
        progress.step("Starting")
        from edgeopt.pipeline import qat as run
        from edgeopt.training.config import TrainingConfig
        from edgeopt.tuning.qat import QatConfig

        training = TrainingConfig(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=lr,
            optimizer=optimizer.value,
            weight_decay=weight_decay,
            warmup=warmup,
            freeze_batch_norm_after=freeze_batch_norm_after,
            ema=ema,
            patience=patience,
            mixed_precision=mixed_precision.value,
            gradient_accumulation=gradient_accumulation,
            gradient_checkpointing=gradient_checkpointing,
        )
        how = QatConfig(
            train, validation, training, loss, alpha, temperature, lsq, checkpoint_dir, resume, save_weights
        )
        bundles = run(settings, how, progress)
    if json:
        print_json({"bundles": [bundle_document(bundle.path, bundle.report) for bundle in bundles]})
    else:
        _show(bundles)
    if failed := [bundle for bundle in bundles if not bundle.passed]:
        missed = "; ".join(f"{bundle.target}: {missed_checks(bundle.report)}" for bundle in failed)
        raise GateError(f"missed {missed}", fix="train longer, or see the report above")


def _check(
    patience: int | None, validation: str | None, resume: bool, checkpoint_dir: Path | None, save_weights: Path | None
) -> None:
    """Refuse what would be found out only after hours of training."""
    if patience is not None and validation is None:
        raise UsageError("needs data to judge the epochs by", where="--patience", fix="give --validation DATA")
    if resume and checkpoint_dir is None:
        raise UsageError("needs to know where the checkpoint is", where="--resume", fix="give --checkpoint-dir DIR")
    if save_weights is not None and (save_weights.suffix != ".safetensors" or save_weights.is_dir()):
        raise UsageError("is no .safetensors file", where=f"--save-weights {save_weights}")


def _show(bundles: tuple[Bundle, ...]) -> None:
    from edgeopt.report import render

    console = stdout()
    for bundle in bundles:
        render(bundle.report, console)
        console.print(f"Bundle: {bundle.path}" + ("" if bundle.passed else "  (failed)"), soft_wrap=True)
