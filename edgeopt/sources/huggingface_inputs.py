"""What a Hugging Face model takes: names and shapes, from its forward, its configuration and its preprocessor's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import UsageError
from edgeopt.sources.adapter import forward_parameters
from edgeopt.sources.signature import synthesize
from edgeopt.types import Array, TensorSpec

if TYPE_CHECKING:
    import torch

#: Default length of a text, in tokens, where neither the user nor the model says less.
TEXT_LENGTH = 128

#: One second of speech at the usual rate.
WAVEFORM_LENGTH = 16_000


def inputs_of(module: torch.nn.Module, directory: Path) -> tuple[TensorSpec, ...]:
    """The inputs of one forward pass. Raises UsageError for a kind that can't be told from the files."""
    parameters, _ = forward_parameters(module)
    settings = preprocessor_settings(directory)
    main = str(getattr(module, "main_input_name", "input_ids"))
    if main not in parameters:
        main = next((name for name in ("input_ids", "pixel_values", "input_values") if name in parameters), main)
    match main:
        case "input_ids":
            return _text_inputs(module, directory, parameters)
        case "pixel_values":
            return (TensorSpec("pixel_values", (1, *_image_size(module, settings)), "float32", "NCHW"),)
        case "input_values" | "input_features":
            return (TensorSpec(main, (1, *audio_size(module, settings, main)), "float32"),)
        case _:
            raise UsageError(
                f"takes {main!r}, which edgeopt can't declare by itself",
                where=str(directory),
                fix="build the model in a file.py:factory of yours",
            )


def preprocessor_settings(directory: Path) -> Mapping[str, object]:
    """preprocessor_config.json, {} where there is none."""
    path = directory / "preprocessor_config.json"
    settings: object = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return settings if isinstance(settings, dict) else {}


def _text_inputs(module: torch.nn.Module, directory: Path, parameters: list[str]) -> tuple[TensorSpec, ...]:
    limit = config_value(module, "max_position_embeddings", TEXT_LENGTH)
    # RoBERTa's positions start behind the padding index.
    reserved = config_value(module, "pad_token_id", 0) + 1 if _is_offset(module) else 0
    length = min(TEXT_LENGTH, limit - reserved) if limit > reserved else TEXT_LENGTH
    names = ["input_ids", "attention_mask"]
    takes_types = config_value(module, "type_vocab_size", 0) > 1
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
    channels = config_value(module, "num_channels", 3)
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


def audio_size(module: torch.nn.Module, settings: Mapping[str, object], name: str) -> tuple[int, ...]:
    """Shape of one recording, as a waveform or a spectrogram."""
    bins = settings.get("feature_size", settings.get("num_mel_bins"))
    if name == "input_features":
        frames = settings.get("nb_max_frames", 2 * config_value(module, "max_source_positions", 1500))
        mels = config_value(module, "num_mel_bins", bins if isinstance(bins, int) else 80)
        return mels, frames if isinstance(frames, int) else 3000
    frames = settings.get("max_length", config_value(module, "max_length", 0))
    mels = config_value(module, "num_mel_bins", 0)
    if mels and isinstance(frames, int) and frames:
        return frames, mels
    return (WAVEFORM_LENGTH,)


def config_value(module: torch.nn.Module, key: str, default: int) -> int:
    """A whole number of the configuration; `default` where it holds none under that key."""
    value = getattr(getattr(module, "config", None), key, default)
    return value if isinstance(value, int) else default


def examples_of(module: torch.nn.Module, inputs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """Synthesised, with token ids from the whole vocabulary."""
    examples = synthesize(inputs)
    read = config_value(module, "vocab_size", 1)
    written = config_value(module, "decoder_vocab_size", read)
    for spec in inputs:
        if spec.name.endswith("input_ids"):
            vocabulary = written if spec.name.startswith("decoder_") else read
            ids = np.random.default_rng(0).integers(0, vocabulary, examples[spec.name].shape)
            examples[spec.name] = np.asarray(ids, dtype=spec.dtype)
    return examples
