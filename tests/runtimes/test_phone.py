"""The emulated phone's process and session, with a Python program in the place of the runner."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeopt import emulator
from edgeopt.errors import ConversionError, DataError, EdgeoptError, MissingError, UsageError
from edgeopt.runtimes import load_runtime
from edgeopt.runtimes.phone import PhoneRuntime, PhoneSession
from edgeopt.runtimes.phone_process import RunnerProcess
from edgeopt.runtimes.process_watch import Patience
from edgeopt.types import Signature, SignatureTensor

#: Answers like edgeopt-runner with the file's inputs b, a (int8) and the outputs a + 1, b * 2; `{trick}` runs before.
FAKE = """
import json, os, signal, sys, time
import numpy as np
out, trick = sys.stdout.buffer, sys.argv[1]
def say(fields):
    out.write(json.dumps(fields).encode() + b"\\n"); out.flush()
if trick == "refuse":
    print("ERROR: Encountered unresolved custom op: x.", file=sys.stderr, flush=True)
    say({"error": "can't open it"}); sys.exit(1)
if trick == "die early":
    os.kill(os.getpid(), signal.SIGILL)
if trick == "hang early":
    time.sleep(60)
if trick == "no program":
    print("qemu: cannot open it", file=sys.stderr); sys.exit(255)
tensors = lambda names: [{"name": n, "dtype": "int8", "shape": [-1, 3]} for n in names]
say({"ready": True, "inputs": tensors(["b", "a"]), "outputs": tensors(["p", "q"]), "load_ms": 1.5})
for line in sys.stdin.buffer:
    words = line.split()
    shapes = [tuple(int(n) for n in w.split(b":")[1].split(b",")) for w in words[1:]]
    b, a = [np.frombuffer(sys.stdin.buffer.read(int(np.prod(s))), np.int8).reshape(s) for s in shapes]
    if trick == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if trick == "hang":
        time.sleep(60)
    if trick == "cut":
        out.write(b'{"outputs": [{"dtype": "int8", "shape": [9]}]}\\n123'); sys.exit(0)
    if trick == "error":
        print("E 00:00:01.5 executorch:method.cpp:7] bad size", file=sys.stderr, flush=True)
        say({"error": "can't run it"}); continue
    results = [a + 1, b * 2]
    say({"ms": 1.0, "outputs": [{"dtype": "int8", "shape": r.shape} for r in results]})
    for r in results:
        out.write(r.tobytes())
    out.flush()
"""
PATIENCE = Patience(idle_seconds=1.0, total_seconds=20.0)
SIGNATURE = Signature(
    (SignatureTensor("first", "a", ("n", 3), "int8", "int8"), SignatureTensor("second", "b", ("n", 3), "int8", "int8")),
    (SignatureTensor("doubled", "q", ("n", 3), "int8", "int8"), SignatureTensor("next", "p", ("n", 3), "int8", "int8")),
)
X, Y = np.int8([[1, 2, 3]]), np.int8([[10, 20, 30]])

Start = Callable[[str], RunnerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)

    def run(trick: str) -> RunnerProcess:
        return RunnerProcess([sys.executable, str(fake), trick], "LiteRT on the phone", "m.tflite", PATIENCE)

    return run


def test_tensors_go_by_name_whatever_their_order(start: Start) -> None:
    with PhoneSession(start(""), SIGNATURE, "m.tflite", by_position=False) as session:
        for rows in (1, 3):
            x, y = np.tile(X, (rows, 1)), np.tile(Y, (rows, 1))
            outputs = session.run({"first": x, "second": y})
            np.testing.assert_array_equal(outputs["next"], x + 1)
            np.testing.assert_array_equal(outputs["doubled"], y * 2)
        assert session.profile({"first": X, "second": Y}) == ()
        session.close()
    with pytest.raises(ValueError, match="closed"):
        session.run({"first": X, "second": Y})


def test_or_by_position(start: Start) -> None:
    with PhoneSession(start(""), SIGNATURE, "m.pte", by_position=True) as session:
        outputs = session.run({"first": X, "second": Y})
        np.testing.assert_array_equal(outputs["doubled"], Y + 1)


def test_arrays_that_are_not_contiguous_arrive_whole(start: Start) -> None:
    wide = np.arange(18, dtype=np.int8).reshape(3, 6)
    with PhoneSession(start(""), SIGNATURE, "m.tflite", by_position=False) as session:
        outputs = session.run_native({"first": wide[:, ::2], "second": wide[:, :3]})
    np.testing.assert_array_equal(outputs["next"], wide[:, ::2] + 1)


def test_a_wrong_shape_names_the_input(start: Start) -> None:
    with (
        PhoneSession(start(""), SIGNATURE, "m.tflite", by_position=False) as session,
        pytest.raises(DataError, match=r"input 'first': has the shape \(1, 2\), the model takes \(n, 3\)"),
    ):
        session.run({"first": X[:, :2], "second": Y})


def test_a_file_with_other_tensors_is_refused(start: Start) -> None:
    other = Signature(SIGNATURE.inputs, (SignatureTensor("y", "y", ("n", 3), "int8", "int8"),) * 2)
    with pytest.raises(ConversionError, match=r"m\.tflite: outputs: has p, q, the signature y"):
        PhoneSession(start(""), other, "m.tflite", by_position=False)
    with pytest.raises(ConversionError, match=r"inputs: has b, a, the signature a"):
        PhoneSession(start(""), Signature(SIGNATURE.inputs[:1], SIGNATURE.outputs), "m.pte", by_position=True)


@pytest.mark.parametrize(
    ("trick", "told"),
    [
        ("refuse", "m.tflite: LiteRT on the phone refuses it: can't open it (Encountered unresolved custom op: x.)"),
        ("die early", "m.tflite: LiteRT on the phone died of it: SIGILL; see whether"),
        ("no program", "m.tflite: LiteRT on the phone died of it: exit code 255 (qemu: cannot open it); see whether"),
        ("hang early", "m.tflite: LiteRT on the phone hangs: it did nothing for 1 s"),
    ],
)
def test_what_can_go_wrong_at_the_start(start: Start, trick: str, told: str) -> None:
    with pytest.raises(ConversionError) as error:
        start(trick)
    assert error.value.line().startswith(told)


@pytest.mark.parametrize(
    ("trick", "kind", "told"),
    [
        ("error", DataError, "m.tflite: LiteRT on the phone refuses it: can't run it (bad size)"),
        ("die", ConversionError, "m.tflite: LiteRT on the phone died of it: SIGSEGV; see whether"),
        ("hang", ConversionError, "m.tflite: LiteRT on the phone hangs: it did nothing for 1 s"),
        ("cut", ConversionError, "m.tflite: LiteRT on the phone died of it: exit code 0"),
    ],
)
def test_what_can_go_wrong_later(start: Start, trick: str, kind: type[EdgeoptError], told: str) -> None:
    with PhoneSession(start(trick), SIGNATURE, "m.tflite", by_position=False) as session:
        with pytest.raises(kind) as error:
            session.run({"first": X, "second": Y})
        assert error.value.line().startswith(told)


def test_a_program_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ConversionError, match=r"m.pte: X does not start: No such file"):
        RunnerProcess(["/nowhere/qemu"], "X", "m.pte")


def test_what_it_is_called_and_what_it_stands_for() -> None:
    runtime = load_runtime("phone:cortex-a53")
    assert runtime.name == "phone:cortex-a53"
    assert runtime.emulates == "Arm Cortex-A53 kernels under QEMU"
    assert load_runtime("phone:pixel-4").emulates == "Arm Cortex-A76 kernels under QEMU"
    stand_in = load_runtime("phone:cortex-x4").emulates
    assert stand_in is not None
    assert stand_in.startswith("Arm Cortex-X4 kernels under QEMU; ")
    with pytest.raises(UsageError, match="cortex-z9"):
        load_runtime("phone:cortex-z9")


def test_missing_and_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = PhoneRuntime("cortex-a76")
    monkeypatch.setattr(emulator, "unavailable", lambda: "not set up: run `edgeopt emulator setup`")
    assert runtime.unavailable() == "not set up: run `edgeopt emulator setup`"
    with pytest.raises(MissingError, match="runtime phone:cortex-a76: not set up"):
        runtime.open(Path("m.tflite"), SIGNATURE)
    monkeypatch.setattr(emulator, "unavailable", lambda: None)
    with pytest.raises(ConversionError, match=r"m\.mlpackage: the emulated phone does not run such files"):
        runtime.open(Path("m.mlpackage"), SIGNATURE)
