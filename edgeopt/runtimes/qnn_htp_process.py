"""A process with Qualcomm's x86 emulator of its HTP: opens a file, tells who takes which node, runs it."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

from edgeopt.errors import ConversionError, DataError, EdgeoptError
from edgeopt.formats.onnx_hexagon import FIRST_WITH_FLOAT
from edgeopt.runtimes.process_watch import Patience, Watch
from edgeopt.runtimes.qnn_htp_worker import receive, send
from edgeopt.types import Array, Hexagon

#: A system on chip for each architecture, by QNN's number: the emulator computes like one of them, and float16 only
#: where it knows which. Source: ExecuTorch's backends/qualcomm/serialization/qc_schema.py.
TYPICAL_SOC: Mapping[str, int] = {"v68": 93, "v69": 36, "v73": 43, "v75": 57, "v79": 69, "v81": 87}
#: What is emulated for files that were made for no particular one: the Snapdragon 8 Gen 2.
DEFAULT = Hexagon("v73", 43, 8)
#: Models take seconds to run there and minutes to compile.
PATIENCE = Patience(idle_seconds=180.0, total_seconds=7200.0)
_MIN_GLIBC = (2, 35)
#: How long a process may take to end by itself.
_PATIENCE_SECONDS = 10


def missing() -> str | None:
    """What the emulator lacks on this machine, and how to get it; None when it can run."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"Qualcomm's HTP emulator runs on x86-64 Linux only, not on {platform.system()} {platform.machine()}"
    found = platform.libc_ver()[1]
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    if numbers < _MIN_GLIBC:
        needed = ".".join(map(str, _MIN_GLIBC))
        return f"Qualcomm's HTP emulator needs glibc {needed}, this system has {found or 'another C library'}"
    if find_spec("onnxruntime_qnn") is None or find_spec("onnxruntime") is None:
        return "the package onnxruntime-qnn is not installed: pip install 'edgeopt[qualcomm]'"
    return None


def provider_options(npu: Hexagon) -> dict[str, str]:
    """Options of the QNN provider for a Hexagon, as an app on the device gives them too."""
    soc = npu.soc_model if npu.soc_model is not None else TYPICAL_SOC.get(npu.architecture)
    options = {"htp_arch": npu.architecture.removeprefix("v"), "offload_graph_io_quantization": "0"}
    if soc is not None:
        options["soc_model"] = str(soc)
        if npu.architecture >= FIRST_WITH_FLOAT:
            options["enable_htp_fp16_precision"] = "1"
    if npu.vtcm_mb is not None:
        options["vtcm_mb"] = str(npu.vtcm_mb)
    return options


class HtpProcess:
    """A file opened in a process of its own. Not thread-safe.

    Args:
        path: the .onnx file.
        npu: whose arithmetic and operators.
        session: further entries of ONNX Runtime's session configuration.
        verbose: whether `log` holds all that ONNX Runtime and the provider have to say.
        patience: how long one answer may take.

    Attributes:
        assignment: (provider, node name, operator type) of the graph's nodes after ONNX Runtime's rewriting.

    Raises:
        ConversionError: when ONNX Runtime or the provider refuses the file, or the process dies of it or hangs.
    """

    def __init__(
        self,
        path: Path,
        npu: Hexagon,
        session: Mapping[str, str] | None = None,
        verbose: bool = False,
        patience: Patience = PATIENCE,
    ) -> None:
        self._path = path
        self._patience = patience
        with ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile())
            self._process = stack.enter_context(_start(self._log.fileno()))
            self._open = stack.pop_all()
        request = {
            "path": str(path),
            "provider": provider_options(npu),
            "session": {"session.record_ep_graph_assignment_info": "1", **(session or {})},
            "verbose": verbose,
        }
        fields = self._ask(request, {}, ConversionError)[0]
        if "error" in fields:
            self.close()
            raise ConversionError(f"QNN refuses the file: {first_line(str(fields['error']))}", where=path.name)
        listed = fields["assignment"]
        rows = listed if isinstance(listed, list) else []
        self.assignment = tuple((str(provider), str(name), str(kind)) for provider, name, kind in rows)

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. Raises DataError when the file can't be run on this feed."""
        fields, arrays = self._ask({}, feed, DataError)
        if "error" in fields:
            raise DataError(f"QNN can't run it: {first_line(str(fields['error']))}", where=self._path.name)
        return arrays

    def log(self) -> str:
        """All that the process has printed so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def close(self) -> None:
        """End the process. Calling it twice is allowed."""
        if self._process.stdin is not None:
            # What a dead process has not read can't be flushed any more.
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._open.close()

    def _ask(
        self, fields: Mapping[str, object], arrays: Mapping[str, Array], kind: type[EdgeoptError]
    ) -> tuple[Mapping[str, object], dict[str, Array]]:
        if self._process.stdin is None or self._process.stdout is None or self._process.stdin.closed:
            raise ValueError("the session is closed")
        with Watch(self._process, self._patience) as watch:
            try:
                send(self._process.stdin, fields, arrays)
                reply = receive(self._process.stdout)
            except BrokenPipeError:
                reply = None
        if reply is None:
            self.close()
            told = watch.verdict
            raise kind(
                f"Qualcomm's HTP emulator hangs ({told})"
                if told is not None
                else f"Qualcomm's HTP emulator died of it ({_fate(self._process.returncode)})",
                where=self._path.name,
                fix="leave out the operators that it does not know, or keep their layers out of the quantization",
            )
        return reply.fields, dict(reply.arrays)


def _start(log: int) -> subprocess.Popen[bytes]:
    packages = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (packages, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        # -P: a file in the working directory must not pass for a module.
        [sys.executable, "-P", "-m", "edgeopt.runtimes.qnn_htp_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "PYTHONPATH": paths},
    )


def _fate(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"


def first_line(text: str) -> str:
    """ONNX Runtime's message without its "[ONNXRuntimeError] : 11 : EP_FAIL :"."""
    line = text.strip().partition("\n")[0]
    return line.split(" : ", 3)[-1] if line.startswith("[ONNXRuntimeError]") else line
