"""A process with edgeopt-runner in it: opens a model file, runs it. native/runner/main.cpp documents the protocol."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

from edgeopt.errors import ConversionError, DataError, EdgeoptError
from edgeopt.runtimes.process_watch import Patience, Watch
from edgeopt.types import Array

#: An inference takes seconds under emulation, of a large network minutes; who does nothing for a minute waits for
#: something that never comes.
PATIENCE = Patience(idle_seconds=60.0, total_seconds=3600.0)
#: How long a process may take to end by itself.
_END_SECONDS = 5
#: How LiteRT ("ERROR: reason") and ExecuTorch ("E 00:00:00.1 executorch:file.cpp:1] reason") log errors.
_ERROR_LINE = re.compile(r"(?:ERROR: (?:\[\S+\] )?|E \d\S* [^\]]*\] )(.+)")


_Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class NativeTensor:
    """What the file says of one of its tensors; -1 stands for a free size."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class RunnerProcess:
    """A running edgeopt-runner. Not thread-safe.

    Args:
        command: what starts it as a server.
        title: the runtime and where it runs, for messages: "LiteRT on the emulated Arm Cortex-A53".
        file: the model's name, for messages.
        patience: with which its answers are awaited.

    Attributes:
        inputs, outputs: in the file's order.

    Raises:
        ConversionError: the runtime refuses the file, dies of it, or never answers.
    """

    def __init__(self, command: Sequence[str], title: str, file: str, patience: Patience = PATIENCE) -> None:
        self._title, self._file, self._patience = title, file, patience
        # Its working directory, too: QEMU leaves an image of the memory there when the program dies.
        self._scratch = tempfile.TemporaryDirectory(prefix="edgeopt-phone-", ignore_cleanup_errors=True)
        self._log = Path(self._scratch.name, "log")
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=self._scratch.name
                )
        except OSError as error:
            self._scratch.cleanup()
            raise ConversionError(f"{title} does not start: {error.strerror}", where=file) from error
        try:
            greeting, _ = self._ask((), ConversionError)
            self.inputs, self.outputs = _tensors(greeting, "inputs"), _tensors(greeting, "outputs")
        except BaseException:
            self.close()
            raise

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """One inference, inputs and outputs in the file's order.

        Raises:
            DataError: the inputs don't fit, or the runtime can't run them.
            ConversionError: the runtime dies of it or never answers.
        """
        types = " ".join(f"{array.dtype.name}:{','.join(map(str, array.shape))}" for array in inputs)
        _, outputs = self._ask((f"run {types}\n".encode(), *(array.tobytes() for array in inputs)), DataError)
        return outputs

    def close(self) -> None:
        """End the process. Calling it twice is allowed."""
        for stream in (self._process.stdin, self._process.stdout):
            # What a dead process has not read can't be flushed any more.
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        try:
            self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._scratch.cleanup()

    def _ask(self, request: Sequence[bytes], refusal: type[EdgeoptError]) -> tuple[_Fields, list[Array]]:
        """Send something; return the line that answers it and the arrays behind it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None or stdin.closed:
            raise ValueError("the session is closed")
        answer: tuple[_Fields, list[Array]] | None = None
        with Watch(self._process, self._patience) as watch, suppress(BrokenPipeError):
            for part in request:
                stdin.write(part)
            stdin.flush()
            answer = _receive(stdout)
        if answer is None:
            raise self._end(watch.verdict)
        if "error" in answer[0]:
            raise refusal(f"{self._title} refuses it: {answer[0]['error']}{self._logged()}", where=self._file)
        return answer

    def _end(self, verdict: str | None) -> ConversionError:
        """What to tell when there is no answer."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_END_SECONDS)
        code, why = self._process.returncode, self._logged()
        # A loader that fails says so in its last line; what a runtime wrote before a signal is about something else.
        if not why and code is not None and code > 0:
            why = self._bracketed(self._log_lines()[-1:])
        self.close()
        if verdict is not None:
            return ConversionError(f"{self._title} hangs: {verdict}{why}", where=self._file)
        return ConversionError(
            f"{self._title} died of it: {_fate(code)}{why}",
            where=self._file,
            fix="see whether the file is whole, and whether it runs on this machine and on another core",
        )

    def _logged(self) -> str:
        """The last error that the runtime logged, in brackets."""
        return self._bracketed([found[1] for line in self._log_lines() if (found := _ERROR_LINE.match(line))][-1:])

    def _log_lines(self) -> list[str]:
        with suppress(OSError):
            return self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return []

    @staticmethod
    def _bracketed(lines: list[str]) -> str:
        return "".join(f" ({line.strip()})" for line in lines)


def _receive(stream: IO[bytes]) -> tuple[_Fields, list[Array]] | None:
    """One answer; None where the stream ends within it."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    fields: _Fields = json.loads(line)
    if "ready" in fields or "error" in fields:
        return fields, []
    arrays = []
    for tensor in _tensors(fields, "outputs"):
        dtype = np.dtype(tensor.dtype).newbyteorder("<")
        size = math.prod(tensor.shape) * dtype.itemsize
        values = stream.read(size)
        if len(values) < size:
            return None
        arrays.append(np.frombuffer(values, dtype).astype(tensor.dtype).reshape(tensor.shape))
    return fields, arrays


def _tensors(fields: _Fields, key: str) -> tuple[NativeTensor, ...]:
    entries = cast("list[dict[str, object]]", fields[key])
    return tuple(
        NativeTensor(
            str(entry.get("name", "")), str(entry["dtype"]), tuple(int(n) for n in cast("list[int]", entry["shape"]))
        )
        for entry in entries
    )


def _fate(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
        return f"signal {-code}"
    return f"exit code {code}"
