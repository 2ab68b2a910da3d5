"""Something that runs the model on the device, and how it is called."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CANNOT_RUN, MISSING, CheckError

if TYPE_CHECKING:
    from .contents import Contents, Stored, Vector
    from .device import Workspace
    from .transport import Reply

RUNNER = "edgeopt-runner"
#: What it is called in the directory on the device.
PROGRAM = "program"
_TIMED_OUT = 124
#: What shells, and programs that start others, say of one whose loader is not there.
_NO_LOADER = re.compile(rf"/{PROGRAM}: (inaccessible or )?not found$|No such file or directory$")


@dataclass(frozen=True)
class Figures:
    """One run of a program. Times in milliseconds; None and () where the program does not tell."""

    load_ms: float | None
    first_ms: float | None
    latencies_ms: tuple[float, ...]
    summary_ms: dict[str, float]
    peak_bytes: int | None
    outputs: tuple[bytes, ...] | None


class Program(ABC):
    """Knows how to call one program, which is on the device already."""

    #: As the report names it.
    name: str
    version: str | None = None

    def __init__(self, contents: Contents, workspace: Workspace, model: str, threads: int) -> None:
        self.contents = contents
        self.workspace = workspace
        self.model = model
        self.threads = threads

    @abstractmethod
    def run(self, vector: Vector, paths: list[str], warmup: int, runs: int, mask: str, seconds: float) -> Figures:
        """Run the model on one golden vector, whose inputs lie at `paths`.

        Raises CheckError where it can't be run, takes longer than `seconds`, or the device is lost.
        """

    def call(self, arguments: list[str], mask: str, seconds: float) -> Reply:
        reply = self.workspace.run(arguments, mask, seconds)
        place = self.workspace.device.transport.name
        if reply.code == _TIMED_OUT:
            raise CheckError(
                f"{self.name} did not end within {seconds:.0f} s on {place}; it was killed there", CANNOT_RUN
            )
        if reply.code != 0:
            self.check_space()
            raise CheckError(f"{self.name} fails on {place}: {_reason(reply)}", CANNOT_RUN)
        return reply

    def check_space(self) -> None:
        """After something failed: was that because the disk is full?"""
        if self.workspace.is_full():
            place = self.workspace.device.transport.name
            raise CheckError(f"no space left on {place}: {self.name} could not write its outputs", MISSING)


class Runner(Program):
    """edgeopt-runner, or anything with the same arguments and the same JSON."""

    name = RUNNER

    def __init__(self, contents: Contents, workspace: Workspace, model: str, threads: int, command: list[str]) -> None:
        super().__init__(contents, workspace, model, threads)
        self._command = command
        if len(command) > 1:
            self.name = "python"

    def run(self, vector: Vector, paths: list[str], warmup: int, runs: int, mask: str, seconds: float) -> Figures:
        arguments = [*self._command, self.model, "--threads", str(self.threads)]
        for stored, path in zip(vector.inputs, paths):
            arguments += ["--input", self._input(stored, path)]
        arguments += ["--output-dir", "out", "--warmup", str(warmup), "--runs", str(runs), "--json", "figures.json"]
        self.call(arguments, mask, seconds)
        try:
            plain = json.loads(self.workspace.get("figures.json"))
            self.version = plain.get("version")
            peak = int(plain["peak_kb"])
            return Figures(
                load_ms=float(plain["load_ms"]),
                first_ms=float(plain["first_ms"]),
                latencies_ms=tuple(map(float, plain["latencies_ms"])),
                summary_ms={},
                peak_bytes=peak * 1024 if peak > 0 else None,
                outputs=self._outputs(plain["outputs"], vector),
            )
        except (ValueError, KeyError, TypeError) as error:
            self.check_space()
            raise CheckError(f"{self.name} wrote figures that can't be read: {error}", CANNOT_RUN) from error

    def _input(self, stored: Stored, path: str) -> str:
        shape = ",".join(map(str, stored.shape))
        name = "" if self.contents.format == "executorch" else f"{stored.tensor.native_name}="
        return f"{name}{path}:{stored.tensor.dtype}:{shape}"

    def _outputs(self, listed: list[dict[str, str]], vector: Vector) -> tuple[bytes, ...]:
        """In the signature's order: by name where all names are there, else by position."""
        wanted = [stored.tensor.native_name for stored in vector.outputs]
        files = {entry["name"]: entry["file"] for entry in listed}
        if set(wanted) <= files.keys():
            names = [files[name] for name in wanted]
        else:
            names = [entry["file"] for entry in listed[: len(wanted)]]
        if len(names) < len(wanted):
            raise ValueError(f"{len(names)} outputs instead of {len(wanted)}")
        return tuple(self.workspace.get(f"out/{Path(name).name}") for name in names)


def _reason(reply: Reply) -> str:
    text = reply.errors.strip()
    lowered = text.lower()
    last = text.splitlines()[-1].strip() if text else ""
    if reply.code == 126 and "permission denied" in lowered:
        return "its directory lets no program run (noexec); name another --directory"
    if reply.code == 127 and "shared librar" in lowered:
        return f"{last[last.find('error while loading') :]}; put the library beside the program"
    started = f"/{PROGRAM}" in last
    if reply.code == 127 and started and _NO_LOADER.search(last):
        return "the device has not the loader that it was linked for: build it for this system"
    # A shell that can't execute a file tries to read it as a script, and stumbles.
    if "exec format error" in lowered or (reply.code in (2, 126, 127) and started):
        return "it is no program for this kind of processor (exec format error)"
    if reply.code in (126, 127) and not text:
        return "it can't be started there"
    if reply.code > 128:
        signal = reply.code - 128
        return f"it was ended by signal {signal}{' (out of memory?)' if signal == 9 else ''}"
    return last or f"exit code {reply.code}"
