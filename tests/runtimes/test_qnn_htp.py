"""The process around Qualcomm's emulator: messages, what is missing, what dies. No vendor library is needed."""

from __future__ import annotations

import io
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeopt.errors import ConversionError, DataError, MissingError
from edgeopt.runtimes import qnn_htp, qnn_htp_process
from edgeopt.runtimes.process_watch import Patience
from edgeopt.runtimes.qnn_htp import QnnHtpRuntime
from edgeopt.runtimes.qnn_htp_process import DEFAULT, HtpProcess, first_line, missing, provider_options
from edgeopt.runtimes.qnn_htp_worker import receive, send
from edgeopt.types import Hexagon, Signature


def test_messages_keep_fields_types_shapes_and_order() -> None:
    stream = io.BytesIO()
    arrays = {"b": np.arange(6, dtype=np.uint16).reshape(2, 3), "a": np.array(True), "empty": np.zeros((0, 4))}
    send(stream, {"path": "a\nb", "verbose": True}, arrays)
    send(stream, {})
    stream.seek(0)
    message = receive(stream)
    assert message is not None
    assert message.fields == {"path": "a\nb", "verbose": True}
    assert list(message.arrays) == ["b", "a", "empty"]
    for name, array in arrays.items():
        assert message.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(message.arrays[name], array)
    assert receive(stream) is not None
    assert receive(stream) is None


def test_a_message_cut_short_is_none() -> None:
    stream = io.BytesIO()
    send(stream, {}, {"x": np.zeros(8)})
    assert receive(io.BytesIO(stream.getvalue()[:-1])) is None
    assert receive(io.BytesIO(b'{"fields"')) is None


def test_options_name_the_chip_and_allow_float_only_where_it_exists() -> None:
    phone = provider_options(Hexagon("v75", 57, 8))
    assert phone == {
        "htp_arch": "75", "soc_model": "57", "vtcm_mb": "8", "offload_graph_io_quantization": "0",
        "enable_htp_fp16_precision": "1",
    }  # fmt: skip
    assert "enable_htp_fp16_precision" not in provider_options(Hexagon("v68", 30, 4))
    assert provider_options(Hexagon("v79", None, None))["soc_model"] == "69"
    assert "enable_htp_fp16_precision" not in provider_options(Hexagon("v99", None, None)), "needs a known chip"


@pytest.mark.parametrize(
    ("system", "machine", "libc", "told"),
    [
        ("Darwin", "arm64", "", "x86-64 Linux only, not on Darwin arm64"),
        ("Linux", "aarch64", "2.36", "not on Linux aarch64"),
        ("Linux", "x86_64", "2.31", "needs glibc 2.35, this system has 2.31"),
        ("Linux", "x86_64", "", "another C library"),
        ("Linux", "x86_64", "2.40", "pip install 'edgeopt[qualcomm]'"),
    ],
)
def test_what_is_missing(system: str, machine: str, libc: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", libc))
    monkeypatch.setattr(qnn_htp_process, "find_spec", lambda _: None)
    assert told in (missing() or "")


def test_open_without_the_package_is_a_missing_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qnn_htp, "missing", lambda: "not installed")
    assert QnnHtpRuntime().unavailable() == "not installed"
    with pytest.raises(MissingError, match="not installed"):
        QnnHtpRuntime().open(tmp_path / "model.onnx", Signature((), ()))


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import sys; sys.stdin.readline(); sys.exit(3)", "exit code 3"),
        ("print('{', end='')", "exit code 0"),
    ],
)
def test_a_process_that_dies_is_one_line(
    program: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(program, monkeypatch)
    with pytest.raises(ConversionError, match=told) as caught:
        HtpProcess(tmp_path / "model.onnx", DEFAULT)
    assert "\n" not in caught.value.line()


def stand_in(program: str, monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Processes that are started run this program instead of the emulator."""
    started: list[subprocess.Popen[bytes]] = []

    def start(log: int) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=log))
        return started[-1]

    monkeypatch.setattr(qnn_htp_process, "_start", start)
    return started


def test_a_dead_process_that_left_much_unread_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: closing the pipe flushed what was left, and the BrokenPipeError reached the user."""
    opens = """import sys
sys.stdin.buffer.readline()
sys.stdout.write('{"fields": {"assignment": []}, "arrays": []}\\n')
sys.stdout.flush()
"""
    stand_in(opens, monkeypatch)
    process = HtpProcess(tmp_path / "model.onnx", DEFAULT)
    with pytest.raises(DataError, match="died of it"):
        process.run({"x": np.zeros(1 << 20, np.float32)})


@pytest.mark.skipif(platform.system() != "Linux", reason="the emulator is for Linux, and so is the watch")
@pytest.mark.parametrize(
    ("program", "patience", "told"),
    [
        ("import time; time.sleep(60)", Patience(0.5, 60.0), "hangs (it did nothing for 0.5 s)"),
        ("while True: pass", Patience(0.5, 1.5), "hangs (it gave no answer in 1.5 s)"),
    ],
)
def test_a_process_that_hangs_is_killed(
    program: str, patience: Patience, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = stand_in(program, monkeypatch)
    with pytest.raises(ConversionError, match=re.escape(told)):
        HtpProcess(tmp_path / "model.onnx", DEFAULT, patience=patience)
    assert started[0].poll() is not None


@pytest.mark.skipif(platform.system() != "Linux", reason="the emulator is for Linux, and so is the watch")
def test_a_slow_process_that_works_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = """import sys, time
sys.stdin.buffer.readline()
while time.process_time() < 1.5: pass
sys.stdout.write('{"fields": {"assignment": []}, "arrays": []}\\n')
"""
    stand_in(works, monkeypatch)
    HtpProcess(tmp_path / "model.onnx", DEFAULT, patience=Patience(1.0, 60.0)).close()


def test_onnxruntimes_codes_are_cut_from_its_messages() -> None:
    assert first_line("[ONNXRuntimeError] : 11 : EP_FAIL : Failed to finalize.\nmore") == "Failed to finalize."
    assert first_line("plain : text") == "plain : text"
