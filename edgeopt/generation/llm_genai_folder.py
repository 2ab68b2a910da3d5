"""The folder that onnxruntime-genai loads: the network's file, genai_config.json and the tokenizer's files.

Keys are those of its configuration reference (onnxruntime.ai/docs/genai/reference/config.html).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from edgeopt.generation.llm_genai import cache_of
from edgeopt.generation.llm_network import LanguageModel, language_model
from edgeopt.generation.llm_tokenizer import copy_tokenizer
from edgeopt.types import Artifact, Model

MODEL_FILE, CONFIG_FILE = "model.onnx", "genai_config.json"


def write_genai(model: Model, artifact: Artifact, directory: Path) -> tuple[Path, ...]:
    """Write the folder's files into a directory and return them, sorted.

    Args:
        model: the language model as loaded, with its tokenizer; not its genai form.
        artifact: what the ONNX exporter made of `genai_model(model)`, in float or quantized.

    `onnxruntime_genai.Model(str(directory))` then loads it, and `Tokenizer` too where the model has one.
    Raises ConversionError where the file has another signature.
    """
    settings = genai_config(artifact, language_model(model))
    shutil.copyfile(artifact.path, directory / MODEL_FILE)
    (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tuple(sorted([directory / MODEL_FILE, directory / CONFIG_FILE, *copy_tokenizer(model, directory)]))


def genai_config(artifact: Artifact, found: LanguageModel) -> dict[str, object]:
    """What genai_config.json says of a file. Raises ConversionError where that is no file of `genai_model`."""
    layers, heads, size = cache_of(artifact)
    generation = found.generation
    decoder = {
        "filename": MODEL_FILE,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": size,
        "hidden_size": heads * size,
        # Only the cache's shape is taken from these: query heads are the network's own affair.
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    ends = list(generation.end_ids)
    return {
        "model": {
            # One type for every decoder: the others only say what a network's builder did.
            "type": "decoder",
            "bos_token_id": found.begin_id,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": generation.pad_id,
            "context_length": generation.max_target,
            "vocab_size": generation.vocabulary,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": generation.max_target,
            "min_length": 0,
            "num_return_sequences": 1,
            "length_penalty": 1.0,
            "repetition_penalty": 1.0,
            # The cache grows by concatenation: what goes in and what comes out are two buffers.
            "past_present_share_buffer": False,
        },
    }
