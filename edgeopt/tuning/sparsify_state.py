"""The last finished round of a sparsification on disk, for a run that is started again."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError
from edgeopt.json_data import dumps, from_plain, loads
from edgeopt.sources.structure import load_model, save_model
from edgeopt.types import Model, StepRecord

if TYPE_CHECKING:
    import torch

_NAME = "finished-rounds"
_WEIGHTS, _STATE, _RECORD = "model.safetensors", "state.safetensors", "record.json"


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """Where the rounds stand.

    Attributes:
        number: how many are done.
        model: what they made.
        state: of the constraint, which the next round goes on from.
        is_last: no other round is to follow, though there were to be more.
    """

    number: int
    model: Model
    state: Mapping[str, torch.Tensor]
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class _Record:
    number: int
    is_last: bool
    history: tuple[StepRecord, ...]


class RoundStore:
    """Args:
    directory: of this very step; what lies there belongs to the same model, settings and data.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, dense: Model) -> Round | None:
        """The last finished round, None where there is none or it can't be read.

        Args:
            dense: the model before the step.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        assert dense.module is not None
        folder = self._directory / _NAME
        try:
            record = from_plain(_Record, loads((folder / _RECORD).read_bytes(), str(folder)), str(folder))
            module = load_model(copy.deepcopy(dense.module), folder / _WEIGHTS).eval()
            state = load_file(folder / _STATE)
        except (OSError, UsageError, SafetensorError):
            return None
        model = replace(dense, module=module, native=None, history=record.history, input_ranges={})
        return Round(record.number, model, state, record.is_last)

    def save(self, done: Round, dense: Model) -> None:
        """Keep a round instead of the one before; a run that is killed meanwhile starts from the first round again.

        Raises UsageError where it can't be written.
        """
        from safetensors.torch import save_file

        assert done.model.module is not None
        assert dense.module is not None
        final = self._directory / _NAME
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=self._directory, prefix=".partial-") as scratch:
                partial = Path(scratch) / _NAME
                partial.mkdir()
                save_model(done.model.module, dense.module, partial / _WEIGHTS)
                save_file({name: tensor.contiguous() for name, tensor in done.state.items()}, partial / _STATE)
                record = _Record(done.number, done.is_last, done.model.history)
                (partial / _RECORD).write_text(dumps(record), encoding="utf-8")
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
        except OSError as error:
            raise UsageError(f"can't be written: {error.strerror}", where=str(final)) from error
