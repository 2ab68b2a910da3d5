from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest

from edgeopt.emulator.cycles import Block, estimate, parse_analysis

NOP, ADD, SDOT = (word.to_bytes(4, "little") for word in (0xD503201F, 0x4EA28420, 0x4E829420))
UNITS = ["A57UnitB", "A57UnitI.\0", "A57UnitI.\1", "A57UnitX"]


def region(name: str, total: int, iterations: int = 100) -> dict[str, object]:
    return {
        "Instructions": ["nop"],
        "Name": name,
        "SummaryView": {"IPC": 1.0, "Iterations": iterations, "TotalCycles": total, "BlockRThroughput": 1.0},
    }


def analysis(*regions: dict[str, object], units: list[str] = UNITS) -> str:
    return json.dumps({"CodeRegions": regions, "TargetInfo": {"CPUName": "cortex-a72", "Resources": units}})


def tools(folder: Path, monkeypatch: pytest.MonkeyPatch, disassembler: str, analyzer: str) -> None:
    """Put two shell scripts on an otherwise almost empty PATH."""
    version = 'if [ "$1" = --version ]; then echo "Debian LLVM version 15.0.7"; exit 0; fi\n'
    for name, script in (("llvm-mc", disassembler), ("llvm-mca", version + analyzer)):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_reads_cycles_per_execution_and_the_models_name() -> None:
    blocks = [Block(NOP, 1), Block(ADD, 1)]
    parsed = parse_analysis(analysis(region("0", 303), region("1", 50, 10)), blocks)
    assert parsed == ({blocks[0]: 3.03, blocks[1]: 5.0}, "A57")


@pytest.mark.parametrize(
    ("units", "name"),
    [
        (["CortexA55UnitALU", "CortexA55UnitB"], "CortexA55"),
        (["M5PipeF0", "M5PipeLS"], "M5"),
        (["N2UnitB"], "N2UnitB"),
        ([], "unnamed"),
    ],
)
def test_names_the_model_by_its_units(units: list[str], name: str) -> None:
    parsed = parse_analysis(analysis(units=units), [])
    assert parsed is not None
    assert parsed[1] == name


@pytest.mark.parametrize("text", ["", "[]", '{"CodeRegions": []}', analysis({"Name": "0"}), analysis({"Name": 1})])
def test_other_output_is_no_analysis(text: str) -> None:
    assert parse_analysis(text, [Block(NOP, 1)]) is None


def test_counts_instructions_of_a_block() -> None:
    assert Block(NOP + ADD, 10).instructions == 20


def test_no_estimate_without_the_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert estimate([Block(NOP, 1)], "cortex-a72") is None


def test_adds_up_blocks_and_scales_to_what_was_not_covered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two blocks of one code are one; an instruction that the disassembler doesn't know leaves its block out."""
    (tmp_path / "said.json").write_text(analysis(region("0", 200)), encoding="ascii")
    tools(
        tmp_path,
        monkeypatch,
        'printf "\\t.text\\n\\tnop\\n"; echo "<stdin>:2:1: warning: invalid instruction encoding" >&2',
        f"cat {tmp_path}/said.json",
    )
    found = estimate([Block(NOP, 50), Block(SDOT, 20), Block(NOP, 10)], "cortex-a72")
    assert found is not None
    assert found.coverage == 0.75
    assert found.cycles == pytest.approx(60 * 2.0 / 0.75)
    assert found.model == "llvm-mca 15.0.7, LLVM's model A57 for cortex-a72"


def test_no_estimate_where_less_than_half_is_covered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "said.json").write_text(analysis(region("0", 200)), encoding="ascii")
    tools(
        tmp_path,
        monkeypatch,
        'printf "\\t.text\\n\\tnop\\n"; echo "<stdin>:1:1: warning: invalid instruction encoding" >&2',
        f"cat {tmp_path}/said.json",
    )
    assert estimate([Block(SDOT, 60), Block(NOP, 40)], "cortex-a72") is None


def test_tries_again_without_the_blocks_that_the_model_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "said.json").write_text(analysis(region("0", 400)), encoding="ascii")
    tools(
        tmp_path,
        monkeypatch,
        'printf "\\t.text\\n\\tnop\\n\\tfadd\\tz0.s, z1.s, z2.s\\n"',
        f'if grep -q fadd; then echo "error: found an unsupported instruction in the input assembly sequence." >&2; '
        f'printf "note: instruction: \\tfadd\\tz0.s, z1.s, z2.s\\n" >&2; exit 1; fi; cat {tmp_path}/said.json',
    )
    found = estimate([Block(NOP, 80), Block(SDOT, 20)], "cortex-a72")
    assert found is not None
    assert found.coverage == 0.8
    assert found.cycles == pytest.approx(80 * 4.0 / 0.8)


def test_no_estimate_for_a_core_that_llvm_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools(
        tmp_path,
        monkeypatch,
        'printf "\\t.text\\n\\tnop\\n"',
        "echo \"'neoverse-n2' is not a recognized processor for this target (ignoring processor)\" >&2",
    )
    assert estimate([Block(NOP, 1)], "cortex-a710") is None


def test_a_tool_that_fails_gives_no_estimate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools(tmp_path, monkeypatch, "exit 1", "exit 1")
    assert estimate([Block(NOP, 1)], "cortex-a72") is None


def test_no_estimate_from_the_model_of_another_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """LLVM 14 lends the Cortex-A76 and its twin for servers that of the A57, where float takes twice as long."""
    (tmp_path / "said.json").write_text(analysis(region("0", 200)), encoding="ascii")
    tools(tmp_path, monkeypatch, 'printf "\\t.text\\n\\tnop\\n"', f"cat {tmp_path}/said.json")
    assert estimate([Block(NOP, 1)], "cortex-a72") is not None
    assert estimate([Block(NOP, 1)], "cortex-a76") is None
    units = ["N1UnitB", "N1UnitI.0", "N1UnitV0"]
    (tmp_path / "said.json").write_text(analysis(region("0", 200), units=units), encoding="ascii")
    found = estimate([Block(NOP, 1)], "cortex-a76")
    assert found is not None
    assert found.model == "llvm-mca 15.0.7, LLVM's model N1 for cortex-a76"


@pytest.mark.parametrize("core", ["cortex-a53", "cortex-a55", "cortex-a510", "cortex-x4", "apple-a15"])
def test_no_estimate_for_cores_whose_model_is_not_believed(core: str) -> None:
    """On the Cortex-A53, llvm-mca has every load wait for the multiplication before it: IPC 0.35 in fp32."""
    assert estimate([Block(NOP, 1)], core) is None


def test_takes_the_newest_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "said.json").write_text(analysis(region("0", 200)), encoding="ascii")
    tools(tmp_path, monkeypatch, 'printf "\\t.text\\n\\tnop\\n"', f"cat {tmp_path}/said.json")
    for name in ("llvm-mc", "llvm-mca"):
        newer = tmp_path / f"{name}-19"
        newer.write_text((tmp_path / name).read_text().replace("15.0.7", "19.1.7"))
        newer.chmod(0o755)
    found = estimate([Block(NOP, 1)], "cortex-a72")
    assert found is not None
    assert found.model.startswith("llvm-mca 19.1.7")


def test_the_real_tool_sees_what_issues_together() -> None:
    """A Cortex-A72 starts one 128-bit multiply-accumulate in floats a cycle (Arm's Software Optimization Guide)."""
    if shutil.which("llvm-mc") is None or shutil.which("llvm-mca") is None:
        pytest.skip("llvm-mc and llvm-mca are not installed")
    fmla = b"".join((0x4E3FCFC0 | register).to_bytes(4, "little") for register in range(12))
    found = estimate([Block(fmla, 1000)], "cortex-a72")
    assert found is not None
    assert found.coverage == 1.0
    assert 12000 <= found.cycles < 12500
    assert "A57" in found.model
