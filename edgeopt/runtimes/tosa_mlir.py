"""Repairs of the TOSA program that Arm's converter makes of a .tflite file, in MLIR's text form.

The converter prints one operator a line, each with the name of the tensor that it came from (`loc(#loc7)`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_FUNCTION = re.compile(
    r"^\s*func\.func @main\((?P<inputs>.*)\) -> (?P<outputs>.*?) attributes (?P<attributes>.*)$", re.M
)
_PATH = re.compile(r'index_path = \["((?:[^"\\]|\\.)*)"\]')
_ENTRY = re.compile(r'entry_function = \{inputs = "(?P<inputs>.*?)", outputs = "(?P<outputs>.*?)"\}')
_FOREIGN = re.compile(r'^\s+%[^=\n]*= "?(?:tfl|stablehlo|chlo|vhlo|tf)\.(?P<kind>\w+)"?(?P<rest>.*)$', re.M)
_LOCATION = re.compile(r"loc\((#loc\d*)\)\s*$")
_CONSTANT = re.compile(
    r"^(?P<name>\s+%\w+ = )stablehlo\.constant (?P<values>dense(?:_resource)?<.*>) : (?P<type>tensor<[^>]*>)", re.M
)
_OPERATOR = re.compile(
    r"^\s+(?P<name>%\w+) = tosa\.(?P<kind>cast|add) (?P<inputs>[^:]+) : \((?P<taken>[^)]*)\) -> tensor<(?P<made>[^>]*)>"
)
#: Bounds of the types that LiteRT quantizes to.
_LIMITS = {"i8": (-(1 << 7), (1 << 7) - 1), "i16": (-(1 << 15), (1 << 15) - 1)}


@dataclass(frozen=True, slots=True)
class Foreign:
    """An operator that has no TOSA form: LiteRT's name for its kind, and the tensor that it makes."""

    kind: str
    tensor: str


def io_names(text: str) -> tuple[list[str], list[str]]:
    """Names of the inputs and outputs in the program's order: those of the file's signature, or of its tensors.

    Raises ValueError where the program has no main function.
    """
    function = _FUNCTION.search(text)
    if function is None:
        raise ValueError("no main function")
    entry = _ENTRY.search(function["attributes"])
    inputs, outputs = _PATH.findall(function["inputs"]), _PATH.findall(function["outputs"])
    if entry is None:
        return inputs, outputs
    tensors = entry["inputs"].split(","), entry["outputs"].split(",")
    return (
        inputs if len(inputs) == len(tensors[0]) else tensors[0],
        outputs if len(outputs) == len(tensors[1]) else tensors[1],
    )


def foreign(text: str) -> Foreign | None:
    """The first operator that the converter left as it was; None where all is TOSA."""
    for match in _FOREIGN.finditer(text):
        if match["kind"] not in ("constant", "pseudo_const", "no_value"):
            location = _LOCATION.search(match["rest"])
            return Foreign(match["kind"].upper(), _named(text, location[1]) if location else "")
    return None


def repaired(text: str) -> str:
    """The program with constants that are TOSA's own, and with QUANTIZE operators that saturate.

    LiteRT's QUANTIZE rounds, adds the zero point and saturates. What the converter makes of it casts to int32, adds,
    and casts to int8: TOSA's cast between integers keeps the low bits, so that 130 becomes -126.
    """
    text = _CONSTANT.sub(
        lambda m: f'{m["name"]}"tosa.const"() <{{values = {m["values"]} : {m["type"]}}}> : () -> {m["type"]}', text
    )
    return "\n".join(_saturated(text.split("\n")))


def _saturated(lines: list[str]) -> Iterator[str]:
    rounded: set[str] = set()  # float values cast to int32
    shifted: set[str] = set()  # those with the zero point added
    for line in lines:
        match = _OPERATOR.match(line)
        if match is None:
            yield line
            continue
        source = match["inputs"].partition(",")[0].strip()
        made = match["made"].rpartition("x")[2]
        if match["kind"] == "add" and source in rounded:
            shifted.add(match["name"])
        elif match["kind"] == "cast" and made == "i32" and match["taken"].endswith("f32>"):
            rounded.add(match["name"])
        elif match["kind"] == "cast" and made in _LIMITS and source in shifted:
            # A name of digits, as MLIR numbers its values, may not go on in letters.
            name = f"%q{match['name'].removeprefix('%')}"
            yield from _clamps(name, source, match["made"], _LIMITS[made])
            line = line.replace(f"tosa.cast {source} ", f"tosa.cast {name}_clamped ")
        yield line


def _clamps(name: str, source: str, made: str, limits: tuple[int, int]) -> Iterator[str]:
    """`<name>_clamped`: the int32 value between both limits. TOSA's own CLAMP takes no int32."""
    dimensions = made.rpartition("x")[0]
    wide = f"tensor<{dimensions}xi32>" if dimensions else "tensor<i32>"
    one = f"tensor<{'1x' * len(dimensions.split('x')) if dimensions else ''}i32>"
    for limit, suffix in zip(limits, ("_low", "_high"), strict=True):
        yield f'    {name}{suffix} = "tosa.const"() <{{values = dense<{limit}> : {one}}}> : () -> {one}'
    yield f"    {name}_raised = tosa.maximum {source}, {name}_low : ({wide}, {one}) -> {wide}"
    yield f"    {name}_clamped = tosa.minimum {name}_raised, {name}_high : ({wide}, {one}) -> {wide}"


def _named(text: str, location: str) -> str:
    """The tensor's name behind a location alias; of several that were fused, the first."""
    match = re.search(rf'^{re.escape(location)} = loc\((?:fused(?:<[^>]*>)?\[)?"([^"]*)"', text, re.M)
    return match[1] if match else ""
