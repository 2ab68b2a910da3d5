"""The tokenizer.json of a model that writes: the one beside it, or one made of its SentencePiece files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import MissingError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: What tokenizers that come without tokenizer.json are made of, beside their settings.
PARTS = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "source.spm", "vocab.json", "merges.txt")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

#: Below every score of a source's piece: taken only where the alternative is an unknown token.
FAR_BELOW = 1000.0


def tokenizer_of(directory: Path) -> Path | None:
    """A tokenizer.json for the model in that directory; None where it comes with no tokenizer.

    One that had to be made is kept below $EDGEOPT_HOME (by default ~/.cache/edgeopt), under the digest of its files.

    Raises UsageError for files that can't be made one of, MissingError when the package that reads them is absent.
    """
    if (directory / "tokenizer.json").is_file():
        return directory / "tokenizer.json"
    found = [directory / name for name in (*PARTS, *SETTINGS) if (directory / name).is_file()]
    if not any(path.name in PARTS for path in found):
        return None
    digest = hashlib.sha256()
    for path in found:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    kept = _home() / digest.hexdigest()[:32]
    if not (kept / "tokenizer.json").is_file():
        _keep(_made(directory), directory, kept)
    return kept / "tokenizer.json"


def _home() -> Path:
    home = os.environ.get("EDGEOPT_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "edgeopt") / "tokenizers"


def _keep(tokenizer: Tokenizer, directory: Path, kept: Path) -> None:
    """Beside it lie the settings that name its special tokens. Appears at once or not at all."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            tokenizer.save(str(made / "tokenizer.json"))
            for name in SETTINGS:
                if (directory / name).is_file():
                    shutil.copyfile(directory / name, made / name)
            if not kept.exists():
                made.rename(kept)
    except OSError as error:
        raise UsageError(
            f"can't be written: {error.strerror}", where=str(kept), fix="set EDGEOPT_HOME to a writable directory"
        ) from error


def _made(directory: Path) -> Tokenizer:
    pieces = [name for name in PARTS if name.endswith((".spm", ".model")) and (directory / name).is_file()]
    if pieces and find_spec("sentencepiece") is None:
        raise MissingError("a SentencePiece tokenizer needs sentencepiece", fix="pip install sentencepiece protobuf")
    try:
        if (directory / "source.spm").is_file():
            return _of_marian(directory)
        return _by_transformers(directory)
    # Parsers of foreign files, which raise whatever they meet.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UsageError(
            f"its tokenizer can't be made a tokenizer.json: {reason[0] if reason else type(error).__name__}",
            where=str(directory),
            fix="save one beside the model with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        ) from error


def _by_transformers(directory: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, use_fast=True)
    backend: Tokenizer = made.backend_tokenizer
    return backend


def _of_marian(directory: Path) -> Tokenizer:
    """Marian cuts texts by source.spm, but numbers the pieces by vocab.json, which has the target's pieces too.

    Those only the target has are kept at the end of every choice. So sources are cut as Marian cuts them, and all that
    is written is read; targets that are given, for training, are cut by the source's pieces where these do.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    if (directory / "target_vocab.json").is_file():
        raise ValueError("source and target have vocabularies of their own")
    vocabulary: Mapping[str, int] = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    pieces = sorted(vocabulary, key=lambda piece: vocabulary[piece])
    if [vocabulary[piece] for piece in pieces] != list(range(len(pieces))):
        raise ValueError("vocab.json leaves numbers out")
    source = vars(import_module("sentencepiece.sentencepiece_model_pb2"))["ModelProto"]()
    source.ParseFromString((directory / "source.spm").read_bytes())
    scores = {piece.piece: piece.score for piece in source.pieces if piece.type == piece.NORMAL}
    last = min(scores.values()) - FAR_BELOW
    tokenizer = Tokenizer(
        Unigram([(piece, scores.get(piece, last)) for piece in pieces], unk_id=vocabulary["<unk>"], byte_fallback=False)
    )
    spaces = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    charsmap = source.normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), *spaces] if charsmap else spaces)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    named = [piece for piece in pieces if piece in ("</s>", "<unk>", "<pad>") or piece.startswith(">>")]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in named])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return tokenizer
