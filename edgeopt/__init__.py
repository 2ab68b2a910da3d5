"""One command from a trained PyTorch model to a phone: compressed, exported, and proven on the exported file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeopt.compression.steps import Step
    from edgeopt.datasets import DataSource
    from edgeopt.progress import Progress
    from edgeopt.sources import ModelSpec
    from edgeopt.types import Bundle

__all__ = ["export"]


def export(
    model: str | ModelSpec | None = None,
    *,
    target: str = "android-int8",
    calibration: DataSource | None = None,
    evaluation: DataSource | None = None,
    steps: Sequence[Step] = (),
    train: DataSource | None = None,
    validation: DataSource | None = None,
    progress: Progress | None = None,
    **options: object,
) -> Bundle:
    """Build and prove one bundle: `edgeopt export` as a function.

    Args:
        model: what the command line takes ("file.py:factory", "model.onnx", "hf:DIR"...), or an
            `edgeopt.sources.ModelSpec` around a module at hand.
        target: a target's name, or the path of one's TOML file.
        steps: what is done to the model before, such as `edgeopt.compression.steps.Prune(...)`; see docs/recipes.md.
        calibration, evaluation, train, validation: what the command line takes, or an object with `__len__` and
            `__getitem__`, or an iterable that can be read several times (a torch Dataset or DataLoader, a list);
            items as in docs/datasets.md.
        progress: told about every step; silent by default.
        options: the command line's other flags with underscores, e.g. `max_accuracy_drop=0.005`. No edgeopt.toml is
            read.

    Returns the bundle, also when a gate was missed: look at `bundle.passed`.

    Raises EdgeoptError: see `edgeopt.errors`.
    """
    from dataclasses import replace

    from edgeopt.config import config_of
    from edgeopt.pipeline import export as run

    config = config_of({**options, "target": [target]})
    own = replace(config, model=model, calibration=calibration, evaluation=evaluation, step=tuple(steps))
    return run(replace(own, train=train, validation=validation), progress)[0]
