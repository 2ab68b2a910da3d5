"""The .litertlm file that LiteRT-LM loads: network, tokenizer, and what its loop must know."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

from edgeopt.errors import ConversionError, MissingError
from edgeopt.generation.llm_network import LanguageModel, language_model
from edgeopt.generation.llm_tokenizer import tokenizer_file
from edgeopt.types import Model

MODEL_FILE = "model.litertlm"


def require_builder() -> None:
    """Raises MissingError where litert-lm-builder is not installed."""
    if find_spec("litert_lm_builder") is None:
        raise MissingError(
            "a LiteRT-LM file needs the package 'litert-lm-builder'", fix="pip install litert-lm-builder"
        )


def write_litert_lm(model: Model, network: Path, directory: Path) -> Path:
    """Write the file into a directory and return it.

    Args:
        model: the language model as loaded, with its tokenizer.
        network: the .tflite file of `convert_litert_lm` or `quantize_litert_lm`.

    `litert_lm.Engine(str(path))`, and LiteRT-LM's apps for Android and iOS, then write with it.

    Raises:
        MissingError: litert-lm-builder is not installed.
        ConversionError: the model has no tokenizer, which LiteRT-LM keeps in the same file.
    """
    require_builder()
    tokenizer = tokenizer_file(model)
    if tokenizer is None:
        raise ConversionError(
            "LiteRT-LM keeps the tokenizer in the model's file, and the model has none",
            where=model.name,
            fix="put tokenizer.json beside the model's weights",
        )
    from litert_lm_builder import litertlm_builder as vendor

    builder = vendor.LitertLmFileBuilder()
    builder.add_system_metadata(vendor.Metadata(key="Authors", value="edgeopt", dtype=vendor.DType.STRING))
    path = directory / MODEL_FILE
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch) / "llm_metadata.pb"
        told.write_bytes(_metadata(language_model(model), tokenizer))
        builder.add_llm_metadata(str(told))
        builder.add_hf_tokenizer(str(tokenizer))
        builder.add_tflite_model(str(network), vendor.TfLiteModelType.PREFILL_DECODE)
        part = path.with_suffix(".part")
        with part.open("wb") as stream:
            builder.build(stream)
        part.replace(path)
    return path


def _metadata(found: LanguageModel, tokenizer: Path) -> bytes:
    from litert_lm_builder.runtime.proto import llm_metadata_pb2, llm_model_type_pb2

    generation = found.generation
    told = llm_metadata_pb2.LlmMetadata(max_num_tokens=generation.max_target)
    if _begins_with(tokenizer, found.begin_id):
        told.start_token.token_ids.ids.append(found.begin_id)
    told.pad_token.token_ids.ids.append(generation.pad_id)
    for token in generation.end_ids:
        told.stop_tokens.add().token_ids.ids.append(token)
    told.suppress_tokens.ids.extend(generation.suppressed_ids)
    # The others mean chat formats and several senses; this one is any network with these signatures.
    told.llm_model_type.CopyFrom(llm_model_type_pb2.LlmModelType(generic_model=llm_model_type_pb2.GenericModel()))
    template = tokenizer.parent / "chat_template.jinja"
    if template.is_file():
        told.jinja_prompt_template = template.read_text("utf-8")
    return bytes(told.SerializeToString(deterministic=True))


def _begins_with(tokenizer: Path, token: int) -> bool:
    """Whether the tokenizer itself puts that token before a text. LiteRT-LM leaves that to the file's metadata."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tokenizer)).encode("a").ids
    return bool(ids) and ids[0] == token
