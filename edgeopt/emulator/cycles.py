"""Estimated cycles from counted blocks of code, by llvm-mca.

llvm-mca plays a block through LLVM's scheduling model of a core: issue width, units, latencies, dependencies. It takes
every load from the nearest cache and every branch as foreseen. So this is an estimate, and says which model it is from.

LLVM lends most cores the model of a relative, and some models mislead, so only those of `_MODELS` are believed. The
in-order cores are not among them. llvm-mca lets them write results in program order only (`RetireOOO` in LLVM's
TargetSchedule.td), so that in its Cortex-A53 every load waits for the multiplication before it: float kernels come out
four times as slow as they are. LLVM's Cortex-A55 starts two 128-bit multiplications a cycle where Arm's guide has one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

from edgeopt.errors import UsageError
from edgeopt.json_data import loads

#: Estimate nothing where less of the executed instructions can be modelled.
LEAST_COVERAGE = 0.5
#: Model the hottest blocks until so much is covered; what is left is many blocks that are executed a few times.
_ENOUGH = 0.99
_MOST_BLOCKS = 1000
#: Each block is played so many times in a row: hot blocks are loops, which overlap with themselves.
_ITERATIONS = 100
_SECONDS = 120
_FEATURES = "+v8.6a,+fp16fml,+sha2,+aes"
_INSTRUCTION_BYTES = 4
_VERSION = re.compile(r"LLVM version (\S+)")
_INVALID = re.compile(r"^<stdin>:(\d+):\d+: warning: invalid instruction encoding", re.MULTILINE)
_UNSUPPORTED = re.compile(r"^note: instruction: *(.+)$", re.MULTILINE)
_NEWEST_LLVM, _OLDEST_LLVM = 40, 13

#: Core -> the core to ask LLVM for, and the name of the model that must answer: a core's own, or that of its twin. The
#: Neoverse N1 and N2 are the Cortex-A76 and A710 for servers; the A72 is a revision of the A57 (Arm's Software
#: Optimization Guides give the same throughputs of vector arithmetic). An older LLVM answers with another model.
_MODELS = {
    "cortex-a57": ("cortex-a57", "A57"),
    "cortex-a72": ("cortex-a57", "A57"),
    "cortex-a76": ("neoverse-n1", "N1"),
    "cortex-a710": ("neoverse-n2", "N2"),
    "neoverse-n1": ("neoverse-n1", "N1"),
    "neoverse-n2": ("neoverse-n2", "N2"),
}


@dataclass(frozen=True, slots=True)
class Block:
    """Instructions that are executed one after the other.

    Attributes:
        code: A64 instructions, 4 little-endian bytes each.
        executions: how often.
    """

    code: bytes
    executions: int

    @property
    def instructions(self) -> int:
        """Executed in all."""
        return self.executions * len(self.code) // _INSTRUCTION_BYTES


@dataclass(frozen=True, slots=True)
class CycleEstimate:
    """
    Attributes:
        cycles: for all instructions, those outside the model at the mean rate of those inside.
        model: the tool and the scheduling model, "llvm-mca 14.0.6, LLVM's model A57 for cortex-a72".
        coverage: share of the executed instructions that the model saw, 0.5 to 1.
    """

    cycles: float
    model: str
    coverage: float


@dataclass(frozen=True, slots=True)
class _Tools:
    version: str
    disassembler: str
    analyzer: str


def estimate(blocks: Iterable[Block], cpu: str) -> CycleEstimate | None:
    """Cycles of these blocks on one core.

    Args:
        blocks: all code that ran.
        cpu: LLVM's name of the core, as for -mcpu.

    Returns None where llvm-mc and llvm-mca of LLVM 13 or newer are not installed, where they have no model of the core
    that can be believed, and where it covers less than half of the executed instructions.
    """
    tools = _tools() if cpu in _MODELS else None
    if tools is None:
        return None
    asked, expected = _MODELS[cpu]
    merged = _merged(blocks)
    total = sum(block.instructions for block in merged)
    texts = _disassembled(tools, _hottest(merged, total))
    analysis = _analyzed(tools, texts, asked)
    if analysis is None:
        return None
    cycles_of, model = analysis
    if model != expected:
        return None
    covered = sum(block.instructions for block in cycles_of)
    if covered < LEAST_COVERAGE * total or not covered:
        return None
    cycles = sum(block.executions * per_execution for block, per_execution in cycles_of.items())
    return CycleEstimate(
        cycles=cycles * total / covered,
        model=f"llvm-mca {tools.version}, LLVM's model {model} for {cpu}",
        coverage=covered / total,
    )


def analyzer() -> str | None:
    """Path of the llvm-mca that is used; None where there is none that can be."""
    tools = _tools()
    return tools.analyzer if tools is not None else None


def _tools() -> _Tools | None:
    """The newest on PATH, with or without a version in their names: newer ones have models of more cores."""
    suffixes = ["", *(f"-{version}" for version in range(_OLDEST_LLVM, _NEWEST_LLVM + 1))]
    found: list[tuple[int, _Tools]] = []
    for suffix in suffixes:
        disassembler, analyzer = shutil.which(f"llvm-mc{suffix}"), shutil.which(f"llvm-mca{suffix}")
        if disassembler is None or analyzer is None:
            continue
        said = _run([analyzer, "--version"], "")
        version = _VERSION.search(said.stdout) if said is not None else None
        if version is not None and int(version[1].split(".")[0]) >= _OLDEST_LLVM:
            found.append((int(version[1].split(".")[0]), _Tools(version[1], disassembler, analyzer)))
    return max(found, key=lambda item: item[0], default=(0, None))[1]


def _merged(blocks: Iterable[Block]) -> list[Block]:
    """One block per distinct code, hottest first; the order does not depend on that of the input."""
    ordered = sorted(blocks, key=lambda block: block.code)
    merged = [
        Block(code, sum(block.executions for block in same))
        for code, same in groupby(ordered, key=lambda block: block.code)
    ]
    return sorted(merged, key=lambda block: block.instructions, reverse=True)


def _hottest(blocks: Sequence[Block], total: int) -> list[Block]:
    chosen: list[Block] = []
    covered = 0
    for block in blocks[:_MOST_BLOCKS]:
        if covered >= _ENOUGH * total:
            break
        chosen.append(block)
        covered += block.instructions
    return chosen


def _disassembled(tools: _Tools, blocks: Sequence[Block]) -> dict[Block, list[str]]:
    """Assembler text of each block, without the blocks that hold an instruction unknown to this LLVM."""
    words = [
        (block, block.code[at : at + _INSTRUCTION_BYTES])
        for block in blocks
        for at in range(0, len(block.code), _INSTRUCTION_BYTES)
    ]
    lines = "\n".join(" ".join(f"0x{byte:02x}" for byte in word) for _, word in words)
    command = [tools.disassembler, "--disassemble", "-triple=aarch64", f"-mattr={_FEATURES}"]
    done = _run(command, lines + "\n")
    if done is None:
        return {}
    unknown = {int(number) - 1 for number in _INVALID.findall(done.stderr)}
    known = [word for index, word in enumerate(words) if index not in unknown]
    printed = [line.strip() for line in done.stdout.splitlines() if line.strip() and line.strip() != ".text"]
    if len(printed) != len(known):
        return {}
    texts: dict[Block, list[str]] = {}
    for (block, _), text in zip(known, printed, strict=True):
        texts.setdefault(block, []).append(text)
    whole = {block: len(block.code) // _INSTRUCTION_BYTES for block in blocks}
    return {block: text for block, text in texts.items() if len(text) == whole[block]}


def _analyzed(tools: _Tools, texts: Mapping[Block, list[str]], cpu: str) -> tuple[dict[Block, float], str] | None:
    """Cycles per execution of each block that the model takes, and the model's name. llvm-mca gives up altogether at
    an instruction that the model lacks, and names it: the blocks that hold it are left out in another try."""
    left = dict(texts)
    while left:
        order = list(left)
        regions = "".join(
            f"# LLVM-MCA-BEGIN {number}\n" + "\n".join(left[block]) + "\n# LLVM-MCA-END\n"
            for number, block in enumerate(order)
        )
        command = [tools.analyzer, "-mtriple=aarch64", f"-mcpu={cpu}", f"-mattr={_FEATURES}", "-json"]
        command += [f"-iterations={_ITERATIONS}", "-instruction-info=false", "-resource-pressure=false"]
        done = _run(command, regions)
        if done is None or "is not a recognized processor" in done.stderr:
            return None
        if done.returncode == 0:
            return parse_analysis(done.stdout, order)
        lacking = {" ".join(text.split()) for text in _UNSUPPORTED.findall(done.stderr)}
        kept = {
            block: text for block, text in left.items() if lacking.isdisjoint(" ".join(line.split()) for line in text)
        }
        if len(kept) == len(left):
            return None
        left = kept
    return None


def parse_analysis(text: str, blocks: Sequence[Block]) -> tuple[dict[Block, float], str] | None:
    """What llvm-mca -json says of regions that are named by their index in `blocks`: cycles per execution, and the
    scheduling model's name, which is what the names of its units begin with. None where it says something else."""
    try:
        plain = loads(text, "llvm-mca")
    except UsageError:
        return None
    match plain:
        case {"CodeRegions": list(regions), "TargetInfo": {"Resources": list(units)}}:
            pass
        case _:
            return None
    cycles: dict[Block, float] = {}
    for region in regions:
        match region:
            case {"Name": str(name), "SummaryView": {"Iterations": int(iterations), "TotalCycles": int(total)}}:
                cycles[blocks[int(name)]] = total / iterations
            case _:
                return None
    return cycles, _model_name([unit for unit in units if isinstance(unit, str)])


def _model_name(units: Sequence[str]) -> str:
    """What all names begin with: "A57" for A57UnitB, A57UnitI, ..."""
    if not units:
        return "unnamed"
    same = takewhile(lambda pair: pair[0] == pair[1], zip(min(units), max(units), strict=False))
    return "".join(letter for letter, _ in same).removesuffix("Unit").removesuffix("Pipe") or "unnamed"


def _run(command: Sequence[str], text: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
