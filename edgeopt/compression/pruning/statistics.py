"""The samples that units are judged on, and the network as it runs on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from edgeopt.compression.pruning.groups import Prunable, PruningGroup
from edgeopt.datasets.base import Dataset
from edgeopt.datasets.subset import select
from edgeopt.errors import ConversionError, EdgeoptError
from edgeopt.types import Model, Sample

if TYPE_CHECKING:
    from torch import nn

    from edgeopt.training.losses import TaskLoss


@dataclass(frozen=True, slots=True)
class ScoringData:
    """What units are judged on.

    Attributes:
        samples: a fresh stream of unlabelled samples at each call, always the same ones; None where there are none.
        count: how many it has.
        labelled: data set of the task, which gradients are taken on; may have no labels, and then counts as samples.
        loss: of these data, as `load_loss` takes it; a distillation loss, zero at the model itself, counts as none.
        class_count: classes that the model tells apart; None where it is no classifier, or isn't known to be one.
        limit: samples that are looked at; the first ones of a stream, a seeded choice of a data set.
    """

    samples: Callable[[], Iterator[Sample]] | None = None
    count: int = 0
    labelled: Dataset | None = None
    loss: str | None = None
    class_count: int | None = None
    limit: int = 256

    @property
    def is_empty(self) -> bool:
        return self.samples is None and self.labelled is None

    def __len__(self) -> int:
        """How many samples will be looked at."""
        return min(self.limit, self.count if self.labelled is None else len(self.labelled))

    def stream(self, seed: int) -> Iterator[Sample]:
        """The samples to look at, the labelled ones where there are any."""
        if self.labelled is not None:
            return iter(select(self.labelled, self.limit, seed))
        return islice(self.samples(), self.limit) if self.samples is not None else iter(())

    def task(self) -> TaskLoss | None:
        """The loss of outputs against labels; None where there are no labels, or no loss that needs them.

        Raises UsageError for a loss that doesn't exist or can't be loaded.
        """
        from edgeopt.training.losses import load_loss

        if self.labelled is None or not self.labelled.is_labelled:
            return None
        return load_loss(self.loss, True, 1.0, 1.0, self.class_count).task


def module_of(model: Model) -> nn.Module:
    """The model's torch module, which units are scored on."""
    if model.module is None:
        raise ValueError("units are scored on a torch module; see sources.as_torch")
    return model.module


def thawed(model: Model) -> nn.Module:
    """A copy whose weights all have gradients: models loaded for inference are frozen, and none may be touched."""
    module = copy.deepcopy(module_of(model)).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module


def blocks_of(prunable: Prunable) -> list[PruningGroup]:
    """The groups that are whole blocks."""
    return [group for group in prunable.groups if group.kind == "blocks"]


def layered_of(prunable: Prunable) -> list[PruningGroup]:
    """The groups whose units lie in layers: channels and heads."""
    return [group for group in prunable.groups if group.kind != "blocks"]


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Run a block that executes the user's network."""
    try:
        yield
    except EdgeoptError:
        raise
    except Exception as error:  # the network's own Python, and torch inside it, may raise anything
        text = next(iter(str(error).strip().splitlines()), "")
        raise ConversionError(
            f"the network can't be run or differentiated: {type(error).__name__}: {text}".rstrip(": "), where=where
        ) from error
