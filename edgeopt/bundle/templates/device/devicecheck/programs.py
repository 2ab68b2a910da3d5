"""Something that can run the model on the device: found, copied there, and called."""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CANNOT_RUN, MISSING, USAGE, CheckError

if TYPE_CHECKING:
    from .contents import Contents, Stored, Vector
    from .device import Facts, Workspace
    from .transport import Reply

_HERE = Path(__file__).resolve().parent
RUNNER = "edgeopt-runner"
#: What it is called in the directory on the device.
_PROGRAM = "program"
_TIMED_OUT = 124
#: ELF header: e_machine of each architecture, and what `uname -m` or Android calls it.
_MACHINES = {
    183: ("aarch64", "arm64-v8a", "arm64"),
    40: ("armv7l", "armv8l", "armv6l", "armeabi-v7a", "armeabi", "arm"),
    62: ("x86_64", "amd64"),
    3: ("i686", "i386", "x86"),
    243: ("riscv64",),
}


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


def find(
    contents: Contents, workspace: Workspace, facts: Facts, threads: int, runner: Path | None, benchmark: Path | None
) -> Program:
    """The best program there is: what the user names; a runner in the bundle; Python with the runtime; what is there.

    Raises CheckError where there is none, saying how to get one, or where it is for another kind of device.
    """
    from .benchmarks import BENCHMARKS

    model = workspace.put(contents.model, contents.model.name)
    if (arrived := workspace.digest(model)) is not None and arrived != contents.model_sha256:
        raise CheckError(f"{contents.model.name} was damaged on its way to the device", MISSING)
    kind = BENCHMARKS[contents.format]
    if runner is None and benchmark is not None:
        return kind(contents, workspace, model, threads, _send(benchmark, workspace, facts))
    runner = runner or _bundled(facts)
    if runner is not None:
        return Runner(contents, workspace, model, threads, [_send(runner, workspace, facts)])
    if facts.os == "linux" and workspace.device.call("imports", "python3", _MODULES[contents.format]).text.strip():
        script = workspace.put(_HERE / "run_model.py", "run_model.py")
        return Runner(contents, workspace, model, threads, ["python3", script, contents.format])
    there = workspace.device.call("having", *kind.programs).text.strip()
    if there:
        return kind(contents, workspace, model, threads, there)
    board = f", install {_PACKAGES[contents.format]} on the board" if facts.os == "linux" else ""
    raise CheckError(
        f"nothing on {workspace.device.transport.name} can run a {contents.format} file: build the runner "
        f"(device/runner/build.sh --help) and give it with --runner{board}, or give {kind.programs[0]} with "
        "--benchmark",
        MISSING,
    )


#: What the board's Python must have, and how it is installed.
_MODULES = {"litert": "ai_edge_litert", "onnx": "onnxruntime", "executorch": "executorch"}
_PACKAGES = {
    "litert": "the Python packages ai-edge-litert and numpy",
    "onnx": "the Python packages onnxruntime and numpy",
    "executorch": "the Python packages executorch and numpy",
}


def _bundled(facts: Facts) -> Path | None:
    """A runner that somebody built into the bundle: device/bin/<abi>/edgeopt-runner, or beside the check."""
    prefix = "" if facts.os == "android" else "linux-"
    for folder in (_HERE.parent / "bin" / f"{prefix}{facts.abi}", _HERE.parent):
        if (folder / RUNNER).is_file():
            return folder / RUNNER
    return None


def _send(program: Path, workspace: Workspace, facts: Facts) -> str:
    """Copy a program and the libraries beside it; returns its path on the device."""
    if not program.is_file():
        raise CheckError(f"{program} is not a file", USAGE)
    problem = mismatch(program, facts)
    if problem is not None:
        raise CheckError(f"{program} {problem}", CANNOT_RUN)
    for library in sorted(program.parent.glob("lib*.so*")):
        if library.is_file():
            workspace.put(library, f"lib/{library.name}")
    return workspace.put(program, _PROGRAM, executable=True)


def mismatch(program: Path, facts: Facts) -> str | None:
    """Why this program can't run on that device; None where it can, or where the file does not tell (a script)."""
    with program.open("rb") as file:
        head = file.read(1 << 16)
    if head[:4] != b"\x7fELF" or len(head) < 20:
        return None
    order = "<" if head[5] == 1 else ">"
    (machine,) = struct.unpack_from(order + "H", head, 18)
    names = _MACHINES.get(machine, (f"machine {machine}",))
    if facts.machine not in names and facts.abi not in names:
        return f"is built for {names[0]}, the device is {facts.abi or facts.machine}"
    loader = _loader(head, order)
    if loader is not None and (facts.os == "android") != loader.startswith("/system/"):
        return f"is built for {'Android' if loader.startswith('/system/') else 'Linux'}, the device runs {facts.os}"
    return None


def _loader(head: bytes, order: str) -> str | None:
    """The program interpreter that an ELF file asks for (the segment PT_INTERP); None for a static one."""
    wide = head[4] == 2
    offset, size, count = (
        (*struct.unpack_from(order + "Q", head, 32), *struct.unpack_from(order + "HH", head, 54))
        if wide
        else (*struct.unpack_from(order + "I", head, 28), *struct.unpack_from(order + "HH", head, 42))
    )
    for index in range(count):
        start = offset + index * size
        if start + size > len(head):
            return None
        (kind,) = struct.unpack_from(order + "I", head, start)
        if kind == 3:
            where, length = (
                (
                    struct.unpack_from(order + "Q", head, start + 8)[0],
                    struct.unpack_from(order + "Q", head, start + 32)[0],
                )
                if wide
                else (
                    struct.unpack_from(order + "I", head, start + 4)[0],
                    struct.unpack_from(order + "I", head, start + 16)[0],
                )
            )
            return head[where : where + length].rstrip(b"\0").decode("ascii", "replace")
    return None


def _reason(reply: Reply) -> str:
    text = reply.errors.strip()
    lowered = text.lower()
    last = text.splitlines()[-1].strip() if text else ""
    # A shell that can't execute a file tries to read it as a script, and stumbles.
    if "exec format error" in lowered or (reply.code in (2, 126, 127) and f"/{_PROGRAM}" in last):
        return "it is no program for this kind of processor (exec format error)"
    if reply.code in (126, 127) and not text:
        return "it can't be started there"
    if reply.code > 128:
        signal = reply.code - 128
        return f"it was ended by signal {signal}{' (out of memory?)' if signal == 9 else ''}"
    return last or f"exit code {reply.code}"
