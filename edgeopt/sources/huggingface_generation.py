"""A Hugging Face model that writes: its adapter, its inputs, and what a loop around it must know."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError, UsageError
from edgeopt.sources.base import SourceOptions
from edgeopt.sources.build import build
from edgeopt.sources.generative import check_writer, observe_writer
from edgeopt.sources.huggingface_files import general_task, task_of_architecture
from edgeopt.sources.huggingface_inputs import audio_size, config_value, examples_of, preprocessor_settings
from edgeopt.sources.huggingface_preprocessing import writing_preprocessing
from edgeopt.types import Dim, Generation, GenerationTask, Model, StepRecord, TensorSpec

if TYPE_CHECKING:
    import torch

#: Hugging Face task -> ours.
WRITING: dict[str, GenerationTask] = {
    "automatic-speech-recognition": "speech-recognition",
    "summarization": "summarization",
    "text-generation": "text-generation",
    "text2text-generation": "text2text-generation",
    "translation": "translation",
}

#: Default lengths, in tokens, where neither the user nor the model says less.
LENGTH = 128

#: Kinds of layers whose keys and values are kept by position; others keep states that no cache of rows holds.
FULL, SLIDING = "full_attention", "sliding_attention"

#: Rotary positions whose frequencies depend on the sequence's length, which no static graph can.
LENGTH_DEPENDENT = ("dynamic", "longrope")


def writes(module: torch.nn.Module, task: str) -> bool:
    """Whether the model, loaded for that task, writes token by token."""
    can_generate = getattr(module, "can_generate", None)
    return general_task(task) in WRITING and callable(can_generate) and bool(can_generate())


def bare_writer_task(module: torch.nn.Module) -> str | None:
    """The task of a network of transformers that a program hands over as it is; None if it is no such writer."""
    name, config = type(module).__name__, getattr(module, "config", None)
    if config is None or not type(config).__module__.startswith("transformers."):
        return None
    task = task_of_architecture(name, getattr(config, "task_specific_params", None))
    return task if task is not None and writes(module, task) else None


def writing_model(
    module: torch.nn.Module,
    options: SourceOptions,
    *,
    task: str,
    directory: Path | None,
    where: str,
    name: str,
    record: StepRecord,
    sha256: str,
) -> Model:
    """A frozen network of transformers as a model that writes, proven to do so token by token.

    Args:
        directory: holds the tokenizer and the preprocessor's settings; None where there are none.
        where: how messages call the source.

    Raises UsageError for options, lengths or settings that don't fit, ConversionError for a network whose state is no
    cache of keys and values.
    """
    if options.inputs:
        raise UsageError(
            "a network that writes has the inputs that its loop gives it",
            where="--input",
            fix="give --max-source-length and --max-target-length",
        )
    heard = {} if directory is None else preprocessor_settings(directory)
    adapter = adapter_for(module, where)
    generation = generation_of(module, _settings(module, directory), heard, task, options, where)
    inputs = inputs_for(module, generation, heard)
    prefix = prefix_of(getattr(getattr(module, "config", None), "task_specific_params", None), task)
    model = build(
        adapter,
        options,
        name=name,
        inputs=inputs,
        examples=examples_of(module, inputs),
        output_names=("logits",),
        preprocessing=None if directory is None else writing_preprocessing(directory, generation, prefix),
        labels=(),
        record=record,
        sha256=sha256,
        generation=generation,
    )
    model = observe_writer(model)
    check_writer(model)
    return model


def _hears(module: torch.nn.Module) -> bool:
    return str(getattr(module, "main_input_name", "input_ids")) == "input_features"


def adapter_for(module: torch.nn.Module, source: str) -> torch.nn.Module:
    """The network behind one interface. Raises ConversionError where no cache of keys and values makes up its state."""
    from edgeopt.sources.generative_huggingface import CausalLanguageModel, SpeechToText, TextToText

    if not config_value(module, "is_encoder_decoder", False):
        return CausalLanguageModel(module, _windows(module, source)).eval()
    return (SpeechToText if _hears(module) else TextToText)(module).eval()


def generation_of(
    module: torch.nn.Module,
    settings: Mapping[str, object],
    heard: Mapping[str, object],
    task: str,
    options: SourceOptions,
    source: str,
) -> Generation:
    """What a loop must know, from the settings of generation.

    `vocabulary` and `layers` are the configuration's, to be replaced by what a run shows.

    Args:
        heard: the preprocessor's settings, for speech.

    Raises UsageError for lengths that the model can't read, or where it tells no token to begin with.
    """
    is_decoder = not config_value(module, "is_encoder_decoder", False)
    ends = _ids(settings.get("eos_token_id"))
    if not ends:
        raise UsageError("names no eos_token_id, so that it would never stop", where=source)
    start = () if is_decoder else _start_ids(settings, source)
    longest = config_value(module, "max_target_positions", config_value(module, "max_position_embeddings", 0))
    max_target = _length(options.max_target_length, longest, max(2, len(start) + 1), "--max-target-length")
    if is_decoder:
        half = max_target // 2
        max_source = _length(options.max_source_length or half, max_target - 1, 1, "--max-source-length")
    elif _hears(module):
        if options.max_source_length is not None:
            raise UsageError(
                "the model hears recordings of one length", where="--max-source-length", fix="leave it out"
            )
        max_source = audio_size(module, heard, "input_features")[-1]
    else:
        limit = config_value(module, "max_position_embeddings", 0)
        max_source = _length(options.max_source_length, limit, 2, "--max-source-length")
    pads = _ids(settings.get("pad_token_id"))
    # Configurations of small networks keep the large ones' defaults.
    vocabulary = config_value(module, "decoder_vocab_size", config_value(module, "vocab_size", 1))
    first = _ids(settings.get("begin_suppress_tokens"))
    never = (*_ids(settings.get("suppress_tokens")), *_single(settings.get("bad_words_ids")))
    return Generation(
        kind="decoder" if is_decoder else "encoder-decoder",
        task=WRITING[general_task(task)],
        vocabulary=vocabulary,
        start_ids=start,
        end_ids=ends,
        pad_id=pads[0] if pads else ends[0],
        max_source=max_source,
        max_target=max_target,
        layers=config_value(module, "decoder_layers", config_value(module, "num_hidden_layers", 1)),
        suppressed_ids=tuple(sorted(token for token in {*never} - {*ends} if token < vocabulary)),
        begin_suppressed_ids=tuple(sorted(token for token in {*first} if token < vocabulary)),
    )


def inputs_for(module: torch.nn.Module, generation: Generation, heard: Mapping[str, object]) -> tuple[TensorSpec, ...]:
    """What the adapter's forward takes."""
    target = Dim("target", 2, generation.max_target)
    if generation.kind == "decoder":
        return (TensorSpec("input_ids", (1, target), "int64", padding=generation.pad_id),)
    written = TensorSpec("decoder_input_ids", (1, target), "int64", padding=generation.pad_id)
    if not _hears(module):
        source = Dim("source", 2, generation.max_source)
        return (
            TensorSpec("input_ids", (1, source), "int64", padding=generation.pad_id),
            TensorSpec("attention_mask", (1, source), "int64", padding=0),
            written,
        )
    shape = audio_size(module, heard, "input_features")
    return TensorSpec("input_features", (1, *shape), "float32"), written


def prefix_of(tasks: object, task: str) -> str:
    """What the model was trained to see before every text, where `task_specific_params` tells it for this task."""
    if not isinstance(tasks, dict):
        return ""
    named = [str(key) for key in tasks if key == task]
    fitting = named or [str(key) for key in tasks if general_task(str(key)) == general_task(task)]
    settings = tasks[fitting[0]] if len(fitting) == 1 else None
    prefix = settings.get("prefix") if isinstance(settings, dict) else None
    return prefix if isinstance(prefix, str) else ""


def _windows(module: torch.nn.Module, source: str) -> dict[str, int | None]:
    """Kind of layer -> how far back it looks; see `CausalLanguageModel`."""
    config = _text_config(module)
    rope = getattr(config, "rope_parameters", None)
    for settings in (rope, *(rope.values() if isinstance(rope, dict) else ())):
        kind = settings.get("rope_type") if isinstance(settings, dict) else None
        if kind in LENGTH_DEPENDENT:
            raise ConversionError(f"has {kind!r} rotary positions, which change with the text's length", where=source)
    window = getattr(config, "sliding_window", None)
    window = window if isinstance(window, int) and window > 0 else None
    kinds = getattr(config, "layer_types", None)
    if not isinstance(kinds, list | tuple) or not kinds:
        return {"": window}
    other = sorted({str(kind) for kind in kinds} - {FULL, SLIDING})
    if other:
        raise ConversionError(f"has layers of the kind {other[0]!r}, whose state no cache of rows holds", where=source)
    found = {str(kind): window if kind == SLIDING else None for kind in kinds}
    return found if len(found) > 1 else {"": next(iter(found.values()))}


def _start_ids(settings: Mapping[str, object], source: str) -> tuple[int, ...]:
    """The start, and what generation is forced to write behind it (a language, a task)."""
    start = _ids(settings.get("decoder_start_token_id")) or _ids(settings.get("bos_token_id"))
    if not start:
        raise UsageError("names no decoder_start_token_id, with which its decoder begins", where=source)
    forced = settings.get("forced_decoder_ids")
    at = {int(p): token for p, token in forced} if isinstance(forced, list) else {}
    if at or settings.get("task_to_id") is not None or settings.get("no_timestamps_token_id") is not None:
        return (start[0], *_speech_prompt(settings, at))
    return (start[0], *_ids(settings.get("forced_bos_token_id"))[:1])


def _speech_prompt(settings: Mapping[str, object], forced: Mapping[int, int | None]) -> tuple[int, ...]:
    """Whisper's language, task and "no timestamps". A language that is to be found out is taken to be English."""
    languages, tasks = settings.get("lang_to_id"), settings.get("task_to_id")
    prompt = [forced[position] for position in sorted(forced)]
    if not prompt and isinstance(languages, dict) and isinstance(tasks, dict):
        prompt = [None, tasks.get(str(settings.get("task") or "transcribe"))]
    if prompt and prompt[0] is None and isinstance(languages, dict):
        prompt[0] = languages.get(f"<|{settings.get('language') or 'en'}|>")
    plain = settings.get("no_timestamps_token_id")
    if isinstance(plain, int) and plain not in prompt:
        prompt.append(plain)
    return tuple(token for token in prompt if token is not None)


def _length(given: int | None, longest: int, shortest: int, flag: str) -> int:
    """`longest`: of the model, 0 where it has no limit."""
    length = given if given is not None else (min(LENGTH, longest) if longest else LENGTH)
    if length < shortest:
        raise UsageError(f"{length} is too short", where=flag, fix=f"give at least {shortest}")
    if longest and length > longest:
        raise UsageError(f"{length} is more than the model reads", where=flag, fix=f"give at most {longest}")
    return length


def _text_config(module: torch.nn.Module) -> object:
    config = getattr(module, "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def _settings(module: torch.nn.Module, directory: Path | None) -> dict[str, object]:
    """Of generation: generation_config.json's win over what transformers read there, and these over config.json's.

    The file is read too, since transformers forgets what it has no name for, such as Whisper's languages.
    """
    told: list[Mapping[str, object]] = []
    for name in ("config", "generation_config"):
        as_mapping = getattr(getattr(module, name, None), "to_dict", None)
        told.append(as_mapping() if callable(as_mapping) else {})
    path = None if directory is None else directory / "generation_config.json"
    if path is not None and path.is_file():
        try:
            found: object = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError("is not JSON", where=str(path)) from error
        told.append(found if isinstance(found, dict) else {})
    return {key: value for settings in told for key, value in settings.items() if value is not None}


def _ids(value: object) -> tuple[int, ...]:
    """A token, or several."""
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def _single(words: object) -> Iterable[int]:
    """Those of the forbidden sequences that are one token."""
    return (word[0] for word in words if len(word) == 1) if isinstance(words, list) else ()
