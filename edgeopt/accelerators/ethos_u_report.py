"""Reading what Vela writes beside the compiled file: its summary, its debug database and its warnings."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeopt.errors import ConversionError

#: Table name -> rows, as column -> text.
Tables = Mapping[str, list[dict[str, str]]]

_TABLE = re.compile(r'<table name="(?P<name>\w+)">\s*<!\[CDATA\[\n(?P<rows>.*?)\]\]>', re.DOTALL)
_WARNING = re.compile(r"^Warning \(supported operators\) operator: (?P<kind>.*), ofm: '(?P<tensor>.*)'$")
#: What an operator is called that Vela leaves to the CPU.
_LEFT_ALONE = "Passthrough"
#: What stands for the network's own inputs and outputs in the table of connections.
_INPUT, _OUTPUT = "-1", "-2"


@dataclass(frozen=True, slots=True)
class Summary:
    """Vela's figures for the part of the network that runs on the NPU.

    Attributes:
        inference_ms, cycles: of one inference; cycles of the NPU's clock.
        sram, dram, on_chip_flash, off_chip_flash: bytes in use at the peak. Weights that share the SRAM are counted
            as on-chip flash.
        sram_traffic, other_traffic: bytes moved in one inference.
        original_weights, encoded_weights: bytes before and after Vela's lossless compression.
    """

    inference_ms: float
    core_clock_hz: float
    cycles: int
    macs: int
    sram: int
    dram: int
    on_chip_flash: int
    off_chip_flash: int
    sram_traffic: int
    other_traffic: int
    original_weights: int
    encoded_weights: int


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of one operator of the file that went in.

    Attributes:
        on_npu: whether it runs there, or was folded into one that does.
        tensor: name of its first output; None where it was folded.
        cycles: sum over what it was turned into.
        memory_bytes: of SRAM in use while it runs, at the most.
        at_border: whether it reads an input of the file or writes an output.
    """

    on_npu: bool
    tensor: str | None
    cycles: int
    memory_bytes: int
    at_border: bool


def read_summary(path: Path) -> Summary:
    """Raises ConversionError where the report isn't what this version of Vela is known to write."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            row = next(csv.DictReader(file))
        return _summary({key: value for key, value in row.items() if key})
    except (StopIteration, KeyError, ValueError, TypeError) as error:
        raise ConversionError("Vela's summary has an unknown form", where=path.name, fix=_VERSION) from error


_VERSION = "take ethos-u-vela 5.1"


def _summary(row: Mapping[str, str]) -> Summary:
    def kib(key: str) -> int:
        return round(float(row[key]) * 1024)

    def traffic(memory: str) -> int:
        return round(float(row[f"{memory}_total_bytes"]))

    return Summary(
        inference_ms=float(row["inference_time"]) * 1e3,
        core_clock_hz=float(row["core_clock"]),
        cycles=round(float(row["cycles_total"])),
        macs=round(float(row["nn_macs"])),
        sram=kib("sram_memory_used"),
        dram=kib("dram_memory_used"),
        on_chip_flash=kib("on_chip_flash_memory_used"),
        off_chip_flash=kib("off_chip_flash_memory_used"),
        sram_traffic=traffic("sram"),
        other_traffic=traffic("dram") + traffic("on_chip_flash") + traffic("off_chip_flash"),
        original_weights=round(float(row["total_original_weights"])),
        encoded_weights=round(float(row["total_npu_encoded_weights"])),
    )


def read_database(text: str) -> Tables:
    """The CSV tables inside Vela's debug database, which is XML around them."""
    return {match["name"]: list(csv.DictReader(match["rows"].splitlines())) for match in _TABLE.finditer(text)}


def fates(tables: Tables) -> dict[int, Fate]:
    """Position of an operator in the file's main graph -> what became of it.

    Vela numbers the operators that it read ("source", with their position as `ext_key`) and says of each piece that it
    scheduled ("perf") which of them it comes from. An operator without pieces was folded into its neighbours.

    Raises ConversionError where the database isn't what this version of Vela is known to write.
    """
    try:
        pieces: dict[str, list[dict[str, str]]] = {}
        for piece in tables["perf"]:
            pieces.setdefault(piece["source_id"], []).append(piece)
        border = _at_border(tables["perf_debug_conn"])
        found: dict[int, Fate] = {}
        for source in tables["source"]:
            found.setdefault(int(source["ext_key"]), _fate(pieces.get(source["id"], []), border))
        return found
    except (KeyError, ValueError) as error:
        raise ConversionError("Vela's database has an unknown form", where="debug database", fix=_VERSION) from error


def _at_border(connections: list[dict[str, str]]) -> set[str]:
    """Pieces that touch the network's inputs and outputs, which stand as -1 and -2 among their neighbours."""
    readers = {row["id"] for row in connections if row["input_op_id"] == _INPUT}
    return readers | {row["input_op_id"] for row in connections if row["id"] == _OUTPUT}


def _fate(pieces: list[dict[str, str]], border: set[str]) -> Fate:
    return Fate(
        on_npu=all(piece["operator"] != _LEFT_ALONE for piece in pieces),
        tensor=pieces[-1]["name"] if pieces else None,
        cycles=sum(int(piece["op_cycles"]) for piece in pieces),
        memory_bytes=max((int(piece["staging_usage"]) for piece in pieces), default=0),
        at_border=any(piece["id"] in border for piece in pieces),
    )


def cpu_reasons(log: str) -> dict[str, str]:
    """First output tensor -> why Vela leaves the operator to the CPU, from the warnings that it prints.

    A warning is a line that names the operator, then "Reason: ..." and the rule that was broken, up to an empty line.
    """
    reasons: dict[str, str] = {}
    lines = iter(log.splitlines())
    for line in lines:
        match = _WARNING.match(line)
        if match is None:
            continue
        said = []
        for following in lines:
            if not following.strip():
                break
            said.append(following.strip().removeprefix("Reason: "))
        reasons[match["tensor"]] = _phrase(said, match["kind"])
    return reasons


def _phrase(said: list[str], kind: str) -> str:
    """One line in lower case at the start, as reports have it; `kind` is "None" where Vela has no name for it."""
    if said == ["Unsupported opType"]:
        return "Vela has no such operator" if kind == "None" else f"the NPU has no {kind}"
    text = ": ".join(part.rstrip(".") for part in said)
    return text[:1].lower() + text[1:]
