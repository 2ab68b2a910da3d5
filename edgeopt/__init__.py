"""One command from a trained PyTorch model to a phone: compressed, exported, and proven on the exported file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeopt.progress import Progress
    from edgeopt.types import Bundle

__all__ = ["export"]


def export(
    model: str | None = None, *, target: str = "android-int8", progress: Progress | None = None, **options: object
) -> Bundle:
    """Build and prove one bundle: `edgeopt export` as a function.

    Args:
        model: what the command line takes: "file.py:factory", "package.module:factory", "model.onnx", "hf:DIR"...
        target: a target's name, or the path of one's TOML file.
        progress: told about every step; silent by default.
        options: the command line's flags with underscores, e.g. `calibration="photos/"`, `max_accuracy_drop=0.005`.
            No edgeopt.toml is read.

    Returns the bundle, also when a gate was missed: look at `bundle.passed`.

    Raises EdgeoptError: see `edgeopt.errors`.
    """
    from edgeopt.config import config_of
    from edgeopt.pipeline import export as run

    return run(config_of({**options, "model": model, "target": [target]}), progress)[0]
