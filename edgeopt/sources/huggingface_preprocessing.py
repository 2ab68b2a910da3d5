"""What the files beside a Hugging Face model say about preprocessing, as declared data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from edgeopt.sources.huggingface_inputs import preprocessor_settings
from edgeopt.sources.huggingface_tokenizer import tokenizer_of
from edgeopt.types import (
    AudioPreprocessing,
    Dim,
    Generation,
    ImagePreprocessing,
    Preprocessing,
    TensorSpec,
    TextPreprocessing,
)

#: PIL's numbers for resampling filters.
INTERPOLATIONS: dict[object, Literal["nearest", "lanczos", "bilinear", "bicubic"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}

#: ConvNeXT's processors crop only below this size, in pixels.
CONVNEXT_CROP_BELOW = 384


def preprocessing_for(directory: Path, inputs: tuple[TensorSpec, ...]) -> Preprocessing | None:
    """The preprocessing of the first input; None where the files don't say, or say what we can't declare."""
    match inputs[0].name:
        case "input_ids":
            return _text(directory, inputs[0])
        case "pixel_values":
            return _image(preprocessor_settings(directory), inputs[0])
        case "input_values":
            return _audio(preprocessor_settings(directory), inputs[0])
        case _:
            return None


def writing_preprocessing(directory: Path, generation: Generation, prefix: str) -> TextPreprocessing | None:
    """How pairs of texts become the inputs of a network that writes; None without a tokenizer, or for speech.

    A decoder-only network reads one text, which is its own target. Raises as `tokenizer_of` does.
    """
    tokenizer = None if generation.task == "speech-recognition" else tokenizer_of(directory)
    if tokenizer is None:
        return None
    is_decoder = generation.kind == "decoder"
    return TextPreprocessing(
        str(tokenizer),
        max_length=generation.max_target if is_decoder else generation.max_source,
        padding="none",
        text_keys=("text",) if is_decoder else ("source",),
        target_key="text" if is_decoder else "target",
        target_max_length=generation.max_target,
        start_ids=generation.start_ids,
        prefix=prefix,
    )


def _text(directory: Path, spec: TensorSpec) -> TextPreprocessing | None:
    if not (directory / "tokenizer.json").is_file():
        return None
    length = spec.shape[-1]
    if isinstance(length, Dim):
        return TextPreprocessing(str(directory / "tokenizer.json"), max_length=length.max, padding="none")
    return TextPreprocessing(str(directory / "tokenizer.json"), max_length=length)


def _image(settings: Mapping[str, object], spec: TensorSpec) -> ImagePreprocessing | None:
    channels, height, width = spec.shape[1:]
    if not settings or isinstance(height, Dim) or isinstance(width, Dim):
        return None
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    normalizes = bool(settings.get("do_normalize", True))
    return ImagePreprocessing(
        height=height,
        width=width,
        channels=1 if channels == 1 else 3,
        resize_shorter=_shorter_side(settings),
        interpolation=INTERPOLATIONS.get(settings.get("resample", 2), "bilinear"),
        rescale=round(1 / factor, 6) if isinstance(factor, float) and factor > 0 else 255.0,
        mean=_numbers(settings.get("image_mean"), 0.0) if normalizes else (0.0,),
        std=_numbers(settings.get("image_std"), 1.0) if normalizes else (1.0,),
    )


def _shorter_side(settings: Mapping[str, object]) -> int | None:
    """To what the shorter side is scaled before the centre is cut out; None where the picture is just resized."""
    if not settings.get("do_resize", True):
        return None
    size = settings.get("size")
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    if not isinstance(edge, int):
        return None
    fraction = settings.get("crop_pct")
    if isinstance(fraction, float) and edge < CONVNEXT_CROP_BELOW:
        return int(edge / fraction)
    return edge


def _audio(settings: Mapping[str, object], spec: TensorSpec) -> AudioPreprocessing | None:
    """A waveform as it is. Spectrograms, and normalization by each recording's own mean, can't be declared."""
    rate, length = settings.get("sampling_rate"), spec.shape[-1]
    if len(spec.shape) != 2 or isinstance(length, Dim) or not isinstance(rate, int):
        return None
    return None if settings.get("do_normalize", False) else AudioPreprocessing(rate, length)


def _numbers(value: object, default: float) -> tuple[float, ...]:
    return tuple(float(item) for item in value) if isinstance(value, list) and value else (default,)
