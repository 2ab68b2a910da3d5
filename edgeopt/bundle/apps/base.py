"""What the app writers share: tensors in words that suit every language, identifiers from any string, templates."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edgeopt.bundle.manifest import Manifest
from edgeopt.datasets.text import FIELDS
from edgeopt.types import (
    ArrayPreprocessing,
    AudioPreprocessing,
    DType,
    ImagePreprocessing,
    Preprocessing,
    SignatureTensor,
    TextPreprocessing,
)

TEMPLATES = Path(__file__).parent.parent / "templates"

Style = Literal["snake", "camel", "pascal"]

#: Latin letters that are no letter with an accent, in the usual ASCII.
_LETTERS = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "Ae", "ø": "o", "Ø": "O", "œ": "oe", "Œ": "Oe", "ł": "l", "Ł": "L"}
)


@dataclass(frozen=True, slots=True)
class AppTensor:
    """One input or output as an app sees it.

    Attributes:
        identifier: name of the field in the generated code.
        name, native_name: as in `SignatureTensor`.
        position: among the inputs or among the outputs.
        file_shape: as in the file, a string for a free size. model_shape: the same in the trained model's order of
            dimensions, which is what the app passes and gets.
        file_dtype, model_dtype: stored in the file; taken and given by the trained model.
        permutation: from the model's order to the file's; None where they are the same.
        scale, zero_point: real = scale * (stored - zero_point), in float32; None where the file's numbers are
            the model's own.
    """

    identifier: str
    name: str
    native_name: str
    position: int
    file_shape: tuple[int | str, ...]
    model_shape: tuple[int | str, ...]
    file_dtype: DType
    model_dtype: DType
    permutation: tuple[int, ...] | None
    scale: float | None
    zero_point: int | None

    @property
    def is_dynamic(self) -> bool:
        return any(isinstance(size, str) for size in self.file_shape)

    @property
    def is_float(self) -> bool:
        """Whether the app passes or gets real numbers."""
        return self.model_dtype in ("float32", "float16")


@dataclass(frozen=True, slots=True)
class TextField:
    """What a tokenizer gives that one input takes.

    Attributes:
        field: "input_ids", "attention_mask" or "token_type_ids".
        length: tokens that the file fixes; None where any number will do.
    """

    tensor: AppTensor
    field: str
    length: int | None


def tensors(
    described: Iterable[SignatureTensor], style: Style, reserved: Collection[str], fallback: str
) -> tuple[AppTensor, ...]:
    """A signature's inputs or outputs with unique identifiers; `fallback` names what has no usable letter."""
    listed = tuple(described)
    names = identifiers([tensor.name for tensor in listed], style, reserved, fallback)
    return tuple(_tensor(tensor, name, k) for k, (tensor, name) in enumerate(zip(listed, names, strict=True)))


def identifiers(names: Iterable[str], style: Style, reserved: Collection[str], fallback: str) -> tuple[str, ...]:
    """An ASCII identifier for each name: no keyword (`reserved`) and no two alike."""
    taken: set[str] = set()
    made: list[str] = []
    for name in names:
        base = identifier(name, style, reserved, fallback)
        unique, count = base, 1
        while unique in taken or unique in reserved:
            count += 1
            stem = base.rstrip("_")  # C++ reserves every name with two underscores in a row
            unique = f"{stem}_{count}" if style == "snake" else f"{stem}{count}"
        taken.add(unique)
        made.append(unique)
    return tuple(made)


def identifier(name: str, style: Style, reserved: Collection[str] = (), fallback: str = "model") -> str:
    """`name` as an ASCII identifier: accents dropped, everything else that is no letter or digit separates words.

    A digit in front gets `fallback` before it, and a keyword of the language (`reserved`) gets "_" behind it.
    """
    plain = unicodedata.normalize("NFKD", name.translate(_LETTERS)).encode("ascii", "ignore").decode()
    words = re.findall(r"[A-Z]+(?![a-z])[0-9]*|[A-Z]?[a-z]+[0-9]*|[0-9]+", plain)
    if not words or words[0][0].isdigit():
        words = [fallback, *words]
    lower = [word.lower() for word in words]
    if style == "snake":
        text = "_".join(lower)
    else:
        text = "".join(word.capitalize() for word in lower)
        text = text if style == "pascal" else lower[0] + text[len(lower[0]) :]
    return f"{text}_" if text in reserved else text


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set of names that generated code must not use."""
    return frozenset(text.split())


def float32_text(value: float) -> str:
    """The shortest decimal that reads back as the float32 nearest to `value`: "0.0078125", "1e-08", always with a
    point or an exponent, so that no language takes it for a whole number."""
    text = str(np.float32(value))
    return text if any(c in text for c in ".en") else f"{text}.0"


def image_preprocessing(manifest: Manifest) -> ImagePreprocessing | None:
    """The declared preprocessing of pictures, where there is the one input that it can be for."""
    p = _for_only_input(manifest)
    return p if isinstance(p, ImagePreprocessing) and len(manifest.model.signature.inputs[0].shape) == 4 else None


def resizes_columns_first(manifest: Manifest) -> bool:
    """Whether the Pillow that prepared the pictures on which the bundle was judged changes the order of its two passes:
    from 13 on it resizes columns first where the height shrinks, by more than twice as many pixels as the width
    (`h - new_h > max(0, 2 * (w - new_w))`). Every pass rounds to 8 bits, so the order shows in the pixels."""
    return int(manifest.tools["pillow"].partition(".")[0]) >= 13


def audio_preprocessing(manifest: Manifest) -> AudioPreprocessing | None:
    """The declared preprocessing of sound, where there is the one input that it can be for."""
    p = _for_only_input(manifest)
    return p if isinstance(p, AudioPreprocessing) else None


def array_preprocessing(manifest: Manifest) -> ArrayPreprocessing | None:
    """The declared normalisation; it is for every float input."""
    p = manifest.preprocessing
    return p if isinstance(p, ArrayPreprocessing) else None


def text_preprocessing(manifest: Manifest) -> TextPreprocessing | None:
    """The declared tokenization, where every input can take a tokenizer's field (see `text_fields`)."""
    p = manifest.preprocessing
    return p if isinstance(p, TextPreprocessing) and _field_names(manifest) is not None else None


def text_fields(manifest: Manifest, inputs: tuple[AppTensor, ...]) -> tuple[TextField, ...]:
    """The tokenizer's field for each input, as edgeopt matched them: by name, or by order where no name says any."""
    fields = _field_names(manifest) or ()
    made = []
    for tensor, field in zip(inputs, fields, strict=False):
        length = tensor.model_shape[1]
        made.append(TextField(tensor, field, length if isinstance(length, int) else None))
    return tuple(made)


def padded_length(preprocessing: TextPreprocessing, fields: tuple[TextField, ...]) -> tuple[int, int]:
    """(most tokens, number of tokens to pad to); the second is 0 where texts keep their length."""
    fixed = [field.length for field in fields if field.length is not None]
    limit = min([preprocessing.max_length, *fixed])
    shortest = max((n for n in fixed if n > 1), default=0)
    return limit, max(shortest, limit if preprocessing.padding == "max_length" else 0)


def scores_output(manifest: Manifest, outputs: tuple[AppTensor, ...]) -> AppTensor | None:
    """The first output with exactly one number per label; None without labels or without such an output."""
    wanted = [len(manifest.labels)] if len(manifest.labels) != 1 else []
    for tensor in outputs if manifest.labels else ():
        free_batch = bool(tensor.model_shape) and isinstance(tensor.model_shape[0], str)
        if [size for size in tensor.model_shape[free_batch:] if size != 1] == wanted:
            return tensor
    return None


def render(app: str, template: str, **values: object) -> str:
    """A template of edgeopt/bundle/templates/<app>/ as text with a final newline."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only here, and only when a bundle is written

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES / app),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # source code, not HTML
    )
    return environment.get_template(template).render(**values)


def _tensor(tensor: SignatureTensor, name: str, position: int) -> AppTensor:
    permutation = tensor.permutation
    shape: tuple[int | str, ...] = tensor.shape
    if permutation is not None:
        shape = tuple(tensor.shape[permutation.index(axis)] for axis in range(len(permutation)))
    params = tensor.quantization
    return AppTensor(
        identifier=name,
        name=tensor.name,
        native_name=tensor.native_name,
        position=position,
        file_shape=tensor.shape,
        model_shape=shape,
        file_dtype=tensor.dtype,
        model_dtype=tensor.model_dtype,
        permutation=permutation,
        scale=None if params is None else float(np.float32(params.scale[0])),
        zero_point=None if params is None else params.zero_point[0],
    )


def _for_only_input(manifest: Manifest) -> Preprocessing | None:
    return manifest.preprocessing if len(manifest.model.signature.inputs) == 1 else None


def _field_names(manifest: Manifest) -> tuple[str, ...] | None:
    inputs = manifest.model.signature.inputs
    if any(len(tensor.shape) != 2 for tensor in inputs):
        return None
    by_name = [next((f for f, names in FIELDS.items() if t.name.lower() in names), None) for t in inputs]
    known = tuple(field for field in by_name if field is not None)
    if len(known) == len(inputs):
        return known
    return tuple(FIELDS)[: len(inputs)] if not known and len(inputs) <= len(FIELDS) else None
