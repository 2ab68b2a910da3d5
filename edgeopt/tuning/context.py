"""What a compression step is given beside the model and its own settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.compression.base import PassInputs
from edgeopt.types import Model

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.plan import Job
    from edgeopt.progress import Progress
    from edgeopt.workbench import Workbench


def is_first_process() -> bool:
    """Whether this is the only process, or the first of an `accelerate launch`: the one that writes files."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True, slots=True)
class StepData:
    """Samples of the steps; `calibration` sets ranges and judges importance."""

    training: Dataset | None
    validation: Dataset | None
    calibration: Dataset | None


@dataclass(frozen=True, slots=True)
class StepContext:
    """Surroundings of one step of a recipe.

    Attributes:
        job: the target that the model is made for.
        original: the model as it was loaded, before any step: the default teacher.
        training, validation: data sets; None where the run has none.
        inputs: what passes are given (calibration samples, scheme, seed, progress).
        bench: makes a workbench for a changed model, to export it for the target's format and scheme; its files are
            gone after the step. Use `discard` or `clear` of the workbench for those of many trials.
        state_dir: folder of this very step, kept until it is finished: checkpoints for a resumed run go there.
        threads: when timing.
    """

    job: Job
    original: Model
    training: Dataset | None
    validation: Dataset | None
    inputs: PassInputs
    bench: Callable[[Model], Workbench]
    state_dir: Path
    threads: int

    @property
    def progress(self) -> Progress:
        return self.inputs.progress

    @property
    def seed(self) -> int:
        return self.inputs.seed
