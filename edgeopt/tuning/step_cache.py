"""Finished steps on disk, so that none is done twice: found by the content of everything they depend on."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeopt.compression.base import state_digest
from edgeopt.errors import UsageError
from edgeopt.json_data import dumps, from_plain, loads
from edgeopt.sources.structure_file import load_model, save_model
from edgeopt.types import Model, StepRecord

#: What computes, and what makes and runs the files that steps measure.
_TOOLS = (
    "torch", "torch-pruning", "accelerate", "safetensors", "numpy", "transformers", "litert-torch", "ai-edge-quantizer",
    "ai-edge-litert", "onnx", "onnxruntime", "executorch", "torchao",
)  # fmt: skip
_WEIGHTS, _RECORD = "model.safetensors", "record.json"


@dataclass(frozen=True, slots=True)
class _Record:
    """Beside the weights: what they are, and what else a step changes in a model."""

    weights_sha256: str
    history: tuple[StepRecord, ...]
    input_ranges: Mapping[str, tuple[float, float]]


class StepCache:
    """One folder per finished step, named after its key, and one for the state of an unfinished one.

    What a step makes is kept as weights, and as its difference in structure from a base: the model as it was loaded, or
    the student that took its place.

    Args:
        directory: made when something is kept.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def state(self, key: str) -> Path:
        """Where an unfinished step keeps what it needs to go on; exists. Raises UsageError where it can't be made."""
        path = self._directory / f"{key}.unfinished"
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_writable(error) from error
        return path

    def load(self, key: str, base: Model) -> Model | None:
        """What the step made, or None where it was never finished or what is kept does not verify."""
        import copy

        folder = self._directory / key
        assert base.module is not None
        try:
            text = (folder / _RECORD).read_bytes()
            record = from_plain(_Record, loads(text, str(folder)), str(folder))
            if hashlib.sha256((folder / _WEIGHTS).read_bytes()).hexdigest() != record.weights_sha256:
                return None
            module = load_model(copy.deepcopy(base.module), folder / _WEIGHTS)
        except (OSError, UsageError):
            return None
        return replace(
            base, module=module.eval(), native=None, history=record.history, input_ranges=record.input_ranges
        )

    def save(self, key: str, model: Model, base: Model) -> None:
        """Keep what the step made, and drop its unfinished state.

        Raises:
            UsageError: the folder can't be written.
            ConversionError: the model's structure can't be described.
        """
        assert model.module is not None
        assert base.module is not None
        final = self._directory / key
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=self._directory, prefix=".partial-") as scratch:
                partial = Path(scratch) / key
                partial.mkdir()
                save_model(model.module, base.module, partial / _WEIGHTS)
                digest = hashlib.sha256((partial / _WEIGHTS).read_bytes()).hexdigest()
                record = _Record(digest, model.history, model.input_ranges)
                (partial / _RECORD).write_text(dumps(record), encoding="utf-8")
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
        except OSError as error:
            raise self._not_writable(error) from error
        shutil.rmtree(self._directory / f"{key}.unfinished", ignore_errors=True)

    def _not_writable(self, error: OSError) -> UsageError:
        return UsageError(
            f"can't be written: {(error.strerror or str(error)).lower()}",
            where=str(self._directory),
            fix="give another --cache-dir",
        )


def key_of(model: Model, parts: Iterable[object]) -> str:
    """Name of a step's result.

    Args:
        model: what the step is given.
        parts: all else that decides its result, as values whose `repr` tells them apart.
    """
    assert model.module is not None
    digest = hashlib.sha256()
    for part in (state_digest(model.module), model.source_sha256, dumps(model.history), *map(repr, parts), *_code()):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:32]


@cache
def _code() -> tuple[str, ...]:
    """Versions of tools, and a digest of our own code: a change of either makes everything anew."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return (*(f"{name} {_version(name)}" for name in _TOOLS), digest.hexdigest())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
