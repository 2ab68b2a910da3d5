"""What the study runs: the recipe whole, and with steps left out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

from edgeopt.compression.steps import Distil, Prune, Qat, Sparsify, Step
from edgeopt.config import RunConfig
from edgeopt.config_keys import GATE_OF_KEY
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.training.config import TrainingConfig

StepName = Literal["distil", "prune", "sparsify", "qat"]
Curve = Literal["one-shot", "cubic"]

FLOAT, INT8 = "android-fp32", "android-int8-dynamic"
_KINDS: Mapping[StepName, type[Step]] = {"distil": Distil, "prune": Prune, "sparsify": Sparsify, "qat": Qat}
#: Shares of zeros on the curves.
SHARES = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of the recipe.

    Attributes:
        name: for `--only`, and of its files.
        title: for the report.
        steps: that it does, of those in the recipe; None is all.
        target: what is built.
        share: of weights that become zero, instead of the recipe's; of a point on a curve.
        curve: "one-shot" sets weights to zero and trains nothing; "cubic" is as in the recipe. None is on no curve.
    """

    name: str
    title: str
    steps: tuple[StepName, ...] | None
    target: str
    share: float | None = None
    curve: Curve | None = None


def entries() -> tuple[Entry, ...]:
    """All, in the order of the report; the first is the teacher itself, which the others are held against."""
    return (
        Entry("float", "Teacher, float", (), FLOAT),
        Entry("quantization", "Quantization alone", (), INT8),
        Entry("sparsity", "Unstructured pruning alone", ("sparsify",), FLOAT),
        Entry("structured", "Structured pruning alone", ("prune",), FLOAT),
        Entry("distillation", "Distillation alone", ("distil",), FLOAT),
        Entry("distillation-pruning", "Distillation, structured pruning", ("distil", "prune"), FLOAT),
        Entry("distillation-prunings", "Distillation, both prunings", ("distil", "prune", "sparsify"), FLOAT),
        Entry("distillation-quantization", "Distillation and quantization", ("distil",), INT8),
        Entry("distillation-qat", "Distillation and QAT", ("distil", "qat"), INT8),
        Entry("all", "All: distillation, both prunings, QAT", None, INT8),
        Entry("float-onnx", "Teacher, float, ONNX Runtime", (), "android-onnx-fp32"),
        Entry("sparsity-onnx", "Unstructured pruning, ONNX Runtime", ("sparsify",), "android-onnx-fp32"),
        Entry("all-onnx", "All, ONNX Runtime", None, "android-onnx-int8-dynamic"),
        Entry("float-executorch", "Teacher, float, ExecuTorch", (), "android-executorch-fp32"),
        Entry("sparsity-executorch", "Unstructured pruning, ExecuTorch", ("sparsify",), "android-executorch-fp32"),
        Entry("all-executorch", "All, ExecuTorch", None, "android-executorch-int8-dynamic"),
        *_curves(),
    )


def _curves() -> Iterator[Entry]:
    how: Mapping[Curve, str] = {"one-shot": "at once, untrained", "cubic": "cubic schedule, trained"}
    for curve, told in how.items():
        for share in SHARES:
            name = f"sparsity-{share:.0%}-{curve}".replace("%", "")
            yield Entry(name, f"{share:.0%} zeros, {told}", ("sparsify",), FLOAT, share, curve)


def config_of_entry(recipe: RunConfig, entry: Entry) -> RunConfig:
    """The recipe with just that entry's steps, for its target.

    Limits hold for the whole recipe only: a part of it is there to see what it does. Finished steps are shared.

    Raises ConfigError where the recipe lacks a step.
    """
    steps = recipe.step
    if entry.steps is not None:
        steps = tuple(step for kind in entry.steps for step in _steps(recipe, kind, entry))
    config = replace(
        recipe,
        step=steps,
        target=(entry.target,),
        output_dir=recipe.output_dir / "bundles" / entry.name,
        cache_dir=recipe.cache_dir or recipe.output_dir / ".steps",
    )
    if entry.curve == "one-shot" or not steps:
        config = replace(config, train=None, validation=None)
    return config if entry.name == "all" else without_gates(config)


def without_gates(config: RunConfig) -> RunConfig:
    return replace(config, gates_off=frozenset(GATE_OF_KEY.values()))


def brief(config: RunConfig) -> RunConfig:
    """The recipe as short as it can be, for trying out that everything runs; what comes out is worth nothing."""
    steps = tuple(_brief_step(step) for step in config.step)
    return replace(without_gates(config), step=steps, num_calibration_samples=8, num_evaluation_samples=8)


def _brief_step(step: Step) -> Step:
    training = _short(step.training)
    match step:
        case Distil():
            # The teacher that goes with it has one layer.
            features = ("model.encoder.layers.0",) if step.teaching.features else ()
            return replace(step, training=training, teaching=replace(step.teaching, features=features))
        case Prune() | Sparsify():
            return replace(step, training=training, schedule="one-shot")
    return replace(step, training=training)


def _short(training: TrainingConfig) -> TrainingConfig:
    return replace(training, epochs=1, mixed_precision="no")


def _steps(recipe: RunConfig, kind: StepName, entry: Entry) -> tuple[Step, ...]:
    """The recipe's steps of that kind, in their order."""
    found = [step for step in recipe.step if isinstance(step, _KINDS[kind])]
    if not found:
        raise ConfigError(f"has no step {kind!r}, which {entry.name!r} is about", where="the recipe")
    share = entry.share
    return tuple(
        replace(step, to=share) if isinstance(step, Sparsify) and share is not None else step for step in found
    )


def key_of(config: RunConfig, inputs_sha256: str) -> str:
    """Names the result of such a run: 16 hexadecimal digits that change with all that decides it.

    Args:
        inputs_sha256: of the teacher, the data and the code beside the recipe.
    """
    ours = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _ELSEWHERE}
    plain = _plain(ours, f"{config.config_dir}{os.sep}")
    text = repr([plain, config.train is not None, inputs_sha256, sorted(tool_versions().items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tool_versions() -> dict[str, str]:
    """What makes and runs the files."""
    found = {}
    for name in _TOOLS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


_TOOLS = (
    "edgeopt", "torch", "transformers", "tokenizers", "litert-torch", "ai-edge-quantizer", "ai-edge-litert", "onnx",
    "onnxruntime", "executorch", "sacrebleu", "rouge-score",
)  # fmt: skip
#: Where things lie decides nothing.
_ELSEWHERE = frozenset({
    "model", "train", "validation", "calibration", "evaluation", "output_dir", "cache_dir", "save_weights",
    "config_dir",
})  # fmt: skip


def _plain(value: object, folder: str) -> object:
    """Nested lists and texts; paths are told from that folder on."""
    if is_dataclass(value) and not isinstance(value, type):
        kept = {field.name: _plain(getattr(value, field.name), folder) for field in fields(value)}
        return [type(value).__name__, kept]
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key], folder) for key in sorted(value)}
    if isinstance(value, frozenset | set):
        return sorted(map(str, value))
    if isinstance(value, tuple | list):
        return [_plain(item, folder) for item in value]
    return str(value).removeprefix(folder)
