"""How many instructions one inference takes on an emulated core, by kind of work.

The phone's runner marks the beginning and the end of each inference, and a plugin of QEMU's counts what is executed in
between. One thread, one core, a fixed environment: the same file gives the same count on every machine. Counts rank
variants and guard against regressions; they are not a time.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeopt.emulator import cycles
from edgeopt.emulator.cores import Core
from edgeopt.emulator.counting_functions import Function, Functions
from edgeopt.emulator.installation import Emulator, installed
from edgeopt.errors import ConversionError, EdgeoptError
from edgeopt.json_data import from_plain, loads
from edgeopt.types import Array, Format, Signature

#: Per file; a plain CPU emulates some 100 million instructions a second.
_SECONDS = 3600
#: In its first inference a runtime packs weights and learns how much memory it needs, in the second it reserves that.
#: The runner's cold inference comes before those that warm up.
_WARMUP = 1
#: Two, to see that they agree.
_RUNS = 2
_HOTTEST = 10
_COUNTS = "counts.json"
_FOLDER = "folder"
#: All that a counted program finds in its environment. ONNX Runtime would collect and send usage data, in threads that
#: would be counted too.
_ENVIRONMENT = {"LC_ALL": "C", "ORT_DISABLE_TELEMETRY": "1"}
_RUNNER = "edgeopt-runner: "


@dataclass(frozen=True, slots=True)
class HotFunction:
    """A function in which an inference spends instructions.

    Attributes:
        library: file name, "libLiteRt.so".
        name: None where the library is stripped.
        address: of its first instruction, as a disassembler of the library shows it.
        instructions: of one inference.
        classes: those instructions by kind of work, most frequent first.
    """

    library: str
    name: str | None
    address: int
    instructions: int
    classes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class InstructionCount:
    """One inference after the first, one thread. "emulated"; its cycles "estimated".

    Attributes:
        total: instructions.
        classes: the same by kind of work; all classes, in the order of docs/counting.md.
        spread: by how many instructions the inference before it differed, for memory that was laid out otherwise.
        threads: that the process had; with more than 1 the count is not exact.
        hot: the functions with the most instructions, in descending order.
        cycles: estimated for all instructions; None where `edgeopt.emulator.cycles` can't.
        cycles_model: what they were estimated with.
        cycles_coverage: share of the instructions that this model saw.
    """

    total: int
    classes: Mapping[str, int]
    spread: int
    threads: int
    hot: tuple[HotFunction, ...]
    cycles: float | None
    cycles_model: str | None
    cycles_coverage: float | None


@dataclass(frozen=True, slots=True)
class _Counts:
    """What counter.c writes; its head comment explains."""

    threads: int
    classes: tuple[str, ...]
    inferences: tuple[tuple[int, ...], ...]
    files: tuple[str, ...]
    blocks: tuple[tuple[int, int, int, str, str], ...]


def count(
    path: Path,
    file_format: Format,
    signature: Signature,
    native_inputs: Mapping[str, Array],
    core: Core,
) -> InstructionCount:
    """Count the instructions of one inference.

    Args:
        path: an exported file.
        file_format: "litert", "onnx" or "executorch".
        signature: the file's.
        native_inputs: as for `Session.run_native`: keys are `SignatureTensor.name`, arrays have the file's type and
            layout. Networks whose work depends on their input are counted for this one.
        core: what to emulate.

    Raises MissingError where the emulated phone is not set up, ConversionError where its runtime refuses the file.
    """
    emulator = installed()
    with tempfile.TemporaryDirectory(prefix="edgeopt-count-") as name:
        scratch = Path(name)
        # By a path of fixed length, because the text of a path takes memory and so decides where the rest will lie.
        # The folder and not the file, since a file may have its weights beside it.
        (scratch / _FOLDER).symlink_to(path.resolve().parent)
        program = [
            *(str(emulator.runner(file_format)), f"{_FOLDER}/{path.name}", "--threads", "1", "--mark"),
            *_write_inputs(file_format, signature, native_inputs, scratch),
            *("--warmup", str(_WARMUP), "--runs", str(_RUNS)),
        ]
        return count_program(emulator, core, program, scratch, path.name)


def count_program(
    emulator: Emulator, core: Core, program: Sequence[str], scratch: Path, where: str
) -> InstructionCount:
    """Count the last of the stretches that an aarch64 program marks with prctl(0x45444F50, 1) and (0x45444F50, 0).

    Args:
        program: path and arguments; paths may be relative to `scratch`.
        scratch: an empty directory, in which it is run.
        where: what to call it in an error.

    Raises ConversionError where it fails or marks fewer than two stretches.
    """
    plugin = f"{_escaped(emulator.counter)},out={_COUNTS}"
    _run(emulator.command(core, program, plugin=plugin), scratch, where)
    counts = _read(scratch / _COUNTS, where)
    if len(counts.inferences) < 2:
        raise ConversionError(f"marked {len(counts.inferences)} inferences, counting takes 2", where=where)
    before, last = counts.inferences[-2:]
    estimate = cycles.estimate(
        (cycles.Block(bytes.fromhex(code), executions) for _, _, executions, code, _ in counts.blocks), core.llvm
    )
    return InstructionCount(
        total=sum(last),
        classes=dict(zip(counts.classes, last, strict=True)),
        spread=abs(sum(last) - sum(before)),
        threads=counts.threads,
        hot=_hottest(counts),
        cycles=estimate.cycles if estimate is not None else None,
        cycles_model=estimate.model if estimate is not None else None,
        cycles_coverage=estimate.coverage if estimate is not None else None,
    )


def _write_inputs(
    file_format: Format,
    signature: Signature,
    native_inputs: Mapping[str, Array],
    scratch: Path,
) -> list[str]:
    """The runner's arguments for the inputs. Files that keep names get them; ExecuTorch's inputs go by position."""
    arguments: list[str] = []
    for index, tensor in enumerate(signature.inputs):
        values = np.ascontiguousarray(native_inputs[tensor.name])
        file = scratch / f"input_{index}.bin"
        file.write_bytes(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
        name = "" if file_format == "executorch" else f"{tensor.native_name}="
        sizes = ",".join(map(str, values.shape))
        arguments += ["--input", f"{name}{file.name}:{values.dtype.name}:{sizes}"]
    return arguments


def _escaped(path: Path) -> str:
    """In an option of QEMU's a comma ends a value, and a doubled one stands for itself."""
    return str(path).replace(",", ",,")


def _run(command: Sequence[str], directory: Path, where: str) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ConversionError(f"was not counted within {_SECONDS // 60} minutes", where=where) from error
    except OSError as error:
        raise ConversionError(f"can't be counted: {error}", where=where) from error
    if done.returncode:
        raise ConversionError(_reason(done.stderr.decode(errors="replace"), done.returncode), where=where)


def _reason(said: str, code: int) -> str:
    """The runner's own line among what the runtime wrote, or else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    own = [line.removeprefix(_RUNNER) for line in lines if line.startswith(_RUNNER)]
    why = (own or lines or [f"exit code {code}"])[-1]
    return f"can't be run on the emulated phone: {why}"


def _read(path: Path, where: str) -> _Counts:
    try:
        return from_plain(_Counts, loads(path.read_bytes(), path.name), path.name)
    except (OSError, EdgeoptError) as error:
        raise ConversionError("the counting plugin left no result", where=where) from error


def _hottest(counts: _Counts) -> tuple[HotFunction, ...]:
    contents: dict[tuple[str, Function], Counter[str]] = {}
    functions: dict[int, Functions] = {}
    for file, offset, executions, _, kinds in counts.blocks:
        if file < 0:  # code that the process made itself
            library, function = "", Function(None, 0)
        else:
            if file not in functions:
                functions[file] = Functions(Path(counts.files[file]))
            library, function = Path(counts.files[file]).name, functions[file].at(offset)
        content = contents.setdefault((library, function), Counter())
        for kind, number in Counter(kinds).items():
            content[counts.classes[ord(kind) - ord("a")]] += number * executions
    found = [
        HotFunction(library, function.name, function.address, content.total(), _ordered(content.items()))
        for (library, function), content in contents.items()
    ]
    return tuple(sorted(found, key=lambda hot: (-hot.instructions, hot.library, hot.address))[:_HOTTEST])


def _ordered(classes: Iterable[tuple[str, int]]) -> dict[str, int]:
    return dict(sorted(classes, key=lambda item: (-item[1], item[0])))
