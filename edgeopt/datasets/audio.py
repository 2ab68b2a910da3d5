"""WAV files -> waveforms of a fixed rate and length."""

from __future__ import annotations

import math
import warnings
import wave
from pathlib import Path

import numpy as np

from edgeopt.datasets.fit import only_input
from edgeopt.errors import DataError, MissingError
from edgeopt.types import Array, AudioPreprocessing, TensorSpec

#: Half the length of scipy.signal.resample_poly's default filter, in periods of the slower of the two rates.
FILTER_PERIODS = 10


class AudioTransform:
    """Applies an `AudioPreprocessing`.

    In this order: full scale to -1..1, mean over the channels, polyphase resampling, cut or padded with silence at
    the end, `(value - mean) / std`. No more of a file is read than the model hears.
    """

    def __init__(self, preprocessing: AudioPreprocessing, inputs: tuple[TensorSpec, ...]) -> None:
        self._p = preprocessing
        self._spec = only_input(inputs, "recordings")

    def __call__(self, raw: object, where: str) -> dict[str, Array] | None:
        if not isinstance(raw, Path):
            return None
        p = self._p
        waveform, rate = _read(raw, p, where)
        if rate != p.sample_rate:
            waveform = _resample(waveform, rate, p.sample_rate)
        heard = np.zeros(p.num_samples, np.float32)
        length = min(p.num_samples, len(waveform))
        heard[:length] = waveform[:length]
        value = ((heard - np.float32(p.mean)) / np.float32(p.std))[np.newaxis]
        return {self._spec.name: value[np.newaxis] if p.channel_axis else value}


def _read(path: Path, p: AudioPreprocessing, where: str) -> tuple[Array, int]:
    """(mono waveform in -1..1, sample rate in Hz); only as many frames as are heard."""
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            frames = min(file.getnframes(), _frames_heard(rate, p))
            data = file.readframes(frames)
    except wave.Error as error:
        if "unknown format" in str(error):
            return _read_with_scipy(path, p, where)
        raise DataError(f"is not a WAV file: {error}", where=where) from error
    except (OSError, EOFError, ZeroDivisionError) as error:
        raise DataError(f"is not a WAV file: {error or 'it ends too early'}", where=where) from error
    if len(data) < frames * channels * width:
        raise DataError("is truncated", where=where, fix="replace or remove it")
    return _mono(_from_pcm(data, width).reshape(-1, channels), rate, where), rate


def _read_with_scipy(path: Path, p: AudioPreprocessing, where: str) -> tuple[Array, int]:
    """Floats and the extensible header, which the standard library can't read."""
    try:
        from scipy.io import wavfile
    except ImportError as error:
        raise MissingError.extra("scipy", "audio", f"reading {where} (not plain PCM)") from error
    try:
        # scipy only warns when a file ends too early, and as loudly about chunks that it rightly skips.
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            rate, data = wavfile.read(path)
    except Exception as error:  # scipy raises what the bytes lead it to: ValueError, struct.error, UnboundLocalError.
        raise DataError(f"is not a WAV file: {error}", where=where) from error
    if any("EOF" in str(note.message) for note in notes):
        raise DataError("is truncated", where=where, fix="replace or remove it")
    frames = np.asarray(data)[: _frames_heard(rate, p)]
    if frames.dtype.kind == "u":
        frames = (frames.astype(np.float32) - 128) / 128
    elif frames.dtype.kind == "i":
        # 24 bits come left-aligned in 32.
        frames = frames.astype(np.float32) / np.float32(2 ** (8 * frames.dtype.itemsize - 1))
    return _mono(frames.reshape(len(frames), -1), rate, where), int(rate)


def _mono(frames: Array, rate: int, where: str) -> Array:
    if not frames.size or rate < 1:
        raise DataError("holds no sound", where=where, fix="replace or remove it")
    mono: Array = frames.mean(axis=1, dtype=np.float32)
    return mono


def _from_pcm(data: bytes, width: int) -> Array:
    """Little-endian PCM of `width` bytes (1 is unsigned) as floats in -1..1."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:
        # Put each sample in the upper three bytes of an int32, which keeps its sign.
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
    return np.frombuffer(data, f"<i{width}").astype(np.float32) / np.float32(2 ** (8 * width - 1))


def _frames_heard(rate: int, p: AudioPreprocessing) -> int:
    """How many frames of the file decide the first `num_samples` after resampling, filter tail included."""
    if rate < 1 or rate == p.sample_rate:
        return p.num_samples
    tail = FILTER_PERIODS * max(1.0, rate / p.sample_rate)
    return math.ceil(p.num_samples * rate / p.sample_rate + tail) + 1


def _resample(waveform: Array, rate: int, wanted: int) -> Array:
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise MissingError.extra("scipy", "audio", f"resampling {rate} Hz to {wanted} Hz") from error
    divisor = math.gcd(rate, wanted)
    return np.asarray(resample_poly(waveform, wanted // divisor, rate // divisor), np.float32)
