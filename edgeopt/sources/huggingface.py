"""`hf:DIR` and `hf:OWNER/NAME`: a Hugging Face model from config.json and safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import MissingError, UsageError
from edgeopt.sources.adapter import forward_parameters
from edgeopt.sources.base import SourceOptions
from edgeopt.sources.build import build, freeze, override
from edgeopt.sources.digest import sha256_of
from edgeopt.sources.huggingface_preprocessing import preprocessing_for
from edgeopt.sources.signature import synthesize
from edgeopt.types import Array, Model, StepRecord, TensorSpec

if TYPE_CHECKING:
    import torch

#: Task -> transformers class that loads it.
TASKS: dict[str, str] = {
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForCTC",
    "depth-estimation": "AutoModelForDepthEstimation",
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "image-feature-extraction": "AutoModel",
    "image-segmentation": "AutoModelForSemanticSegmentation",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "token-classification": "AutoModelForTokenClassification",
}

#: End of an architecture's name in config.json -> task.
ARCHITECTURES: tuple[tuple[str, str], ...] = (
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForMaskedLM", "fill-mask"),
    ("ForPreTraining", "feature-extraction"),
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForImageClassification", "image-classification"),
    ("ForSemanticSegmentation", "image-segmentation"),
    ("ForDepthEstimation", "depth-estimation"),
    ("ForAudioClassification", "audio-classification"),
    ("ForCTC", "automatic-speech-recognition"),
    ("Model", "feature-extraction"),
)

LABELLED = ("text-classification", "image-classification", "audio-classification", "token-classification")

#: Default length of a text, in tokens, where neither the user nor the model says less.
TEXT_LENGTH = 128

#: One second of speech at the usual rate.
WAVEFORM_LENGTH = 16_000

#: What is fetched from the hub: no pickled weights, no Python.
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


def load(source: str, options: SourceOptions) -> Model:
    """Load a directory, or an id through the hub's cache.

    Raises UsageError for a directory that lacks files or weights that the task needs, MissingError when transformers
    is absent or the hub can't be reached. Never runs code that comes with a model.
    """
    if find_spec("transformers") is None:
        raise MissingError.extra("transformers", "hf", "a Hugging Face source")
    location = source.removeprefix("hf:")
    directory = Path(location) if Path(location).is_dir() else _download(location)
    config = _read_config(directory)
    task = options.task or _task_of(config, directory)
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}", where=source, fix=f"use one of {', '.join(sorted(TASKS))}")
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise UsageError(
            "holds no .safetensors weights, and edgeopt reads no pickled ones",
            where=str(directory),
            fix="convert it: model.save_pretrained(DIR)",
        )
    module = _encoder(_from_pretrained(directory, task), task, directory)
    freeze(module)
    found = _inputs(module, directory)
    inputs = override(found, options.inputs, source)
    labels = _labels(config) if task in LABELLED else ()
    return build(
        module,
        options,
        name=location.rstrip("/").rpartition("/")[2],
        inputs=inputs,
        examples=_examples(module, inputs),
        output_names=None,
        preprocessing=preprocessing_for(directory, inputs),
        labels=labels,
        record=StepRecord("load", {"source": "hugging-face", "class": type(module).__name__, "task": task}),
        sha256=sha256_of([directory / "config.json", *weights]),
    )


def _download(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "/")):
        raise UsageError("no such directory", where=name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"]))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(
            "is neither a directory nor a model on the hub that you may read",
            where=name,
            fix="check the name, or log in with `hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise MissingError(
            "is not in the local cache and the Hugging Face hub can't be reached",
            where=f"hf:{name}",
            fix=f"download it on a connected machine (hf download {name} --local-dir DIR) and give hf:DIR",
        ) from error


def _read_config(directory: Path) -> Mapping[str, object]:
    path = directory / "config.json"
    if not path.is_file():
        raise UsageError("has no config.json", where=str(directory), fix="give a directory of save_pretrained")
    try:
        config: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError("is not JSON", where=str(path)) from error
    if not isinstance(config, dict):
        raise UsageError("is not a model's configuration", where=str(path))
    if "auto_map" in config:
        raise UsageError(
            "needs Python code of its own, which edgeopt does not run",
            where=str(path),
            fix="build the model in a file.py:factory of yours",
        )
    return config


def _task_of(config: Mapping[str, object], directory: Path) -> str:
    architectures = config.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    for name in names:
        for ending, task in ARCHITECTURES:
            if name.endswith(ending):
                # Speech models call their classifiers ForSequenceClassification too.
                return "audio-classification" if name in _audio_classifiers() else task
    raise UsageError(
        f"the architecture {names[0]!r} tells no task" if names else "config.json names no architecture",
        where=str(directory),
        fix=f"give --task, one of {', '.join(sorted(TASKS))}",
    )


def _audio_classifiers() -> frozenset[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES

    return frozenset(MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values())


def _from_pretrained(directory: Path, task: str) -> torch.nn.Module:
    module, missing = _try_loading(directory, task, {})
    if missing and all("pooler" in key for key in missing):
        # Checkpoints of masked language models have no pooler; made up weights would be an output of noise.
        module, missing = _try_loading(directory, task, {"add_pooling_layer": False})
    if missing:
        raise UsageError(
            f"has no weights for {', '.join(missing[:3])}, which the task {task!r} needs",
            where=str(directory),
            fix="choose the --task that it was trained for",
        )
    return module


def _try_loading(directory: Path, task: str, arguments: dict[str, bool]) -> tuple[torch.nn.Module, list[str]]:
    import torch
    import transformers

    try:
        module, info = getattr(transformers, TASKS[task]).from_pretrained(
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
            f"transformers can't load it as {TASKS[task]}: {reason[0] if reason else type(error).__name__}",
            where=str(directory),
        ) from error
    module.config.use_cache = False
    module.config.return_dict = True
    return module, sorted(info["missing_keys"])


def _encoder(module: torch.nn.Module, task: str, directory: Path) -> torch.nn.Module:
    """The encoder of an encoder-decoder for feature extraction; other uses of one are loops, not one graph."""
    if not _config_value(module, "is_encoder_decoder", False):
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


def _inputs(module: torch.nn.Module, directory: Path) -> tuple[TensorSpec, ...]:
    parameters, _ = forward_parameters(module)
    preprocessor = directory / "preprocessor_config.json"
    settings: object = json.loads(preprocessor.read_text(encoding="utf-8")) if preprocessor.is_file() else {}
    settings = settings if isinstance(settings, dict) else {}
    main = str(getattr(module, "main_input_name", "input_ids"))
    if main not in parameters:
        main = next((name for name in ("input_ids", "pixel_values", "input_values") if name in parameters), main)
    match main:
        case "input_ids":
            return _text_inputs(module, directory, parameters)
        case "pixel_values":
            return (TensorSpec("pixel_values", (1, *_image_size(module, settings)), "float32", "NCHW"),)
        case "input_values" | "input_features":
            return (TensorSpec(main, (1, *_audio_size(module, settings, main)), "float32"),)
        case _:
            raise UsageError(
                f"takes {main!r}, which edgeopt can't declare by itself",
                where=str(directory),
                fix="build the model in a file.py:factory of yours",
            )


def _text_inputs(module: torch.nn.Module, directory: Path, parameters: list[str]) -> tuple[TensorSpec, ...]:
    limit = _config_value(module, "max_position_embeddings", TEXT_LENGTH)
    # RoBERTa's positions start behind the padding index.
    reserved = _config_value(module, "pad_token_id", 0) + 1 if _is_offset(module) else 0
    length = min(TEXT_LENGTH, limit - reserved) if limit > reserved else TEXT_LENGTH
    names = ["input_ids", "attention_mask"]
    takes_types = _config_value(module, "type_vocab_size", 0) > 1
    if takes_types and _tokenizer_gives_types(directory):
        names.append("token_type_ids")
    return tuple(TensorSpec(name, (1, length), "int64") for name in names if name in parameters)


def _is_offset(module: torch.nn.Module) -> bool:
    return str(getattr(getattr(module, "config", None), "model_type", "")) in (
        "camembert", "data2vec-text", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl",
    )  # fmt: skip


def _tokenizer_gives_types(directory: Path) -> bool:
    path = directory / "tokenizer_config.json"
    settings: object = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = settings.get("model_input_names") if isinstance(settings, dict) else None
    return not isinstance(names, list) or "token_type_ids" in names


def _image_size(module: torch.nn.Module, settings: Mapping[str, object]) -> tuple[int, int, int]:
    channels = _config_value(module, "num_channels", 3)
    for key in ("crop_size", "size"):
        size = settings.get(key)
        if key == "crop_size" and not settings.get("do_center_crop", False):
            continue
        if isinstance(size, int):
            return channels, size, size
        if isinstance(size, dict) and "height" in size and "width" in size:
            return channels, int(size["height"]), int(size["width"])
        if isinstance(size, dict) and "shortest_edge" in size:
            return channels, int(size["shortest_edge"]), int(size["shortest_edge"])
    configured = getattr(getattr(module, "config", None), "image_size", 224)
    if isinstance(configured, list | tuple):
        return channels, int(configured[0]), int(configured[1])
    return channels, int(configured), int(configured)


def _audio_size(module: torch.nn.Module, settings: Mapping[str, object], name: str) -> tuple[int, ...]:
    bins = settings.get("feature_size", settings.get("num_mel_bins"))
    if name == "input_features":
        frames = settings.get("nb_max_frames", 2 * _config_value(module, "max_source_positions", 1500))
        mels = _config_value(module, "num_mel_bins", bins if isinstance(bins, int) else 80)
        return mels, frames if isinstance(frames, int) else 3000
    frames = settings.get("max_length", _config_value(module, "max_length", 0))
    mels = _config_value(module, "num_mel_bins", 0)
    if mels and isinstance(frames, int) and frames:
        return frames, mels
    return (WAVEFORM_LENGTH,)


def _config_value(module: torch.nn.Module, key: str, default: int) -> int:
    value = getattr(getattr(module, "config", None), key, default)
    return value if isinstance(value, int) else default


def _examples(module: torch.nn.Module, inputs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """Synthesised, with token ids from the whole vocabulary."""
    examples = synthesize(inputs)
    vocabulary = _config_value(module, "vocab_size", 1)
    for spec in inputs:
        if spec.name == "input_ids":
            ids = np.random.default_rng(0).integers(0, vocabulary, examples[spec.name].shape)
            examples[spec.name] = np.asarray(ids, dtype=spec.dtype)
    return examples


def _labels(config: Mapping[str, object]) -> tuple[str, ...]:
    """id2label in order of id; () for the placeholders LABEL_0, LABEL_1..."""
    names = config.get("id2label")
    if not isinstance(names, dict) or not all(str(key).isdecimal() for key in names):
        return ()
    labels = tuple(str(names[key]) for key in sorted(names, key=lambda key: int(str(key))))
    return () if all(re.fullmatch(r"LABEL_\d+", label) for label in labels) else labels
