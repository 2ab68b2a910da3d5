"""The decoder of the counting plugin, built for this machine and given known encodings (llvm-mc --show-encoding)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edgeopt.emulator.toolchain import build_plugin, c_compiler
from edgeopt.errors import MissingError
from edgeopt.native import SOURCES

PROGRAM = r"""
#include <stdio.h>
#include "a64_classes.h"

int main(void) {
    static struct a64_masks masks;
    int row = a64_prepare(&masks);
    if (row >= 0) return printf("malformed: %s\n", a64_rows[row].pattern), 1;
    unsigned instruction;
    while (scanf("%x", &instruction) == 1) puts(a64_class_names[a64_classify(&masks, instruction)]);
    return 0;
}
"""

ENCODINGS = {
    "scalar-int": {
        "add x0, x1, x2": 0x8B020020,
        "madd w0, w1, w2, w3": 0x1B020C20,
        "adrp x0, #4096": 0xB0000000,
        "csel x0, x1, x2, eq": 0x9A820020,
        "ubfx x0, x1, #3, #4": 0xD3431820,
        "sdiv x0, x1, x2": 0x9AC20C20,
    },
    "scalar-float": {
        "fadd s0, s1, s2": 0x1E222820,
        "fmadd d0, d1, d2, d3": 0x1F420C20,
        "fmov x0, d1": 0x9E660020,
        "scvtf s0, w1": 0x1E220020,
        "fcmp s0, s1": 0x1E212000,
        "fmla s0, s1, v2.s[1]": 0x5FA21020,
        "faddp s0, v1.2s": 0x7E30D820,
        "scvtf s0, s1": 0x5E21D820,
        "fabd h0, h1, h2": 0x7EC21420,
    },
    "neon-int": {
        "add v0.4s, v1.4s, v2.4s": 0x4EA28420,
        "and v0.16b, v1.16b, v2.16b": 0x4E221C20,
        "smlal v0.4s, v1.4h, v2.h[3]": 0x0F722020,
        "sqrdmulh v0.4s, v1.4s, v2.4s": 0x6EA2B420,
        "tbl v0.16b, { v1.16b }, v2.16b": 0x4E020020,
        "ext v0.16b, v1.16b, v2.16b, #4": 0x6E022020,
        "dup v0.4s, w1": 0x4E040C20,
        "movi v0.4s, #0": 0x4F000400,
        "fmov v0.4s, #1.00000000": 0x4F03F600,
        "sshr v0.4s, v1.4s, #3": 0x4F3D0420,
        "addv s0, v1.4s": 0x4EB1B820,
        "aese v0.16b, v1.16b": 0x4E284820,
        "urecpe v0.4s, v1.4s": 0x4EA1C820,
        "sqxtn v0.4h, v1.4s": 0x0E614820,
        "mov v0.s[1], w2": 0x4E0C1C40,
    },
    "neon-float": {
        "fmla v0.4s, v1.4s, v2.s[0]": 0x4F821020,
        "fadd v0.4s, v1.4s, v2.4s": 0x4E22D420,
        "fcvtns v0.4s, v1.4s": 0x4E21A820,
        "scvtf v0.4s, v1.4s": 0x4E21D820,
        "scvtf v0.4s, v1.4s, #4": 0x4F3CE420,
        "fmaxnmv s0, v1.4s": 0x6E30C820,
        "fcvtl v0.4s, v1.4h": 0x0E217820,
        "fmlal v0.4s, v1.4h, v2.4h": 0x4E22EC20,
        "frecpe v0.4s, v1.4s": 0x4EA1D820,
        "fcmla v0.4s, v1.4s, v2.4s, #90": 0x6E82CC20,
    },
    "neon-half": {
        "fmla v0.8h, v1.8h, v2.h[0]": 0x4F021020,
        "fadd v0.8h, v1.8h, v2.8h": 0x4E421420,
        "fsqrt v0.8h, v1.8h": 0x6EF9F820,
        "fmaxv h0, v1.8h": 0x4E30F820,
        "fcadd v0.8h, v1.8h, v2.8h, #90": 0x6E42E420,
    },
    "dotprod": {
        "sdot v0.4s, v1.16b, v2.16b": 0x4E829420,
        "udot v0.4s, v1.16b, v2.4b[1]": 0x6FA2E020,
        "usdot v0.4s, v1.16b, v2.16b": 0x4E829C20,
        "sudot v0.4s, v1.16b, v2.4b[0]": 0x4F02F020,
    },
    "i8mm": {
        "smmla v0.4s, v1.16b, v2.16b": 0x4E82A420,
        "ummla v0.4s, v1.16b, v2.16b": 0x6E82A420,
        "usmmla v0.4s, v1.16b, v2.16b": 0x4E82AC20,
    },
    "bf16": {
        "bfdot v0.4s, v1.8h, v2.8h": 0x6E42FC20,
        "bfdot v0.4s, v1.8h, v2.2h[1]": 0x4F62F020,
        "bfmmla v0.4s, v1.8h, v2.8h": 0x6E42EC20,
        "bfmlalb v0.4s, v1.8h, v2.8h": 0x2EC2FC20,
    },
    "sve": {
        "fmla z0.s, p0/m, z1.s, z2.s": 0x65A20020,
        "sdot z0.s, z1.b, z2.b": 0x44820020,
        "whilelo p0.s, x0, x1": 0x25A11C00,
    },
    "load": {
        "ldr x0, [x1]": 0xF9400020,
        "ldr q0, [x1, #16]": 0x3DC00420,
        "ldp q0, q1, [x0], #32": 0xACC10400,
        "ld1 { v0.16b, v1.16b }, [x0]": 0x4C40A000,
        "ld1r { v0.4s }, [x0]": 0x4D40C800,
        "ldrsb w0, [x1, x2]": 0x38E26820,
        "ldar x0, [x1]": 0xC8DFFC20,
        "ldapr w0, [x1]": 0xB8BFC020,
        "ldr x0, #8": 0x58000040,
        "ld1w { z0.s }, p0/z, [x0]": 0xA540A000,
    },
    "store": {
        "str x0, [x1]": 0xF9000020,
        "stp q0, q1, [x0, #32]": 0xAD010400,
        "st1 { v0.s }[1], [x0]": 0x0D009000,
        "stur w0, [x1, #-4]": 0xB81FC020,
        "stlr x0, [x1]": 0xC89FFC20,
        "st1w { z0.s }, p0, [x0]": 0xE540E000,
    },
    "branch": {
        "b #8": 0x14000002,
        "bl #8": 0x94000002,
        "b.ne #-8": 0x54FFFFC1,
        "cbz x0, #8": 0xB4000040,
        "tbnz w0, #3, #8": 0x37180040,
        "blr x1": 0xD63F0020,
        "ret": 0xD65F03C0,
    },
    "other": {
        "nop": 0xD503201F,
        "svc #0": 0xD4000001,
        "dmb ish": 0xD5033BBF,
        "mrs x0, FPCR": 0xD53B4400,
        "prfm pldl1keep, [x0, #64]": 0xF9802000,
        "prfm pldl1keep, [x0, x1]": 0xF8A16800,
        "prfum pldl1keep, [x0, #-8]": 0xF89F8000,
        "ldadd w0, w1, [x2]": 0xB8200041,
        "cas x0, x1, [x2]": 0xC8A07C41,
        "swp w0, w1, [x2]": 0xB8208041,
        "prfw pldl1keep, p0, [x0]": 0x85C04000,
    },
}


def compiler() -> list[str]:
    try:
        return c_compiler()
    except MissingError:
        pytest.skip("no C compiler on this machine")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    source, program = folder / "classify.c", folder / "classify"
    source.write_text(PROGRAM, encoding="ascii")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    subprocess.run([*compiler(), *flags, str(source), "-o", str(program)], check=True)
    return program


def classify(program: Path, instructions: list[int]) -> list[str]:
    text = "\n".join(f"{instruction:08x}" for instruction in instructions)
    done = subprocess.run([program], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout.split()


@pytest.mark.parametrize("expected", ENCODINGS)
def test_known_encodings_get_their_class(classifier: Path, expected: str) -> None:
    found = classify(classifier, list(ENCODINGS[expected].values()))
    assert dict(zip(ENCODINGS[expected], found, strict=True)) == dict.fromkeys(ENCODINGS[expected], expected)


def test_what_is_no_instruction_is_other(classifier: Path) -> None:
    assert classify(classifier, [0x00000000, 0xFFFFFFFF, 0x03000000]) == ["other"] * 3


def test_the_plugin_asks_for_no_version_of_the_c_library(tmp_path: Path) -> None:
    """The emulator that loads it may come with an older one than this machine's."""
    compiler()
    build_plugin(SOURCES / "counter.c", tmp_path / "counter.so")
    library = (tmp_path / "counter.so").read_bytes()
    assert b"qemu_plugin_install" in library
    assert b"GLIBC_" not in library
    assert b"libc.so" not in library


def test_the_plugin_builds_without_warnings(tmp_path: Path) -> None:
    flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-nostdlib", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run(
        [*compiler(), *flags, str(SOURCES / "counter.c"), "-o", str(tmp_path / "counter.so")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
