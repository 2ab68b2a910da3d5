"""Pictures -> pixels as the model takes them. Resampling is Pillow's: its filters widen when they shrink a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from edgeopt.datasets.fit import only_input
from edgeopt.errors import ConfigError, DataError, UsageError
from edgeopt.types import Array, ImagePreprocessing, TensorSpec

#: Formats that may be opened; leaves out those whose decoders run helper programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class ImageTransform:
    """Applies an `ImagePreprocessing`; see there for the order of steps.

    Pictures are turned upright by their EXIF orientation first, as camera and gallery code in apps does. Halves are
    rounded as torchvision does (`Resize`, `CenterCrop`): sides down, offsets to even.
    """

    def __init__(self, preprocessing: ImagePreprocessing, inputs: tuple[TensorSpec, ...]) -> None:
        self._p = preprocessing
        self._spec = only_input(inputs, "pictures")
        self._mean = np.asarray(preprocessing.mean, np.float32).reshape(-1, 1, 1)
        self._std = np.asarray(preprocessing.std, np.float32).reshape(-1, 1, 1)
        self._takes_bytes = self._spec.dtype == "uint8"
        plain = preprocessing.rescale == 1 and not any(preprocessing.mean) and set(preprocessing.std) == {1.0}
        if self._takes_bytes and not plain:
            raise ConfigError(
                "the model takes uint8 pixels, so they can't be normalised",
                where=f"input {self._spec.name!r}",
                fix="set rescale = 1, mean = 0 and std = 1",
            )

    def __call__(self, raw: object, where: str) -> dict[str, Array] | None:
        if isinstance(raw, Path | Image.Image):
            picture = _decode(raw, self._p.channels, where)
        elif (pixels := _pixels_of(raw)) is not None and not self._takes_bytes:
            picture = _convert(Image.fromarray(pixels), self._p.channels)
        else:
            return None
        return {self._spec.name: self._normalise(self._resize(picture))}

    def _resize(self, picture: Image.Image) -> Image.Image:
        p, resample = self._p, FILTERS[self._p.interpolation]
        if p.crop_fraction is not None:
            side = max(1, int(p.crop_fraction * min(picture.size)))
            picture = _center(picture, side, side)
        if p.resize_shorter is None:
            return picture.resize((p.width, p.height), resample)
        width, height = picture.size
        if width <= height:
            size = (p.resize_shorter, max(1, int(p.resize_shorter * height / width)))
        else:
            size = (max(1, int(p.resize_shorter * width / height)), p.resize_shorter)
        return _center(picture.resize(size, resample), p.width, p.height)

    def _normalise(self, picture: Image.Image) -> Array:
        pixels = np.asarray(picture)
        # Planes first: arithmetic along a last axis of three is several times slower than along whole planes.
        planes = np.ascontiguousarray(pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
        if not self._takes_bytes:
            planes = planes.astype(np.float32)
            planes /= np.float32(self._p.rescale)
            planes -= self._mean
            planes /= self._std
        if self._p.layout == "NHWC":
            planes = np.ascontiguousarray(planes.transpose(1, 2, 0))
        return planes[np.newaxis]


def default_preprocessing(inputs: tuple[TensorSpec, ...]) -> ImagePreprocessing:
    """What is assumed for pictures when the model declares nothing: squeeze to the input's size, pixels / 255.

    Raises UsageError when the input isn't a picture of a known size.
    """
    spec = only_input(inputs, "pictures")
    layout = spec.layout
    if layout is None and len(spec.shape) == 4:
        layout = "NCHW" if spec.shape[1] in (1, 3) else "NHWC" if spec.shape[3] in (1, 3) else None
    if layout is not None and len(spec.shape) == 4:
        _, a, b, c = spec.shape
        channels, height, width = (a, b, c) if layout == "NCHW" else (c, a, b)
        if isinstance(height, int) and isinstance(width, int) and (channels == 1 or channels == 3):
            rescale = 1.0 if spec.dtype == "uint8" else 255.0
            return ImagePreprocessing(height, width, channels=1 if channels == 1 else 3, rescale=rescale, layout=layout)
    raise UsageError(
        "the shape doesn't tell how pictures become this input",
        where=f"input {spec.name!r}",
        fix="declare preprocessing (kind = 'image', height, width)",
    )


def _decode(source: Path | Image.Image, channels: int, where: str) -> Image.Image:
    """The upright picture in 8-bit grey or RGB; a picture that was opened elsewhere may still have to be read."""
    try:
        with Image.open(source, formats=FORMATS) if isinstance(source, Path) else source.copy() as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            return _convert(picture, channels)
    except UnidentifiedImageError as error:
        raise DataError("is not a JPEG, PNG, WebP or BMP picture", where=where) from error
    except Exception as error:  # Pillow's decoders raise whatever the corrupt bytes lead them to.
        raise DataError(f"can't be decoded: {error}", where=where, fix="replace or remove it") from error


def _convert(picture: Image.Image, channels: int) -> Image.Image:
    """To 8-bit grey or RGB. An alpha channel is dropped."""
    mode = "L" if channels == 1 else "RGB"
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which turns nearly every pixel white.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == mode:
        picture.load()
        return picture
    return picture.convert(mode)


def _center(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    return picture.crop((left, top, left + width, top + height))


def _pixels_of(raw: object) -> Array | None:
    """The array if it holds a picture: uint8, (H, W) or (H, W, 1 or 3 or 4)."""
    if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8:
        return None
    if raw.ndim == 3 and raw.shape[2] == 1:
        raw = raw[:, :, 0]
    return raw if raw.ndim == 2 or (raw.ndim == 3 and raw.shape[2] in (3, 4)) else None
