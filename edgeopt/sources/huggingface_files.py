"""The files of a Hugging Face model: where they are, and what config.json says it is for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from edgeopt.errors import MissingError, UsageError

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
    "summarization": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
    "translation": "AutoModelForSeq2SeqLM",
}

#: Class that loads the speech recognizers that write their text token by token.
SPEECH_WRITER = "AutoModelForSpeechSeq2Seq"

#: End of an architecture's name in config.json -> task.
ARCHITECTURES: tuple[tuple[str, str], ...] = (
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForMaskedLM", "fill-mask"),
    ("ForPreTraining", "feature-extraction"),
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForConditionalGeneration", "text2text-generation"),
    ("MTModel", "translation"),
    ("ForImageClassification", "image-classification"),
    ("ForSemanticSegmentation", "image-segmentation"),
    ("ForDepthEstimation", "depth-estimation"),
    ("ForAudioClassification", "audio-classification"),
    ("ForCTC", "automatic-speech-recognition"),
    ("Model", "feature-extraction"),
)

#: What is fetched from the hub: no pickled weights, no Python.
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.spm")


def directory_of(location: str) -> Path:
    """A directory as it is, or that of the hub's cache for an id.

    Raises UsageError for what is neither, MissingError when the hub can't be reached.
    """
    return Path(location) if Path(location).is_dir() else _download(location)


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


def read_config(directory: Path) -> Mapping[str, object]:
    """config.json. Raises UsageError where it is absent, damaged, or wants code of its own to be run."""
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


def task_of(config: Mapping[str, object], directory: Path) -> str:
    """The task that the architecture is named after. Raises UsageError where it tells none."""
    names = architectures(config)
    for name in names:
        task = task_of_architecture(name, config.get("task_specific_params"))
        if task is not None:
            return task
    raise UsageError(
        f"the architecture {names[0]!r} tells no task" if names else "config.json names no architecture",
        where=str(directory),
        fix=f"give --task, one of {', '.join(sorted(TASKS))}",
    )


def check_task(task: str, source: str) -> None:
    """Raises UsageError for a task that there isn't."""
    if general_task(task) not in TASKS:
        raise UsageError(f"unknown task {task!r}", where=source, fix=f"use one of {', '.join(sorted(TASKS))}")


def general_task(task: str) -> str:
    """translation_en_to_de -> translation."""
    return "translation" if re.fullmatch(r"translation_\w+_to_\w+", task) else task


def class_for(task: str, config: Mapping[str, object]) -> str:
    """Name of the transformers class that loads a model of this configuration for the task."""
    if task == "automatic-speech-recognition" and any(name in _speech_writers() for name in architectures(config)):
        return SPEECH_WRITER
    return TASKS[general_task(task)]


def architectures(config: Mapping[str, object]) -> list[str]:
    """Names of the classes that the model was saved from."""
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def task_of_architecture(name: str, tasks: object) -> str | None:
    """The task that a class is named after; `tasks` are the configuration's `task_specific_params`."""
    task = next((task for ending, task in ARCHITECTURES if name.endswith(ending)), None)
    if task is None:
        return None
    # Speech models have the endings of text models too.
    if name in _audio_classifiers():
        return "audio-classification"
    if name in _speech_writers():
        return "automatic-speech-recognition"
    is_summarizer = isinstance(tasks, dict) and set(tasks) == {"summarization"}
    return "summarization" if task == "text2text-generation" and is_summarizer else task


def _audio_classifiers() -> frozenset[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES

    return frozenset(MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values())


def _speech_writers() -> frozenset[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

    return frozenset(MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values())
