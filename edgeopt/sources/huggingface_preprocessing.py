"""What the files beside a Hugging Face model say about preprocessing, as declared data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from edgeopt.types import AudioPreprocessing, Dim, ImagePreprocessing, Preprocessing, TensorSpec, TextPreprocessing

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
            return _image(_settings(directory), inputs[0])
        case "input_values":
            return _audio(_settings(directory), inputs[0])
        case _:
            return None


def _settings(directory: Path) -> Mapping[str, object]:
    path = directory / "preprocessor_config.json"
    settings: object = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return settings if isinstance(settings, dict) else {}


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
