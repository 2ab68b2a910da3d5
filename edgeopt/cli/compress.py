"""`edgeopt prune`, `sparsify`, `factorize`, `distil` and `qat`: one step of a recipe, then export and proof."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from edgeopt.cli.console import JsonFlag
from edgeopt.cli.export import build_and_show
from edgeopt.cli.flags import ConfigFlag, Given, keys, with_flags
from edgeopt.errors import UsageError
from edgeopt.step_keys import STEP_KEYS, step_from_flags

#: The keys of edgeopt.toml that matter most here; the others are taken from the file.
_FLAGS = (
    "model", "example", "weights", "name", "input", "task", "target", "device", "train", "validation", "calibration",
    "num_calibration_samples", "evaluation", "num_evaluation_samples", "preprocessing", "metric", "seed", "estimator",
    "percentile", "keep_float", "max_accuracy_drop", "min_agreement", "min_speedup", "threads", "output_dir",
    "save_weights", "cache_dir",
)  # fmt: skip
#: The step's key that holds several values, beside those whose kind of value says so.
_LISTS = ("remove",)
#: Per command, with what is special to it first.
_shown = {kind: (*(known.key for known in STEP_KEYS[kind]), *keys(*_FLAGS)) for kind in STEP_KEYS}


@with_flags(_shown["prune"], _LISTS)
def prune(context: typer.Context, given: Given, config: ConfigFlag = None, json: JsonFlag = False) -> None:
    """Remove channels, attention heads or blocks until the exported file is as small or as fast as wanted.

    Example: edgeopt prune net.py:build --train pictures/train --validation pictures/val --prune-to latency=0.6x

    Rounds of pruning and training; an interrupted run goes on where it was when it is started again.
    """
    _run(context, "prune", given, config, json)


@with_flags(_shown["sparsify"], _LISTS)
def sparsify(context: typer.Context, given: Given, config: ConfigFlag = None, json: JsonFlag = False) -> None:
    """Set weights to zero, which saves storage, and time where the runtime has kernels for it.

    Example: edgeopt sparsify net.py:build --train pictures/train --sparsity 60%
    """
    _run(context, "sparsify", given, config, json)


@with_flags(_shown["factorize"], _LISTS)
def factorize(context: typer.Context, given: Given, config: ConfigFlag = None, json: JsonFlag = False) -> None:
    """Split large layers into two thin ones (low-rank factorization).

    Example: edgeopt factorize net.py:build --calibration pictures/train --factorize-to macs=0.7x
    """
    _run(context, "factorize", given, config, json)


@with_flags(_shown["distil"], _LISTS)
def distil(context: typer.Context, given: Given, config: ConfigFlag = None, json: JsonFlag = False) -> None:
    """Train the model, or a smaller one made from it, to answer as its teacher does. Needs no labels.

    Example: edgeopt distil small.py:build --teacher big.py:build --teacher-weights big.safetensors --train pictures
    """
    _run(context, "distil", given, config, json)


@with_flags(_shown["qat"], _LISTS)
def qat(context: typer.Context, given: Given, config: ConfigFlag = None, json: JsonFlag = False) -> None:
    """Fine-tune a model with the arithmetic of the int8 file, then export and prove it as 'edgeopt export' does.

    Example: edgeopt qat net.py:build --train pictures/train --validation pictures/val --target android-int8

    For several GPUs or machines start it with 'accelerate launch -m edgeopt qat ...'.
    """
    _run(context, "qat", given, config, json)


def _run(context: typer.Context, kind: str, given: Given, config: Path | None, json: bool) -> None:
    from edgeopt.config import load_config

    step = step_from_flags(kind, given)
    settings = load_config(config, {name: given[name] for name in _FLAGS})
    if settings.model is None and settings.example is None:
        raise UsageError(f"no model to {kind}", fix=f"give one (edgeopt {kind} net.py:build), or --example digits")
    build_and_show(context, replace(settings, step=(step,)), json)
