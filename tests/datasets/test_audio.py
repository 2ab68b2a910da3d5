"""WAV files become waveforms of the declared rate and length."""

from __future__ import annotations

import struct
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from edgeopt.datasets import open_dataset
from edgeopt.errors import DataError, MissingError, UsageError
from edgeopt.types import Array, AudioPreprocessing, TensorSpec


def spec(length: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec("audio", (1, length), "float32"),)


def tone(count: int, rate: int, hertz: float = 440.0) -> Array:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(count) / rate)


def write(path: Path, frames: Array, rate: int = 16_000, width: int = 2) -> Path:
    """`frames`: (n,) or (n, channels) in -1..1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    full = 2 ** (8 * width - 1)
    whole = np.round(frames * (full - 1)).astype(np.int64)
    data = (whole + 128).astype(np.uint8).tobytes() if width == 1 else b""
    if width > 1:
        data = whole.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if frames.ndim == 1 else frames.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


def first(folder: Path, length: int, **declared: object) -> Array:
    preprocessing = AudioPreprocessing(num_samples=length, **declared)
    return open_dataset(str(folder), spec(length), preprocessing)[0].inputs["audio"]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pcm_widths(tmp_path: Path, width: int) -> None:
    frames = np.array([-1, -0.5, 0, 0.25, 0.999])
    write(tmp_path / "a.wav", frames, width=width)
    got = first(tmp_path, 5)
    assert (got.dtype, got.shape) == (np.dtype("float32"), (1, 5))
    np.testing.assert_allclose(got[0], frames, atol=2.0 ** (2 - 8 * width) + 1e-7)


def test_stereo_is_averaged_and_silence_is_appended(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.array([[0.5, 0.25], [-0.5, 0.5]]))
    np.testing.assert_allclose(first(tmp_path, 4)[0], [0.375, 0, 0, 0], atol=1e-4)


def test_long_recordings_are_cut_and_normalised(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.full(100, 0.5))
    np.testing.assert_allclose(first(tmp_path, 3, mean=0.25, std=0.5)[0], [0.5] * 3, atol=1e-4)


def test_channel_axis(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.zeros(4))
    inputs = (TensorSpec("audio", (1, 1, 4), "float32"),)
    dataset = open_dataset(str(tmp_path), inputs, AudioPreprocessing(num_samples=4, channel_axis=True))
    assert dataset[0].inputs["audio"].shape == (1, 1, 4)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_the_tone(tmp_path: Path, rate: int) -> None:
    pytest.importorskip("scipy")
    write(tmp_path / "a.wav", tone(rate, rate), rate)
    got = first(tmp_path, 16_000)[0]
    np.testing.assert_allclose(got[200:-200], tone(16_000, 16_000)[200:-200], atol=2e-3)


@pytest.mark.parametrize("rate", [11_025, 44_100])
def test_reading_only_what_is_heard_gives_the_same_as_reading_all(tmp_path: Path, rate: int) -> None:
    signal = pytest.importorskip("scipy.signal")
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, rate)
    write(tmp_path / "a.wav", noise, rate)
    with wave.open(str(tmp_path / "a.wav")) as file:
        stored = np.frombuffer(file.readframes(rate), "<i2").astype(np.float32) / np.float32(32768)
    divisor = int(np.gcd(rate, 16_000))
    whole = signal.resample_poly(stored, 16_000 // divisor, rate // divisor)
    np.testing.assert_array_equal(first(tmp_path, 1_000)[0], whole[:1_000])


def test_class_folders(tmp_path: Path) -> None:
    write(tmp_path / "yes/1.wav", np.zeros(4))
    write(tmp_path / "no/1.WAV", np.zeros(4))
    dataset = open_dataset(str(tmp_path), spec(4), AudioPreprocessing(num_samples=4))
    assert dataset.class_names == ("no", "yes")
    assert [(s.name, s.label) for s in dataset] == [("no/1.WAV", 0), ("yes/1.wav", 1)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_floats_and_the_extensible_header_go_through_scipy(tmp_path: Path, dtype: str) -> None:
    wavfile = pytest.importorskip("scipy.io.wavfile")
    frames = np.array([[-1, 0], [0.5, 0.5], [0.25, 0.75]])
    full = 1 if dtype.startswith("float") else 2**31 - 1
    wavfile.write(tmp_path / "a.wav", 16_000, (frames * full).astype(dtype))
    np.testing.assert_allclose(first(tmp_path, 3)[0], [-0.5, 0.5, 0.5], atol=1e-6)


def test_float_files_with_unknown_chunks_are_read_and_truncated_ones_are_not(tmp_path: Path) -> None:
    wavfile = pytest.importorskip("scipy.io.wavfile")
    wavfile.write(tmp_path / "a.wav", 16_000, np.full(100, 0.5, np.float32))
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(whole[:12] + b"odd " + struct.pack("<I", 4) + b"what" + whole[12:])
    (tmp_path / "c.wav").write_bytes(whole[:-100])
    dataset = open_dataset(str(tmp_path), spec(100), AudioPreprocessing(num_samples=100))
    assert dataset[1].inputs["audio"].mean() == 0.5
    with pytest.raises(DataError, match=r"c.wav: is (truncated|not a WAV file)"):
        dataset[2]


def test_extensible_24_bit(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    data = np.array([2**22, -(2**22)], "<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    guid = bytes.fromhex("0100000000001000800000aa00389b71")
    fmt = struct.pack("<HHIIHHHHI", 0xFFFE, 1, 16_000, 48_000, 3, 24, 22, 24, 4) + guid
    chunks = b"WAVE" + b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(data)) + data
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
    np.testing.assert_allclose(first(tmp_path, 2)[0], [0.5, -0.5])


def test_bad_recordings_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.zeros(4))
    whole = write(tmp_path / "whole/x.wav", np.zeros(100)).read_bytes()
    (tmp_path / "whole/x.wav").unlink()
    (tmp_path / "b.wav").write_bytes(whole[:100])
    (tmp_path / "c.wav").write_bytes(b"hello")
    (tmp_path / "d.wav").write_bytes(whole[:30])
    write(tmp_path / "e.wav", np.zeros(0))
    dataset = open_dataset(str(tmp_path), spec(100), AudioPreprocessing(num_samples=100))
    for index, message in [
        (1, "b.wav: is truncated"),
        (2, "c.wav: is not a WAV file"),
        (3, "d.wav: is not a WAV file"),
        (4, "e.wav: holds no sound"),
    ]:
        with pytest.raises(DataError, match=message):
            dataset[index]


def test_without_scipy_only_resampling_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("scipy", "scipy.signal", "scipy.io"):
        monkeypatch.setitem(sys.modules, module, None)
    write(tmp_path / "same/a.wav", np.zeros(4))
    write(tmp_path / "other/a.wav", np.zeros(4), rate=8_000)
    assert first(tmp_path / "same", 4).shape == (1, 4)
    with pytest.raises(MissingError, match=r"resampling 8000 Hz to 16000 Hz needs .* pip install 'edgeopt\[audio\]'"):
        first(tmp_path / "other", 4)


def test_a_rate_must_be_declared(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.zeros(4))
    with pytest.raises(UsageError, match="declare preprocessing"):
        open_dataset(str(tmp_path), spec(4), None)
