"""A language model's tokenizer beside the file that a runtime's own generator loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from edgeopt.types import Model, TextPreprocessing

#: What a Hugging Face tokenizer's directory may hold that these runtimes read. No pickles, no Python.
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


def tokenizer_file(model: Model) -> Path | None:
    """The tokenizer.json that the model was loaded with."""
    if not isinstance(model.preprocessing, TextPreprocessing):
        return None
    path = Path(model.preprocessing.tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    return path if path.is_file() else None


def copy_tokenizer(model: Model, directory: Path) -> tuple[Path, ...]:
    """Copy the tokenizer's files into a directory; returns them, none where the model has no tokenizer.

    A lone tokenizer.json gets the settings file that Hugging Face's own loader would want beside it.
    """
    source = tokenizer_file(model)
    if source is None:
        return ()
    written = [directory / "tokenizer.json"]
    shutil.copyfile(source, written[0])
    for name in _FILES[1:]:
        if (source.parent / name).is_file():
            written.append(directory / name)
            shutil.copyfile(source.parent / name, written[-1])
    settings = directory / "tokenizer_config.json"
    if settings not in written:
        settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n", "utf-8")
        written.append(settings)
    return tuple(written)
