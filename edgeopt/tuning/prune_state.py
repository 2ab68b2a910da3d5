"""Finished rounds of pruning on disk, so that an interrupted step goes on after the last one."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgeopt.compression.pruning.groups import Prunable
from edgeopt.compression.pruning.removal import chosen as chosen_units
from edgeopt.errors import ConversionError, UsageError
from edgeopt.json_data import dumps, from_plain, loads
from edgeopt.sources.structure import load_model, save_model
from edgeopt.types import Model, StepRecord

_WEIGHTS, _RECORD, _PLAN = "pruned.safetensors", "pruned.json", "plan.json"


@dataclass(frozen=True, slots=True)
class Round:
    """Where pruning stands.

    Attributes:
        number: finished rounds.
        model: after the last of them.
        cost: of it, as a share of the model's of before the step.
        widest: units of every group before the step.
        blocks: how many could go before the step.
        score_before: of the model before the step; None where nothing limits the loss.
        is_last: no further round will run.
    """

    number: int
    model: Model
    cost: float
    widest: Mapping[str, int]
    blocks: int = 0
    score_before: float | None = None
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class _Record:
    fingerprint: str
    weights_sha256: str
    number: int
    cost: float
    widest: Mapping[str, int]
    blocks: int
    score_before: float | None
    is_last: bool
    history: tuple[StepRecord, ...] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class ChosenPlan:
    """What a round has found to remove, and the cost without it. A plan of a measured cost is not found twice, and the
    training that follows belongs to this one.

    Attributes:
        fingerprint: of the run.
        number: of the round.
        plan: group -> units.
        cost: as a share of the model's of before the step.
    """

    fingerprint: str
    number: int
    plan: Mapping[str, tuple[int, ...]]
    cost: float


class RoundStore:
    """The last finished round of one step.

    Args:
        directory: of the step.
        original: the model before the step; what is kept is the difference to it.
        fingerprint: of all that decides the result. What another run left is dropped.
    """

    def __init__(self, directory: Path, original: Model, fingerprint: str) -> None:
        self._directory = directory
        self._original = original
        self._fingerprint = fingerprint

    def load(self) -> Round | None:
        """The last round; None, with all that is left of it deleted, where there is none that verifies."""
        try:
            return self._load()
        except (OSError, UsageError):
            for name in (_WEIGHTS, _RECORD):
                with suppress(OSError):
                    (self._directory / name).unlink(missing_ok=True)
            return None

    def plan(self, number: int, prunable: Prunable) -> ChosenPlan | None:
        """What this round has chosen before; None, with its training deleted, where that does not verify."""
        path = self._directory / _PLAN
        chosen: ChosenPlan | None = None
        # A ValueError is of units that are not there.
        with suppress(OSError, UsageError, ValueError):
            read = from_plain(ChosenPlan, loads(path.read_bytes(), str(path)), str(path))
            chosen_units(prunable, read.plan)
            chosen = read
        if chosen is not None and (chosen.fingerprint, chosen.number) == (self._fingerprint, number):
            return chosen
        shutil.rmtree(self.checkpoints(number), ignore_errors=True)
        return None

    def keep_plan(self, number: int, plan: Mapping[str, tuple[int, ...]], cost: float) -> None:
        """Keep what a round has chosen; it is on disk when this returns."""
        _write(self._directory / _PLAN, ChosenPlan(self._fingerprint, number, plan, cost))

    def checkpoints(self, number: int) -> Path:
        """Where the training of a round keeps its own state."""
        return self._directory / f"round-{number}"

    def save(self, done: Round) -> None:
        """Keep a round; it is on disk when this returns. A model that can't be described as data is not kept."""
        assert done.model.module is not None
        assert self._original.module is not None
        record = self._directory / _RECORD
        # Without its record, half of a new state is none.
        record.unlink(missing_ok=True)
        try:
            save_model(done.model.module, self._original.module, self._directory / _WEIGHTS)
        except ConversionError:
            return
        entry = _Record(
            self._fingerprint,
            self._digest(),
            done.number,
            done.cost,
            done.widest,
            done.blocks,
            done.score_before,
            done.is_last,
            done.model.history,
        )
        _write(record, entry)
        shutil.rmtree(self.checkpoints(done.number), ignore_errors=True)

    def _load(self) -> Round:
        where = str(self._directory)
        record = from_plain(_Record, loads((self._directory / _RECORD).read_bytes(), where), where)
        if record.fingerprint != self._fingerprint or record.weights_sha256 != self._digest():
            raise UsageError("belongs to another run", where=where)
        assert self._original.module is not None
        module = load_model(copy.deepcopy(self._original.module), self._directory / _WEIGHTS).eval()
        model = replace(self._original, module=module, native=None, history=record.history, input_ranges={})
        return Round(
            record.number, model, record.cost, record.widest, record.blocks, record.score_before, record.is_last
        )

    def _digest(self) -> str:
        return hashlib.sha256((self._directory / _WEIGHTS).read_bytes()).hexdigest()


def _write(path: Path, value: object) -> None:
    """Beside, and then renamed. Raises UsageError where that can't be written."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(dumps(value), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UsageError(
            f"can't be written: {(error.strerror or str(error)).lower()}",
            where=str(path.parent),
            fix="give another --cache-dir",
        ) from error
