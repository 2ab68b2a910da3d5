from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edgeopt.emulator import counting
from edgeopt.emulator.cores import Core, core_for
from edgeopt.emulator.counting import count, count_program
from edgeopt.emulator.counting_functions import Function, Functions
from edgeopt.emulator.installation import Emulator, Manifest
from edgeopt.emulator.toolchain import c_compiler
from edgeopt.errors import ConversionError, MissingError
from edgeopt.types import Format, Signature, SignatureTensor

CORE = core_for("cortex-a76")
NOP, SDOT = "1f2003d5", "2094824e"
CLASSES = ["dotprod", "other"]


@dataclass(frozen=True, slots=True)
class FakeEmulator(Emulator):
    """Runs a Python script of ours where the real one would run QEMU; its arguments are the command that it got."""

    script: str

    def command(self, core: Core, program: Sequence[str], *, plugin: str | None = None) -> list[str]:
        assert plugin is not None
        return [sys.executable, "-c", self.script, core.name, plugin, *program]

    def runner(self, format: Format) -> Path:  # noqa: A002
        return Path(f"/runner-{format}")


def emulator(script: str, directory: Path = Path("/emulator")) -> FakeEmulator:
    return FakeEmulator(directory, Manifest({}, {}, {}, {}), script)


def writes(counts: object) -> str:
    return f"open('counts.json', 'w').write({json.dumps(counts)!r})"


def counted(*inferences: list[int], threads: int = 1, blocks: list[list[object]] | None = None) -> dict[str, object]:
    return {
        "threads": threads,
        "classes": CLASSES,
        "inferences": inferences,
        "files": ["/nowhere/libkernels.so", "/nowhere/libc.so.6"],
        "blocks": blocks if blocks is not None else [[0, 64, 10, SDOT + SDOT + NOP, "aab"], [-1, 0, 1, NOP, "b"]],
    }


def test_reports_the_last_inference_and_how_far_the_one_before_was(tmp_path: Path) -> None:
    found = count_program(emulator(writes(counted([90, 90], [20, 15], [20, 11]))), CORE, ["p"], tmp_path, "model")
    assert (found.total, found.spread, found.threads) == (31, 4, 1)
    assert list(found.classes.items()) == [("dotprod", 20), ("other", 11)]


def test_names_the_functions_that_take_the_most(tmp_path: Path) -> None:
    found = count_program(emulator(writes(counted([20, 11], [20, 11]))), CORE, ["p"], tmp_path, "model")
    first, second = found.hot
    assert (first.library, first.name, first.instructions) == ("libkernels.so", None, 30)
    assert list(first.classes.items()) == [("dotprod", 20), ("other", 10)]
    assert (second.library, second.instructions) == ("", 1)


def test_threads_are_told(tmp_path: Path) -> None:
    found = count_program(emulator(writes(counted([1, 1], [1, 1], threads=3))), CORE, ["p"], tmp_path, "model")
    assert found.threads == 3


def test_without_a_model_of_the_core_there_are_no_cycles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = count_program(emulator(writes(counted([20, 11], [20, 11]))), CORE, ["p"], tmp_path, "model")
    assert (found.cycles, found.cycles_model, found.cycles_coverage) == (None, None, None)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            "import sys; sys.stderr.write('INFO: x\\nedgeopt-runner: LiteRT refuses it\\nINFO: y\\n'); sys.exit(1)",
            "model: can't be run on the emulated phone: LiteRT refuses it",
        ),
        (
            "import sys; sys.stderr.write('qemu: uncaught target signal 11\\n'); sys.exit(139)",
            "model: can't be run on the emulated phone: qemu: uncaught target signal 11",
        ),
        ("import sys; sys.exit(3)", "model: can't be run on the emulated phone: exit code 3"),
        ("pass", "model: the counting plugin left no result"),
        ("open('counts.json', 'w').write('{\"threads\": 1')", "model: the counting plugin left no result"),
        (writes({"threads": 1}), "model: the counting plugin left no result"),
        (writes(counted([1, 1])), "model: marked 1 inferences, counting takes 2"),
    ],
)
def test_what_can_go_wrong_is_one_line(tmp_path: Path, script: str, problem: str) -> None:
    with pytest.raises(ConversionError) as caught:
        count_program(emulator(script), CORE, ["p"], tmp_path, "model")
    assert caught.value.line() == problem


def test_a_program_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(counting, "_SECONDS", 0.2)
    with pytest.raises(ConversionError, match="was not counted within"):
        count_program(emulator("import time; time.sleep(60)"), CORE, ["p"], tmp_path, "model")


def test_the_environment_does_not_depend_on_the_callers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOMETHING", "else")
    script = f"import os; assert 'SOMETHING' not in os.environ; {writes(counted([1, 1], [1, 1]))}"
    assert count_program(emulator(script), CORE, ["p"], tmp_path, "model").total == 2


def test_a_comma_in_the_plugins_path_is_doubled(tmp_path: Path) -> None:
    script = f"import sys; assert sys.argv[2] == '/a,,b/counter.so,out=counts.json'; {writes(counted([1, 1], [1, 1]))}"
    assert count_program(emulator(script, Path("/a,b")), CORE, ["p"], tmp_path, "model").total == 2


def signature(*names: str) -> Signature:
    return Signature(
        tuple(SignatureTensor(name, f"native_{name}", ("batch", 2), "int8", "float32") for name in names), ()
    )


@pytest.mark.parametrize(
    ("file_format", "prefix"), [("litert", "native_{}="), ("onnx", "native_{}="), ("executorch", "")]
)
def test_gives_the_runner_its_inputs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file_format: Format, prefix: str
) -> None:
    script = f"""
import sys
core, plugin, runner, model, *rest = sys.argv[1:]
assert core == "cortex-a76" and runner == "/runner-{file_format}" and model == "folder/model.x"
assert open(model).read() == "the model"
assert rest == ["--threads", "1", "--mark",
    "--input", "{prefix.format("a")}input_0.bin:int8:3,2", "--input", "{prefix.format("b")}input_1.bin:int8:1,2",
    "--warmup", "1", "--runs", "2"], rest
assert open("input_0.bin", "rb").read() == bytes([0, 1, 2, 3, 4, 255]), open("input_0.bin", "rb").read()
{writes(counted([1, 1], [1, 1]))}
"""
    (tmp_path / "model.x").write_text("the model", encoding="ascii")
    monkeypatch.setattr(counting, "installed", lambda: emulator(script))
    inputs = {"b": np.zeros((1, 2), np.int8), "a": np.array([[0, 1], [2, 3], [4, -1]], np.int8)}
    assert count(tmp_path / "model.x", file_format, signature("a", "b"), inputs, CORE).total == 2


def test_without_the_emulator_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEOPT_HOME", str(tmp_path))
    with pytest.raises(MissingError):
        count(tmp_path / "model.tflite", "litert", signature(), {}, CORE)


LIBRARY = """
static __attribute__((noinline)) int hidden(int x) { return x * 3 + (x >> 2); }
__attribute__((visibility("default"))) int exported(int x) { return hidden(x) - hidden(x + 1); }
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    try:
        compiler = c_compiler()
    except MissingError:
        pytest.skip("no C compiler on this machine")
    (tmp_path / "library.c").write_text(LIBRARY, encoding="ascii")
    path = tmp_path / "library.so"
    flags = ["-O1", "-fPIC", "-shared", "-s", "-fasynchronous-unwind-tables"]
    subprocess.run([*compiler, *flags, str(tmp_path / "library.c"), "-o", str(path)], check=True)
    return path


def test_a_stripped_library_still_tells_its_exports_and_the_bounds_of_the_rest(library: Path) -> None:
    functions = Functions(library)
    exported = next(f for f in (functions.at(offset) for offset in range(0x1000, 0x2000)) if f.name == "exported")
    inside = functions.at(exported.address + 1)  # the first segments of a library lie at their addresses
    assert inside == exported
    before = functions.at(exported.address - 1)
    assert before.name is None
    assert before.address < exported.address


@pytest.mark.parametrize("content", [b"", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + bytes(26) + b"\xff" * 60, b"text"])
def test_what_is_no_library_has_no_functions(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.so").write_bytes(content)
    assert Functions(tmp_path / "x.so").at(100) == Function(None, 100)
    assert Functions(tmp_path / "gone.so").at(100) == Function(None, 100)
