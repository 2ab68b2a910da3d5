"""`hf:DIR` and `hf:OWNER/NAME`: a Hugging Face model from config.json and safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import MissingError, UsageError
from edgeopt.sources.base import SourceOptions
from edgeopt.sources.build import build, freeze, override
from edgeopt.sources.digest import sha256_of
from edgeopt.sources.huggingface_files import check_task, class_for, directory_of, read_config, task_of
from edgeopt.sources.huggingface_generation import writes, writing_model
from edgeopt.sources.huggingface_inputs import config_value, examples_of, inputs_of
from edgeopt.sources.huggingface_preprocessing import preprocessing_for
from edgeopt.types import Model, StepRecord

if TYPE_CHECKING:
    import torch

LABELLED = ("text-classification", "image-classification", "audio-classification", "token-classification")


def load(source: str, options: SourceOptions) -> Model:
    """Load a directory, or an id through the hub's cache.

    Raises UsageError for a directory that lacks files or weights that the task needs, ConversionError for a network
    that writes in a way that can't be exported, MissingError when transformers is absent or the hub can't be reached.
    Never runs code that comes with a model.
    """
    if find_spec("transformers") is None:
        raise MissingError.extra("transformers", "hf", "a Hugging Face source")
    location = source.removeprefix("hf:")
    directory = directory_of(location)
    config = read_config(directory)
    task = options.task or task_of(config, directory)
    check_task(task, source)
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise UsageError(
            "holds no .safetensors weights, and edgeopt reads no pickled ones",
            where=str(directory),
            fix="convert it: model.save_pretrained(DIR)",
        )
    module = _from_pretrained(directory, task, class_for(task, config))
    files = [directory / "config.json", *weights]
    name = location.rstrip("/").rpartition("/")[2]
    if writes(module, task):
        freeze(module)
        settings = directory / "generation_config.json"
        return writing_model(
            module,
            options,
            task=task,
            directory=directory,
            where=source,
            name=name,
            record=_record(module, task),
            # What it begins and ends with is said there.
            sha256=sha256_of([*files, settings] if settings.is_file() else files),
        )
    _check_lengths(options, source)
    module = _encoder(module, task, directory)
    freeze(module)
    inputs = override(inputs_of(module, directory), options.inputs, source)
    return build(
        module,
        options,
        name=name,
        inputs=inputs,
        examples=examples_of(module, inputs),
        output_names=None,
        preprocessing=preprocessing_for(directory, inputs),
        labels=_labels(config) if task in LABELLED else (),
        record=_record(module, task),
        sha256=sha256_of(files),
    )


def _record(module: torch.nn.Module, task: str) -> StepRecord:
    return StepRecord("load", {"source": "hugging-face", "class": type(module).__name__, "task": task})


def _check_lengths(options: SourceOptions, source: str) -> None:
    for flag, value in (
        ("--max-source-length", options.max_source_length),
        ("--max-target-length", options.max_target_length),
    ):
        if value is not None:
            raise UsageError(f"{flag} goes with a network that writes", where=source, fix="give its length by --input")


def _from_pretrained(directory: Path, task: str, class_name: str) -> torch.nn.Module:
    module, missing = _try_loading(directory, class_name, {})
    if missing and all("pooler" in key for key in missing):
        # Checkpoints of masked language models have no pooler; made up weights would be an output of noise.
        module, missing = _try_loading(directory, class_name, {"add_pooling_layer": False})
    if missing:
        raise UsageError(
            f"has no weights for {', '.join(missing[:3])}, which the task {task!r} needs",
            where=str(directory),
            fix="choose the --task that it was trained for",
        )
    return module


def _try_loading(directory: Path, class_name: str, arguments: dict[str, bool]) -> tuple[torch.nn.Module, list[str]]:
    import torch
    import transformers

    try:
        module, info = getattr(transformers, class_name).from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            # The other implementations pick kernels by what the machine has; this one is made of plain operators.
            attn_implementation="eager",
            output_loading_info=True,
            **arguments,
        )
    except Exception as error:
        # transformers raises whatever the model's code raises.
        reason = str(error).strip().splitlines()
        raise UsageError(
            f"transformers can't load it as {class_name}: {reason[0] if reason else type(error).__name__}",
            where=str(directory),
        ) from error
    module.config.use_cache = False
    module.config.return_dict = True
    return module, sorted(info["missing_keys"])


def _encoder(module: torch.nn.Module, task: str, directory: Path) -> torch.nn.Module:
    """The encoder of an encoder-decoder for feature extraction; other uses of one are loops, not one graph."""
    if not config_value(module, "is_encoder_decoder", False):
        return module
    get_encoder = getattr(module, "get_encoder", None)
    if task != "feature-extraction" or get_encoder is None:
        raise UsageError(
            f"is an encoder-decoder, which the task {task!r} runs in a loop",
            where=str(directory),
            fix="use --task feature-extraction for its encoder",
        )
    encoder: torch.nn.Module = get_encoder()
    return encoder


def _labels(config: Mapping[str, object]) -> tuple[str, ...]:
    """id2label in order of id; () for the placeholders LABEL_0, LABEL_1..."""
    names = config.get("id2label")
    if not isinstance(names, dict) or not all(str(key).isdecimal() for key in names):
        return ()
    labels = tuple(str(names[key]) for key in sorted(names, key=lambda key: int(str(key))))
    return () if all(re.fullmatch(r"LABEL_\d+", label) for label in labels) else labels
