"""The model as it came in, as a session: what every exported file goes back to."""

from __future__ import annotations

from collections.abc import Callable

from edgeopt.runtimes import load_runtime
from edgeopt.runtimes.base import Session
from edgeopt.runtimes.pytorch import open_source, own_terms
from edgeopt.types import Model, Signature


def open_reference(model: Model, threads: int) -> Callable[[], Session] | None:
    """What opens the source model; None where it can't be run without a package of its own (TensorFlow)."""
    if model.module is not None:
        return lambda: open_source(model, threads)
    if model.native is not None and model.native.kind == "onnx":
        path, signature = model.native.path, Signature(own_terms(model.inputs), own_terms(model.outputs))
        return lambda: load_runtime("onnxruntime").open(path, signature, threads)
    return None
