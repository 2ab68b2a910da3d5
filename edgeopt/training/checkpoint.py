"""Checkpoints that a killed run continues from: whole or not there at all, and read without running what is in them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

_NAME = re.compile(r"epoch-(\d+)")
_STATE, _TENSORS = "training.json", "training.safetensors"


@dataclass(frozen=True, slots=True)
class LoopState:
    """Where the loop stands between two epochs.

    Attributes:
        epoch: how many are done. step: how many optimizer steps.
        best_epoch, best_score: of the best state so far; None without validation data.
        fingerprint: of everything that decides the result; a checkpoint of another run has another.
    """

    epoch: int
    step: int
    best_epoch: int | None
    best_score: float | None
    fingerprint: str


class Checkpoints:
    """A folder with the last finished epoch.

    Args:
        directory: made when needed.
        resume: continue from what is there; otherwise it must hold no checkpoint.

    Raises:
        UsageError: there is a checkpoint already, and `resume` is off.
    """

    def __init__(self, directory: Path, *, resume: bool) -> None:
        self._directory = directory
        self._resume = resume
        if not resume and self._latest() is not None:
            raise UsageError(
                "holds a checkpoint of an earlier run",
                where=str(directory),
                fix="continue it (resume), or give another folder",
            )

    def save(self, accelerator: Accelerator, state: LoopState, tensors: Mapping[str, Tensor]) -> None:
        """Write beside, then rename; earlier checkpoints are removed last. Every process calls it."""
        from safetensors.torch import save_file

        final = self._directory / f"epoch-{state.epoch:04d}"
        partial = self._directory / f".{final.name}.partial"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial), safe_serialization=True)
        accelerator.wait_for_everyone()  # each process writes its random state, which must be there before the rename
        if accelerator.is_main_process:
            # safetensors refuses tensors that share memory.
            copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(copies, partial / _TENSORS)
            (partial / _STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self._directory.iterdir():
                if _NAME.fullmatch(old.name) and old != final:
                    shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()

    def restore(self, accelerator: Accelerator, fingerprint: str) -> tuple[LoopState, dict[str, Tensor]] | None:
        """Load the last finished epoch into what `accelerator` has prepared; None where there is none.

        Raises:
            UsageError: the checkpoint can't be read, or belongs to another run.
        """
        from safetensors.torch import load_file

        latest = self._latest() if self._resume else None
        if latest is None:
            return None
        where = str(latest)
        fix = "remove it, and training starts over"
        try:
            document = json.loads((latest / _STATE).read_text(encoding="utf-8"))
            state = LoopState(**document)
            if state.fingerprint != fingerprint:
                raise UsageError("belongs to a run with another model, data or settings", where=where, fix=fix)
            tensors = load_file(latest / _TENSORS)
            # Objects registered for checkpointing would be unpickled without a check; we register none.
            if not (latest / "model.safetensors").is_file():
                raise UsageError("holds no weights", where=where, fix=fix)
            accelerator.load_state(str(latest), load_kwargs={"weights_only": True})
        except UsageError:
            raise
        except Exception as error:  # safetensors, torch and accelerate each raise their own.
            raise UsageError(f"is no checkpoint that can be read: {error}", where=where, fix=fix) from error
        return state, tensors

    def _latest(self) -> Path | None:
        if not self._directory.is_dir():
            return None
        found = [path for path in self._directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)
