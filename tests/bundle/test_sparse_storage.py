"""Packing a model file without its zeros, and the three readers of what comes out."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeopt.bundle import sparse_storage
from edgeopt.bundle.sparse_storage import compare, pack, unpack
from edgeopt.bundle.templates import unpack as template
from edgeopt.errors import DataError, EdgeoptError

TEMPLATES = Path(template.__file__).parent


def _weights(count: int, zeros: float, dtype: str = "float32", seed: int = 0) -> bytes:
    random_ = np.random.default_rng(seed)
    values = random_.normal(size=count) * (50 if dtype == "int8" else 1)
    values[random_.random(count) < zeros] = 0
    return values.astype(dtype).tobytes()


CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\x07",
    "all zero": bytes(70_001),
    "no zero": bytes(range(1, 256)) * 20,
    "fp32, 80 % zeros": _weights(40_000, 0.8),
    "fp32 at an odd offset": b"abc" + _weights(40_000, 0.8) + b"z",
    "fp16": _weights(30_001, 0.6, "float16"),
    "int8": _weights(90_001, 0.7, "int8"),
    "one word in a thousand": _weights(40_000, 0.999),
    "gaps longer than 255": bytes(3000) + b"\x05" + bytes(255) + b"\x06" + bytes(254) + b"\x07",
    "several segments": _weights(600_000, 0.9),
}


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Path], subprocess.CompletedProcess[str]]:
    """A program around unpack.hpp, with zlib."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "main.cpp").write_text(
        """#include "unpack.hpp"
        #include <fstream>
        #include <iostream>
        #include <iterator>
        int main(int, char** names) {
          std::ifstream in(names[1], std::ios::binary);
          const std::vector<char> data((std::istreambuf_iterator<char>(in)), {});
          try {
            const auto model = edgeopt::unpack(reinterpret_cast<const std::uint8_t*>(data.data()), data.size());
            std::ofstream(names[2], std::ios::binary).write(reinterpret_cast<const char*>(model.data()), model.size());
          } catch (const std::runtime_error& error) { std::cout << error.what(); return 1; }
        }"""
    )
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{TEMPLATES}"]
    program = str(folder / "with_zlib")
    built = subprocess.run(
        [compiler, *flags, "-DEDGEOPT_UNPACK_ZLIB", "-o", program, str(folder / "main.cpp"), "-lz"],
        capture_output=True,
        text=True,
    )
    if "zlib.h" in built.stderr or "-lz" in built.stderr:
        pytest.skip("no zlib headers here")
    assert not built.returncode, built.stderr

    def run(packed: Path, destination: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, str(packed), str(destination)], capture_output=True, text=True)

    return run


def _file(folder: Path, content: bytes) -> Path:
    file = folder / "model.tflite"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflated"])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_reader_restores_every_byte(
    name: str, deflate: bool, tmp_path: Path, cpp: Callable[[Path, Path], subprocess.CompletedProcess[str]]
) -> None:
    file = _file(tmp_path, CONTENTS[name])
    packed = pack(file, tmp_path / "model.tflite.packed", deflate)
    assert packed.original_size == len(CONTENTS[name])
    assert packed.size == packed.path.stat().st_size
    assert packed.sha256 == hashlib.sha256(CONTENTS[name]).hexdigest()
    unpack(packed.path, tmp_path / "restored")
    assert (tmp_path / "restored").read_bytes() == CONTENTS[name]
    done = cpp(packed.path, tmp_path / "from_cpp")
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "from_cpp").read_bytes() == CONTENTS[name]


def test_zeros_cost_a_bit_and_long_gaps_less(tmp_path: Path) -> None:
    sizes = compare(_file(tmp_path, _weights(100_000, 0.8)))
    assert sizes.plain == 400_000
    assert sizes.packed < 0.245 * sizes.plain  # a fifth of the words, and a bit for each of all
    assert sizes.packed_deflated < sizes.deflated
    sparse = compare(_file(tmp_path, _weights(100_000, 0.999)))
    assert sparse.packed < 0.004 * sparse.plain


def test_misaligned_words_are_found(tmp_path: Path) -> None:
    aligned = compare(_file(tmp_path, _weights(100_000, 0.8)))
    shifted = compare(_file(tmp_path, b"\x01" + _weights(100_000, 0.8)))
    assert shifted.packed <= aligned.packed + 8


def test_compare_tells_what_pack_writes(tmp_path: Path) -> None:
    file = _file(tmp_path, CONTENTS["fp32, 80 % zeros"])
    sizes = compare(file)
    assert pack(file, tmp_path / "a").size == sizes.packed_deflated
    assert pack(file, tmp_path / "b", deflate=False).size == sizes.packed


def test_the_same_file_packs_to_the_same_bytes(tmp_path: Path) -> None:
    file = _file(tmp_path, CONTENTS["int8"])
    assert pack(file, tmp_path / "a").path.read_bytes() == pack(file, tmp_path / "b").path.read_bytes()


def _damaged() -> dict[str, Callable[[bytes], bytes]]:
    header, segment = template.HEADER.size, template.SEGMENT
    lying = segment.pack(template.BITMASK, 4, 0, 0, 0xFFFFFFFF, 4) + b"abcd"
    bomb = segment.pack(template.RAW, 1, 0, 1, 64, 40) + sparse_storage.zlib.compress(bytes(30_000))[:40]
    past_the_end = segment.pack(template.GAPS, 1, 0, 0, 8, 6) + (1).to_bytes(4, "little") + b"\x09\x01"
    huge_count = segment.pack(template.GAPS, 1, 0, 0, 8, 4) + b"\xff\xff\xff\xff"

    def instead(content: bytes) -> Callable[[bytes], bytes]:
        return lambda data: data[:12] + (1).to_bytes(4, "little") + data[16:header] + content

    return {
        "is not a packed model file": lambda data: b"notapack" + data[8:],
        "has version 9 of the format": lambda data: data[:8] + (9).to_bytes(4, "little") + data[12:],
        "is cut short": lambda data: data[:-1],
        "is cut short ": lambda data: data[: header - 1],
        "has another length": lambda data: data + b"x",
        "has another length ": lambda data: data[:16] + (2**62).to_bytes(8, "little") + data[24:],
        "SHA-256 differs": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "has a segment of an unknown kind": instead(segment.pack(7, 1, 0, 0, 4, 4) + b"abcd"),
        "has a segment with impossible sizes": instead(lying),
        "has a segment that zlib can't read": instead(bomb),
        "has a segment with impossible sizes ": instead(past_the_end),
        "has a segment with impossible sizes  ": instead(huge_count),
    }


@pytest.mark.parametrize("problem", _damaged())
def test_a_hostile_file_gives_one_clear_line_and_no_result(
    problem: str, tmp_path: Path, cpp: Callable[[Path, Path], subprocess.CompletedProcess[str]]
) -> None:
    good = pack(_file(tmp_path, CONTENTS["int8"]), tmp_path / "good", deflate=False).path.read_bytes()
    packed = tmp_path / "model.packed"
    packed.write_bytes(_damaged()[problem](good))
    with pytest.raises(DataError) as caught:
        unpack(packed, tmp_path / "restored")
    assert problem.strip() in caught.value.line()
    assert str(packed) in caught.value.line()
    assert not (tmp_path / "restored").exists()
    assert not list(tmp_path.glob(".restored*"))
    done = cpp(packed, tmp_path / "from_cpp")
    assert (done.returncode, bool(done.stdout)) == (1, True)
    script = subprocess.run(
        [sys.executable, str(TEMPLATES / "unpack.py"), str(packed), str(tmp_path / "restored")],
        capture_output=True,
        text=True,
    )
    assert (script.returncode, script.stderr) == (1, "")
    assert problem.strip() in script.stdout
    assert script.stdout.count("\n") == 1


def test_random_damage_never_passes(tmp_path: Path) -> None:
    good = pack(_file(tmp_path, CONTENTS["fp32, 80 % zeros"]), tmp_path / "good").path.read_bytes()
    chance = random.Random(0)
    packed = tmp_path / "packed"
    for _ in range(60):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            data[chance.choice([chance.randrange(80), chance.randrange(len(data))])] ^= 1 << chance.randrange(8)
        if bytes(data) == good:
            continue
        packed.write_bytes(data)
        try:
            unpack(packed, tmp_path / "restored")
        except EdgeoptError:
            continue
        # A bit that nothing depends on (a mask's padding): then the content is still right.
        assert (tmp_path / "restored").read_bytes() == CONTENTS["fp32, 80 % zeros"]


def test_a_failed_unpacking_leaves_the_old_file(tmp_path: Path) -> None:
    destination = tmp_path / "model.tflite"
    destination.write_bytes(b"old")
    (tmp_path / "packed").write_bytes(b"EDGEPACK")
    with pytest.raises(DataError, match="is cut short"):
        unpack(tmp_path / "packed", destination)
    assert destination.read_bytes() == b"old"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for action in (pack, unpack):
        with pytest.raises(DataError, match="no such file"):
            action(tmp_path / "absent", tmp_path / "destination")
    with pytest.raises(DataError, match="no such file"):
        compare(tmp_path / "absent")
    file = _file(tmp_path, b"abc")
    with pytest.raises(DataError, match="no such file"):
        pack(file, tmp_path / "nowhere" / "packed")


def test_the_script_stands_alone(tmp_path: Path) -> None:
    packed = pack(_file(tmp_path, CONTENTS["fp16"]), tmp_path / "m.packed")
    shutil.copy(TEMPLATES / "unpack.py", tmp_path)
    command = [sys.executable, "-I", "unpack.py", "m.packed", "out.tflite"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"out.tflite: {packed.original_size} bytes, SHA-256 as packed\n"
    assert (tmp_path / "out.tflite").read_bytes() == CONTENTS["fp16"]
    wrong = subprocess.run([sys.executable, "unpack.py"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stdout.startswith("usage:")


def test_cpp_without_zlib_says_what_it_lacks(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    (tmp_path / "main.cpp").write_text(
        """#include "unpack.hpp"
        #include <cstdio>
        int main() {
          const std::uint8_t one[] = {0};
          try { edgeopt::unpacking::inflate(one, 1, 1); } catch (const std::runtime_error& e) { std::puts(e.what()); }
        }"""
    )
    program = str(tmp_path / "program")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{TEMPLATES}", "-o", program]
    subprocess.run([compiler, *flags, str(tmp_path / "main.cpp")], check=True)
    assert "define EDGEOPT_UNPACK_ZLIB" in subprocess.run([program], capture_output=True, text=True).stdout
