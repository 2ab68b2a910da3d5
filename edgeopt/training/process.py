"""What belongs to the whole process and must be left as it was found: random states and Accelerate's settings."""

from __future__ import annotations

import atexit
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeopt.training.config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def seed_everything(seed: int, epoch: int, process: int) -> None:
    """Seed every source of random numbers from the run's seed, the epoch and the process."""
    value = int(np.random.SeedSequence((seed, epoch, process)).generate_state(1)[0])
    torch.manual_seed(value)
    np.random.seed(value)  # the user's own augmentation may draw from it
    random.seed(value)


@contextmanager
def reproducible() -> Iterator[None]:
    """Leave every random state as it was found."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@contextmanager
def accelerator_for(config: TrainingConfig) -> Iterator[Accelerator]:
    """One Accelerator; its process-wide settings end with it, so that the next run may have others."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedDataParallelKwargs

    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        kwargs_handlers=[unused],
    )
    try:
        yield accelerator
    finally:
        accelerator.free_memory()
        if accelerator.num_processes > 1:
            # A group that was left can't be joined again, and a recipe may train several times.
            atexit.unregister(_leave_group)
            atexit.register(_leave_group)
        AcceleratorState._reset_state()
        GradientState._reset_state()


def _leave_group() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
