"""Which program runs the model: found, held against the device, and copied there."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from .benchmarks import BENCHMARKS
from .errors import CANNOT_RUN, MISSING, USAGE, CheckError
from .programs import PROGRAM, RUNNER, Program, Runner

if TYPE_CHECKING:
    from .contents import Contents
    from .device import Facts, Workspace

_HERE = Path(__file__).resolve().parent
#: ELF header: e_machine of each architecture, and what `uname -m` or Android calls it.
_MACHINES = {
    183: ("aarch64", "arm64-v8a", "arm64"),
    40: ("armv7l", "armv8l", "armv6l", "armeabi-v7a", "armeabi", "arm"),
    62: ("x86_64", "amd64"),
    3: ("i686", "i386", "x86"),
    243: ("riscv64",),
}
#: What the board's Python must have, and how it is installed.
_MODULES = {"litert": "ai_edge_litert", "onnx": "onnxruntime", "executorch": "executorch"}
_PACKAGES = {
    "litert": "the Python packages ai-edge-litert and numpy",
    "onnx": "the Python packages onnxruntime and numpy",
    "executorch": "the Python packages executorch and numpy",
}


def find(
    contents: Contents, workspace: Workspace, facts: Facts, threads: int, runner: Path | None, benchmark: Path | None
) -> Program:
    """The best program there is: what the user names; a runner in the bundle; Python with the runtime; what is there.

    Raises CheckError where there is none, saying how to get one, or where it is for another kind of device.
    """
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
    return workspace.put(program, PROGRAM, executable=True)


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
