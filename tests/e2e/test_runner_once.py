"""edgeopt-runner on files, built for this machine: outputs, figures, exit codes, and the one line that tells why."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from edgeopt.native import SOURCES
from edgeopt.types import Format

pytestmark = pytest.mark.e2e

Runners = Callable[[Format], Path]


class Stored(NamedTuple):
    """A network of edgeopt/native/selftest with an input and the output to it."""

    model: Path
    input: str
    output: Path
    dtype: str

    @classmethod
    def of(cls, format_: Format, model: str, dtype: str, shape: str) -> Stored:
        folder = SOURCES / "selftest"
        given = f"{folder / f'{format_}_input.bin'}:{dtype}:{shape}"
        return cls(folder / model, given, folder / f"{format_}_output.bin", dtype)


STORED: Mapping[Format, Stored] = {
    "litert": Stored.of("litert", "model.tflite", "int8", "1,16,16,3"),
    "onnx": Stored.of("onnx", "model.onnx", "uint8", "1,3,16,16"),
    "executorch": Stored.of("executorch", "model.pte", "int8", "1,3,16,16"),
}


def _once(runner: Path, *words: object, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    if home is not None:
        environment |= {"HOME": str(home)}
    command = [str(runner), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("format_", STORED)
def test_writes_outputs_and_figures(host_runner: Runners, tmp_path: Path, format_: Format) -> None:
    model, given, output, dtype = STORED[format_]
    done = _once(
        *(host_runner(format_), model, "--threads", 2, "--mark", "--input", given, "--output-dir", tmp_path),
        *("--warmup", 1, "--runs", 3, "--json", tmp_path / "run.json"),
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "run.json").read_text())
    assert len(figures["latencies_ms"]) == 3
    assert all(ms >= 0 for ms in (figures["load_ms"], figures["first_ms"], *figures["latencies_ms"]))
    assert 1000 < figures["peak_kb"] < 10_000_000
    (entry,) = figures["outputs"]
    assert (entry["dtype"], entry["shape"]) == (dtype, [1, 10])
    wanted, found = np.fromfile(output, dtype).astype(int), np.fromfile(tmp_path / entry["file"], dtype).astype(int)
    np.testing.assert_allclose(found, wanted, atol=1)


def test_names_and_paths_may_hold_what_separates_them(host_runner: Runners, tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    names = ("x", "x=1")
    graph = helper.make_graph(
        [helper.make_node("Sub", [*names], ["difference"])],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in names],
        [helper.make_tensor_value_info("difference", TensorProto.FLOAT, [2])],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(tmp_path / "m.onnx"))
    (tmp_path / "a=1:2").write_bytes(np.float32([5, 7]).tobytes())
    (tmp_path / "b").write_bytes(np.float32([1, 10]).tobytes())
    a, b = f"{tmp_path}/a=1:2:float32:2", f"{tmp_path}/b:float32:2"
    for given in ((a, b), (f"x=1={b}", f"x={a}")):
        words = [word for one in given for word in ("--input", one)]
        done = _once(host_runner("onnx"), tmp_path / "m.onnx", *words, "--output-dir", tmp_path)
        assert done.returncode == 0, done.stderr
        assert np.fromfile(tmp_path / "output_0.bin", np.float32).tolist() == [4, -3]


@pytest.mark.parametrize("format_", STORED)
@pytest.mark.parametrize("content", [None, b"", b"no model at all" * 99], ids=["missing", "empty", "text"])
def test_a_file_that_is_none_is_one_line(
    host_runner: Runners, tmp_path: Path, format_: Format, content: bytes | None
) -> None:
    path = tmp_path / STORED[format_].model.name
    if content is not None:
        path.write_bytes(content)
    done = _once(host_runner(format_), path, "--runs", 1)
    assert done.returncode == 1
    assert _last(done).startswith("edgeopt-runner: ")
    served = _once(host_runner(format_), path, "--serve")
    assert served.returncode == 1
    assert list(json.loads(served.stdout)) == ["error"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([], 2, "no model"),
        (["m", "--serve", "--json", "f"], 2, "--serve takes no files"),
        (["m", "--threads", "0"], 2, "at least 1"),
        (["m", "--runs"], 2, "lacks its value"),
        (["m", "--colour"], 2, "unknown argument --colour"),
        (["m", "n"], 2, "unknown argument n"),
        (["MODEL"], 1, "got 0 inputs, the model takes 1"),
        (["MODEL", "--input", "x.bin"], 2, "is not [NAME=]FILE:TYPE:SIZES"),
        (["MODEL", "--input", "x.bin:float8:1"], 2, "is no element type"),
        (["MODEL", "--input", "none:int8:1,16,16,3"], 1, "can't read none"),
        (["MODEL", "--input", "DIR/short:int8:1,16,16,3"], 1, "768 bytes"),
        (["MODEL", "--input", "DIR/short:int8:4"], 1, "has the shape (4)"),
        (["MODEL", "--input", "GOOD", "--input", "GOOD"], 1, "got 2 inputs, the model takes 1"),
        (["MODEL", "--input", "GOOD", "--output-dir", "DIR/none"], 1, "can't write"),
    ],
)
def test_wrong_usage(host_runner: Runners, tmp_path: Path, words: list[str], code: int, told: str) -> None:
    (tmp_path / "short").write_bytes(b"1234")
    stored = STORED["litert"]
    filled = [
        word.replace("MODEL", str(stored.model)).replace("DIR", str(tmp_path)).replace("GOOD", stored.input)
        for word in words
    ]
    done = _once(host_runner("litert"), *filled)
    assert done.returncode == code
    assert told in done.stderr


def test_a_full_disk_is_told(host_runner: Runners) -> None:
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full")
    model, given, _, _ = STORED["litert"]
    done = _once(host_runner("litert"), model, "--input", given, "--json", "/dev/full")
    assert done.returncode == 1
    assert _last(done) == "edgeopt-runner: can't write /dev/full"


def test_onnxruntime_collects_no_usage_data(host_runner: Runners, tmp_path: Path) -> None:
    model, given, _, _ = STORED["onnx"]
    done = _once(host_runner("onnx"), model, "--input", given, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
