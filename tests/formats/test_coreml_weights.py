"""The weight file, written here byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from edgeopt.formats.coreml_weights import WeightFile, decode


def written(path: Path, data: bytes, *, version: int = 2, sentinel: int = 0xDEADBEEF, size: int | None = None) -> Path:
    header = struct.pack("<II", 1, version).ljust(64, b"\0")
    blob = struct.pack("<IIQQQ", sentinel, 2, len(data) if size is None else size, 128, 0).ljust(64, b"\0")
    path.write_bytes(header + blob + data)
    return path


def test_reads_a_blob(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    file = WeightFile(written(tmp_path / "weight.bin", values.tobytes()))
    np.testing.assert_array_equal(file.read(64, "fp32", (2, 3)), values)
    assert file.stored_bytes(64) == 24


@pytest.mark.parametrize("damage", [{"version": 1}, {"sentinel": 1}, {"size": 1000}])
def test_damage_is_noticed(tmp_path: Path, damage: dict[str, int]) -> None:
    path = written(tmp_path / "weight.bin", b"1234", **damage)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight"):
        WeightFile(path).read(64, "fp32", (1,))


@pytest.mark.parametrize("offset", [128, 10_000])
def test_an_offset_beyond_the_file(tmp_path: Path, offset: int) -> None:
    with pytest.raises(ValueError, match="beyond the end"):
        WeightFile(written(tmp_path / "weight.bin", b"1234")).read(offset, "fp32", (1,))


@pytest.mark.parametrize(
    ("dtype", "data", "wanted"),
    [
        ("int4", [0x8F, 0x07], [-1, -8, 7]),
        ("uint4", [0x8F], [15, 8]),
        ("uint2", [0b11_10_01_00], [0, 1, 2, 3]),
        ("uint3", [0b11_010_001, 0b0], [1, 2, 3]),
        ("uint1", [0b101], [1, 0, 1]),
        ("int8", [0xFF, 0x7F], [-1, 127]),
    ],
)
def test_packed_values(dtype: str, data: list[int], wanted: list[int]) -> None:
    found = decode(np.array(data, np.uint8), dtype, (len(wanted),))
    np.testing.assert_array_equal(found, wanted)
