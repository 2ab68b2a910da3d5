"""What the Kotlin and the Swift writer share: what of the manifest the templates need, in no language's words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edgeopt.bundle.apps.base import (
    AppTensor,
    array_preprocessing,
    audio_preprocessing,
    image_preprocessing,
    padded_length,
    resizes_columns_first,
    scores_output,
    text_fields,
    text_preprocessing,
)
from edgeopt.bundle.manifest import TOKENIZER_FILE, Manifest, StoredArray
from edgeopt.types import ImagePreprocessing

TokenField = Literal["id", "mask", "type"]
TOKEN_FIELDS: dict[str, TokenField] = {"input_ids": "id", "attention_mask": "mask", "token_type_ids": "type"}


@dataclass(frozen=True, slots=True)
class MobileTensor:
    """One input or output in a language's words.

    Attributes:
        element: the type of its numbers, or of an array of them. decoder: the function that reads it from the file.
        spec: expression that makes its `TensorSpec`.
        axis: of its channels, along which an array preprocessing is for it; None where none is.
    """

    identifier: str
    position: int
    comment: str
    element: str
    decoder: str
    spec: str
    axis: int | None


#: A tensor, with the axis of its channels, in a language's words.
Describe = Callable[[AppTensor, int | None], MobileTensor]
#: A float32 as a language writes it.
Number = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class ImageCode:
    """The steps of an `ImagePreprocessing` with its numbers as source text.

    Attributes:
        kernel: the interpolation in lower case.
        mean, std: one number per channel. rescale: the divisor.
        shape: of the model's tensor.
        planes: channels come first in it.
        columns_first: see `resizes_columns_first`.
        takes_bytes: the model takes the pixels as they are.
    """

    height: int
    width: int
    channels: int
    crop_fraction: str | None
    resize_shorter: int | None
    kernel: str
    rescale: str
    mean: str
    std: str
    shape: str
    planes: bool
    columns_first: bool
    takes_bytes: bool


@dataclass(frozen=True, slots=True)
class AudioCode:
    """An `AudioPreprocessing`; numbers and the model's shape as source text."""

    sample_rate: int
    num_samples: int
    mean: str
    std: str
    shape: str


@dataclass(frozen=True, slots=True)
class ArrayCode:
    """An `ArrayPreprocessing`.

    Attributes:
        channels: how many numbers `mean` and `std` have. rescale, mean, std: as source text.
        axes: the channel axis of each input that it is for.
    """

    channels: int
    rescale: str
    mean: str
    std: str
    axes: dict[str, int]


@dataclass(frozen=True, slots=True)
class TextCode:
    """A `TextPreprocessing`.

    Attributes:
        tokenizer_file: path in the bundle.
        limit, pad_to: most tokens, and how many to pad to (0: none).
        fields: (what to fill it with, tensor) for every input, in order.
    """

    tokenizer_file: str
    limit: int
    pad_to: int
    fields: tuple[tuple[TokenField, AppTensor], ...]

    @property
    def used(self) -> frozenset[str]:
        return frozenset(field for field, _ in self.fields)


def model_values(
    manifest: Manifest,
    class_name: str,
    inputs: tuple[AppTensor, ...],
    outputs: tuple[AppTensor, ...],
    number: Number,
    describe: Describe,
) -> dict[str, object]:
    """What both languages' model templates speak of."""
    array = array_code(manifest, inputs, number)
    axes = {} if array is None else array.axes
    scores = scores_output(manifest, outputs)
    return {
        "title": title(manifest),
        "class_name": class_name,
        "inputs": [describe(tensor, axes.get(tensor.identifier)) for tensor in inputs],
        "outputs": [describe(tensor, None) for tensor in outputs],
        "labels": bool(manifest.labels),
        "scores": scores.identifier if scores is not None and scores.is_float else None,
        "image": image_code(manifest, inputs, number),
        "audio": audio_code(manifest, inputs, number),
        "array": array,
        "text": text_code(manifest, inputs),
    }


def golden_values(
    manifest: Manifest,
    class_name: str,
    inputs: tuple[AppTensor, ...],
    describe: Describe,
    stored: Callable[[StoredArray], str],
) -> dict[str, object]:
    """What both languages' golden tests speak of; `stored` writes a file and its shape as arguments."""
    signature = manifest.model.signature
    return {
        "class_name": class_name,
        "inputs": [describe(tensor, None) for tensor in inputs],
        "vectors": [
            {
                "inputs": [stored(vector.inputs[tensor.name]) for tensor in signature.inputs],
                "outputs": [stored(vector.outputs[tensor.name]) for tensor in signature.outputs],
            }
            for vector in manifest.golden
        ],
        "tolerance": repr(float(manifest.golden_tolerance)),
    }


def image_code(manifest: Manifest, inputs: tuple[AppTensor, ...], number: Number) -> ImageCode | None:
    p = image_preprocessing(manifest)
    if p is None or not (inputs[0].is_float or inputs[0].model_dtype == "uint8"):
        return None
    return ImageCode(
        height=p.height,
        width=p.width,
        channels=p.channels,
        crop_fraction=None if p.crop_fraction is None else repr(float(p.crop_fraction)),
        resize_shorter=p.resize_shorter,
        kernel=p.interpolation,
        rescale=number(p.rescale),
        mean=_per_channel(p.mean, p.channels, number),
        std=_per_channel(p.std, p.channels, number),
        shape=_image_shape(p),
        planes=p.layout == "NCHW",
        columns_first=resizes_columns_first(manifest),
        takes_bytes=inputs[0].model_dtype == "uint8",
    )


def audio_code(manifest: Manifest, inputs: tuple[AppTensor, ...], number: Number) -> AudioCode | None:
    p = audio_preprocessing(manifest)
    if p is None or not inputs[0].is_float:
        return None
    shape = (1, 1, p.num_samples) if p.channel_axis else (1, p.num_samples)
    return AudioCode(p.sample_rate, p.num_samples, number(p.mean), number(p.std), sizes(shape))


def array_code(manifest: Manifest, inputs: tuple[AppTensor, ...], number: Number) -> ArrayCode | None:
    p = array_preprocessing(manifest)
    if p is None:
        return None
    channels = max(len(p.mean), len(p.std))
    axes = {
        tensor.identifier: p.channel_axis % max(1, len(tensor.model_shape))
        for tensor in inputs
        if tensor.is_float and (channels == 1 or tensor.model_shape)
    }
    mean, std = (_per_channel(values, channels, number) for values in (p.mean, p.std))
    return ArrayCode(channels, number(p.rescale), mean, std, axes) if axes else None


def text_code(manifest: Manifest, inputs: tuple[AppTensor, ...]) -> TextCode | None:
    p = text_preprocessing(manifest)
    if p is None:
        return None
    fields = text_fields(manifest, inputs)
    limit, pad_to = padded_length(p, fields)
    matched = tuple((TOKEN_FIELDS[field.field], field.tensor) for field in fields)
    return TextCode(f"{p.tokenizer}/{TOKENIZER_FILE}", limit, pad_to, matched)


def sizes(shape: tuple[int | str, ...]) -> str:
    """A shape as a list of integers, -1 for a free size."""
    return ", ".join(str(-1 if isinstance(size, str) else size) for size in shape)


def comment(tensor: AppTensor) -> str:
    """One line about a tensor for the source, in ASCII: names may hold anything, a line break too."""
    shape = " x ".join(str(size) if isinstance(size, int) else _ascii(size) for size in tensor.model_shape)
    stored = f", {tensor.file_dtype} in the file" if tensor.file_dtype != tensor.model_dtype else ""
    return f"{json.dumps(tensor.name)}: {tensor.model_dtype}, {shape or 'scalar'}{stored}"


def title(manifest: Manifest) -> str:
    return f"{_ascii(manifest.name)} for {_ascii(manifest.target)}: {manifest.format}, {manifest.precision}"


def tool_version(manifest: Manifest, package: str) -> str | None:
    """The version of a Python package that the model was proven with, as it is published for other languages too:
    without the local part that a build adds ("1.5.1+cpu")."""
    version = manifest.tools.get(package)
    return None if version is None else version.split("+")[0]


def uses_only(tensors: tuple[AppTensor, ...], supported: frozenset[str]) -> bool:
    """Whether the runtime's binding for the app's language has the type of every tensor in the file."""
    return all(tensor.file_dtype in supported for tensor in tensors)


def _per_channel(values: tuple[float, ...], channels: int, number: Number) -> str:
    every = values * channels if len(values) == 1 else values
    return ", ".join(number(value) for value in every)


def _image_shape(p: ImagePreprocessing) -> str:
    if p.layout == "NCHW":
        return sizes((1, p.channels, p.height, p.width))
    return sizes((1, p.height, p.width, p.channels))


def _ascii(text: str) -> str:
    return json.dumps(text)[1:-1]
