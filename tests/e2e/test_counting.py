"""Instructions counted in QEMU for real: a program whose every instruction is known, and small networks."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.emulator import core_for, installed
from edgeopt.emulator.counting import InstructionCount, count, count_program
from edgeopt.errors import ConversionError
from edgeopt.types import Signature, SignatureTensor

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("emulator")]

#: Three stretches between marks, with a loop of 1000 rounds in each.
PROGRAM = [
    0xD2800073,  #        mov x19, #3
    0xD28014E8,  # outer: mov x8, #167 (prctl)
    0xD289EA00,  #        mov x0, #0x4f50
    0xF2A8A880,  #        movk x0, #0x4544, lsl #16
    0xD2800021,  #        mov x1, #1
    0xD4000001,  #        svc #0
    0xD2807D14,  #        mov x20, #1000
    0xF94003E3,  # loop:  ldr x3, [sp]
    0xF90003E3,  #        str x3, [sp]
    0x4E829420,  #        sdot v0.4s, v1.16b, v2.16b
    0x4E22D423,  #        fadd v3.4s, v1.4s, v2.4s
    0xF1000694,  #        subs x20, x20, #1
    0x54FFFF61,  #        b.ne loop
    0xD28014E8,  #        mov x8, #167
    0xD289EA00,  #        mov x0, #0x4f50
    0xF2A8A880,  #        movk x0, #0x4544, lsl #16
    0xD2800001,  #        mov x1, #0
    0xD4000001,  #        svc #0
    0xF1000673,  #        subs x19, x19, #1
    0x54FFFDC1,  #        b.ne outer
    0xD2800BA8,  #        mov x8, #93 (exit)
    0xD2800000,  #        mov x0, #0
    0xD4000001,  #        svc #0
]


def executable(instructions: list[int]) -> bytes:
    """A static aarch64 program: ELF header, one segment, code."""
    base, headers = 0x400000, 64 + 56
    code = b"".join(instruction.to_bytes(4, "little") for instruction in instructions)
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 183, 1, base + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, headers + len(code), headers + len(code), 0x1000)
    return identity + header + segment + code


def test_counts_every_instruction_of_a_known_program(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(executable(PROGRAM))
    program.chmod(0o755)
    found = count_program(installed(), core_for("cortex-a76"), [str(program)], tmp_path, "program")
    expected = {"scalar-int": 1 + 1000 + 4, "other": 1}
    expected |= dict.fromkeys(("load", "store", "dotprod", "neon-float", "branch"), 1000)
    assert {name: number for name, number in found.classes.items() if number} == expected
    assert (found.total, found.spread, found.threads) == (6006, 0, 1)
    assert found.hot[0].library == "program"


def test_a_program_that_marks_nothing_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(executable(PROGRAM[-3:]))
    program.chmod(0o755)
    with pytest.raises(ConversionError, match="marked 0 inferences"):
        count_program(installed(), core_for("cortex-a76"), [str(program)], tmp_path, "program")


ROWS, DEPTH, COLUMNS = 16, 256, 128


def product(path: Path, quantized: bool) -> Signature:
    """One matrix product as an ONNX file, in float or in 8-bit integers."""
    rng = np.random.default_rng(0)
    if quantized:
        weight = rng.integers(-127, 128, (DEPTH, COLUMNS)).astype(np.int8)
        kind, result, dtype = TensorProto.UINT8, TensorProto.INT32, "uint8"
    else:
        weight = rng.standard_normal((DEPTH, COLUMNS)).astype(np.float32)
        kind, result, dtype = TensorProto.FLOAT, TensorProto.FLOAT, "float32"
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger" if quantized else "MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", kind, [ROWS, DEPTH])],
        [helper.make_tensor_value_info("y", result, [ROWS, COLUMNS])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    tensor = SignatureTensor("x", "x", (ROWS, DEPTH), "uint8" if dtype == "uint8" else "float32", "float32")
    return Signature((tensor,), ())


def counted(folder: Path, core: str, *, quantized: bool) -> InstructionCount:
    path = folder / "model.onnx"
    signature = product(path, quantized)
    values = np.random.default_rng(1).integers(0, 256, (ROWS, DEPTH)).astype(signature.inputs[0].dtype)
    return count(path, "onnx", signature, {"x": values}, core_for(core))


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, InstructionCount]:
    cores = ("cortex-a53", "cortex-a76", "cortex-a710")
    return {core: counted(tmp_path_factory.mktemp(core), core, quantized=True) for core in cores}


def test_integer_products_use_what_the_core_has(integers: dict[str, InstructionCount]) -> None:
    macs = ROWS * DEPTH * COLUMNS
    assert integers["cortex-a53"].classes["dotprod"] == 0
    assert integers["cortex-a53"].classes["neon-int"] >= macs / 16
    assert macs / 16 <= integers["cortex-a76"].classes["dotprod"] < macs / 12  # one SDOT or UDOT takes 16 products
    assert macs / 32 <= integers["cortex-a710"].classes["i8mm"] < macs / 24  # one xMMLA takes 32
    assert integers["cortex-a53"].total > integers["cortex-a76"].total > integers["cortex-a710"].total


def test_float_products_are_multiplied_four_at_a_time(tmp_path: Path) -> None:
    found = counted(tmp_path, "cortex-a53", quantized=False)
    macs = ROWS * DEPTH * COLUMNS
    assert macs / 4 <= found.classes["neon-float"] < macs / 3
    assert sum(found.classes.values()) == found.total


def test_a_fresh_process_in_another_place_counts_the_same(
    integers: dict[str, InstructionCount], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("PADDING", "x" * 5000)
    folder = tmp_path.joinpath(*["a-folder-with-a-longer-name"] * 3)
    folder.mkdir(parents=True)
    again = counted(folder, "cortex-a76", quantized=True)
    assert (again.total, again.classes, again.threads) == (
        integers["cortex-a76"].total,
        integers["cortex-a76"].classes,
        1,
    )


def test_a_file_that_the_runtime_refuses_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    signature = product(path, False)
    path.write_bytes(b"no model")
    with pytest.raises(ConversionError, match="can't be run on the emulated phone"):
        count(path, "onnx", signature, {"x": np.zeros((ROWS, DEPTH), np.float32)}, core_for("cortex-a53"))
