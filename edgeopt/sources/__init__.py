"""A trained model in: which kind of source a string names, and the module that reads that kind."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Protocol

from edgeopt.errors import ConversionError, UsageError
from edgeopt.sources.base import ModelSpec, SourceOptions
from edgeopt.sources.signature import parse_input
from edgeopt.types import Model

__all__ = ["KINDS", "ModelSpec", "SourceOptions", "as_torch", "load_model", "parse_input"]

#: What the source string looks like -> module that reads it; the first match wins.
KINDS: tuple[tuple[str, str], ...] = (
    (r"hf:.+", "edgeopt.sources.huggingface"),
    (r".+\.py:[A-Za-z_][\w.]*", "edgeopt.sources.factory"),
    (r".+\.pt2", "edgeopt.sources.exported_program"),
    (r".+\.onnx", "edgeopt.sources.onnx_file"),
    (r".+\.(keras|h5)", "edgeopt.sources.keras_file"),
    (r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", "edgeopt.sources.factory"),
)

WAYS = "file.py:factory, package.module:factory, FILE.pt2, FILE.onnx, hf:DIR, FILE.keras or a SavedModel directory"


class Loader(Protocol):
    def load(self, source: str, options: SourceOptions) -> Model: ...


def load_model(source: str | ModelSpec, options: SourceOptions) -> Model:
    """Load a trained model: what the string names, or what a Python program holds in memory.

    Raises:
        UsageError: the source, its weights or the declared inputs are wrong.
        MissingError: a package that this kind of source needs is not installed, or the hub can't be reached.
    """
    if isinstance(source, ModelSpec):
        from edgeopt.sources.spec import load_spec

        return load_spec(source, options)
    module_path = _loader_for(source)
    if options.weights is not None and module_path != "edgeopt.sources.factory":
        raise UsageError("--weights goes with a Python factory; this source holds its own weights", where=source)
    if options.task is not None and module_path != "edgeopt.sources.huggingface":
        raise UsageError("--task goes with hf: sources", where=source)
    loader: Loader = import_module(module_path)
    return loader.load(source, options)


def as_torch(model: Model) -> Model:
    """The same model with a torch module, for exporters that start from torch.

    A model that has one is returned as it is. An ONNX graph is rebuilt as a module and checked against ONNX Runtime.

    Raises:
        ConversionError: the graph holds an operator that can't be rebuilt (operator and node are named), or the
            model is a Keras or TensorFlow one.
    """
    if model.module is not None or model.native is None:
        return model
    if model.native.kind != "onnx":
        raise ConversionError(
            f"a {model.native.kind} model goes straight to TFLite targets only",
            where=model.name,
            fix="choose a LiteRT target such as android-int8, or give the model as PyTorch or ONNX",
        )
    from edgeopt.sources.onnx_torch import convert

    return convert(model, model.native)


def _loader_for(source: str) -> str:
    path = Path(source)
    if source and path.is_dir():
        if (path / "saved_model.pb").is_file():
            return "edgeopt.sources.keras_file"
        if (path / "config.json").is_file():
            raise UsageError("is a Hugging Face directory", where=source, fix=f"write hf:{source}")
        raise UsageError("is a directory without a model", where=source, fix=f"give {WAYS}")
    for pattern, module_path in KINDS:
        if re.fullmatch(pattern, source, re.DOTALL):  # a file's name may hold a newline
            return module_path
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt"):
        raise UsageError(
            "holds weights without the model's code", where=source, fix=f"give file.py:factory --weights {source}"
        )
    if path.suffix == ".py":
        raise UsageError("lacks the factory's name", where=source, fix=f"write {source}:FACTORY")
    raise UsageError("is no model source that edgeopt knows", where=source, fix=f"give {WAYS}")
