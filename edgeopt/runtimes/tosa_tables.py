"""Repair of 16-bit look-up tables in the TOSA program that Arm's converter makes of a .tflite file, in MLIR's text.

TOSA's TABLE interpolates between 16-bit entries and gives 32 bits with 7 fractional ones (specification 1.0, TABLE).
For EXP and LOG the converter writes one whose result is 16 bits wide, which the reference model refuses.
"""

from __future__ import annotations

import re

_TABLE = re.compile(
    r"^(?P<indent>\s+)%(?P<name>\w+) = tosa\.table (?P<inputs>[^:]+) : "
    r"\((?P<taken>tensor<[^>]*xi16>, tensor<513xi16>)\) -> tensor<(?P<shape>(?:\d+x)*)i16>(?P<rest>.*)$",
    re.M,
)


def with_wide_tables(text: str) -> str:
    """The program with tables of 32 bits, each rescaled by 1/128 as the converter does it for TANH."""
    return _TABLE.sub(_rescaled, text)


def _rescaled(table: re.Match[str]) -> str:
    shape, indent, rest = table["shape"], table["indent"], table["rest"]
    wide, narrow = f"tensor<{shape}i32>", f"tensor<{shape}i16>"
    name = f"%t{table['name']}"  # A name of digits, as MLIR numbers its values, may not go on in letters.
    constants = (("scale", 1 << 30, "i32"), ("shift", 37, "i8"), ("from", 0, "i32"), ("to", 0, "i16"))
    lines = [
        f'{name}_{what} = "tosa.const"() <{{values = dense<{value}> : tensor<1x{kind}>}}> : () -> tensor<1x{kind}>'
        for what, value, kind in constants
    ]
    operands = ", ".join((f"{name}_wide", *(f"{name}_{what}" for what, _, _ in constants)))
    types = ", ".join((wide, *(f"tensor<1x{kind}>" for _, _, kind in constants)))
    attributes = "input_unsigned = false, output_unsigned = false, per_channel = false, rounding_mode = SINGLE_ROUND"
    lines += [
        f"{name}_wide = tosa.table {table['inputs']} : ({table['taken']}) -> {wide}{rest}",
        f"%{table['name']} = tosa.rescale {operands} {{{attributes}, scale32 = true}} : ({types}) -> {narrow}{rest}",
    ]
    return "\n".join(indent.lstrip("\n") + line for line in lines)
