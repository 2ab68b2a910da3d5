"""Tensors, samples and what is done to data before a model sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edgeopt.types.names import Array, DType


@dataclass(frozen=True, slots=True)
class Dim:
    """A named dynamic dimension, e.g. `Dim("batch", 1, 16)`; both bounds are inclusive."""

    name: str
    min: int = 1
    max: int = 512


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: how the tensor is called in samples, manifests and messages.
        shape: one entry per dimension, batch included; a `Dim` where the size is free.
        dtype: element type.
        layout: "NCHW" for images that a channel-last runtime may take as NHWC; None where order has no such meaning.
        padding: fills the end of a shorter sample's dynamic dimension where samples share a batch; None where nothing
            may be filled in.
    """

    name: str
    shape: tuple[int | Dim, ...]
    dtype: DType
    layout: Literal["NCHW", "NHWC"] | None = None
    padding: int | None = None

    @property
    def is_dynamic(self) -> bool:
        return any(isinstance(d, Dim) for d in self.shape)


@dataclass(frozen=True, slots=True)
class ImagePreprocessing:
    """Picture file -> float32 tensor (1, C, H, W) or (1, H, W, C).

    In this order: convert to `channels` (1 grey, 3 RGB); if `crop_fraction`, keep the central
    square of side crop_fraction * min(height, width); if `resize_shorter`, scale the shorter side to it; then
    resize to (height, width) or, after `resize_shorter`, cut the central (height, width); finally
    `(pixel / rescale - mean) / std`, pixel in 0..255.
    """

    height: int
    width: int
    channels: Literal[1, 3] = 3
    crop_fraction: float | None = None
    resize_shorter: int | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    rescale: float = 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    kind: Literal["image"] = "image"


@dataclass(frozen=True, slots=True)
class TextPreprocessing:
    """Text -> token ids (1, max_length) through a Hugging Face tokenizer.

    `tokenizer` is a tokenizer.json file or a directory that holds one; it travels in the bundle. The tokenizer's
    fields (input_ids, attention_mask, token_type_ids) are matched to the model's inputs by name, or by order.

    A network that writes text learns from pairs: `target_key` names the text to be written. Its tokens become the
    label, and, one later and behind `start_ids`, the input decoder_input_ids. A decoder-only network reads its own
    target: the label then is the text itself, one earlier (position k holds token k + 1).
    `prefix` is put before every text ("translate English to German: ").
    """

    tokenizer: str
    max_length: int = 128
    padding: Literal["max_length", "none"] = "max_length"
    text_keys: tuple[str, ...] = ("text",)
    kind: Literal["text"] = "text"
    target_key: str | None = None
    target_max_length: int = 128
    start_ids: tuple[int, ...] = ()
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class AudioPreprocessing:
    """WAV file -> float32 mono waveform (1, num_samples) in -1..1, resampled, then cut or zero-padded at the end."""

    sample_rate: int = 16_000
    num_samples: int = 16_000
    mean: float = 0.0
    std: float = 1.0
    channel_axis: bool = False
    kind: Literal["audio"] = "audio"


@dataclass(frozen=True, slots=True)
class ArrayPreprocessing:
    """Array -> `(value / rescale - mean) / std` per channel along `channel_axis` (of the batched array)."""

    rescale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channel_axis: int = 1
    kind: Literal["array"] = "array"


Preprocessing = ImagePreprocessing | TextPreprocessing | AudioPreprocessing | ArrayPreprocessing


@dataclass(frozen=True, slots=True)
class Sample:
    """One item of a data set, ready for the model.

    Attributes:
        inputs: model input name -> array, batch dimension of 1 included.
        label: class index, or an array for other tasks; None when unlabelled.
        name: where it came from, for messages ("cat/001.jpg", "row 17").
        references: texts of which a network that writes should write one.
    """

    inputs: Mapping[str, Array]
    label: int | Array | None
    name: str
    references: tuple[str, ...] = ()
