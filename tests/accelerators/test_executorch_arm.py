"""What is said of a .pte file for Arm's accelerators, without a compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeopt.accelerators import executorch_arm, executorch_arm_vela, load_accelerator
from edgeopt.accelerators.ethos_u_report import Summary
from edgeopt.accelerators.executorch_arm import ArmAccelerator, place
from edgeopt.accelerators.executorch_arm_vela import estimate
from edgeopt.errors import ConfigError, ConversionError
from edgeopt.formats.executorch import Program, ProgramOp
from edgeopt.formats.executorch_blocks import BlockTables
from edgeopt.types import Artifact, EdgeTpu, EthosU, OpInfo, Signature, Vgf

U55 = EthosU("ethos-u55", 128, 500, "Ethos_U55_High_End_Embedded", "Shared_Sram", 1 << 20, 1 << 20)
EMPTY = Signature((), ())


def op(type_: str, instruction: int, delegate: str | None = None, layer: str = "") -> ProgramOp:
    return ProgramOp(OpInfo(f"{type_}_0", type_, "int8", delegate, 0), instruction, None, layer, (), ())


def program(*ops: ProgramOp) -> Program:
    delegates = tuple(found.info.delegate for found in ops if found.info.delegate)
    return Program(1, "forward", ("forward",), EMPTY, ops, delegates)


@pytest.fixture
def pte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a delegate of two operators between two kernels, of which one was refused."""
    ops = (
        op("aten.index_select.out", 0, layer="embedding"),
        op("EthosUBackend", 1, "EthosUBackend"),
        op("quantized_decomposed.dequantize_per_tensor.out", 2),
    )
    tables = BlockTables([[("aten.add.Tensor", "body"), ("aten.add.Tensor", "")]], {0: "Op is not supported on U55"})
    monkeypatch.setattr(executorch_arm, "read_program", lambda _: program(*ops))
    monkeypatch.setattr(executorch_arm, "read_tables", lambda _: tables)
    path = tmp_path / "model.pte"
    path.write_bytes(b"program")
    return path


def test_operators_come_in_file_order_with_layers_and_reasons(pte: Path) -> None:
    placement = place(pte, U55)
    assert placement.accelerator == "Ethos-U55-128"
    assert not placement.predicted
    assert [(o.name, o.on, o.layer) for o in placement.ops] == [
        ("aten.index_select.out_0", "cpu", "embedding"),
        ("body/aten.add.Tensor_0", "accelerator", "body"),
        ("aten.add.Tensor_1", "accelerator", None),
        ("quantized_decomposed.dequantize_per_tensor.out_0", "cpu", None),
    ]
    assert placement.ops[0].reason == "Op is not supported on U55"
    assert "U85" in (placement.ops[0].fix or "")
    assert "int8" in (placement.ops[3].fix or "")


def test_a_foreign_file_has_its_delegates_as_operators(pte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch_arm, "read_tables", lambda _: None)
    placement = place(pte, U55)
    assert [o.type for o in placement.ops if o.on == "accelerator"] == ["EthosUBackend"]
    assert "does not say why" in (placement.ops[0].reason or "")


def test_a_file_for_another_accelerator_is_refused(pte: Path) -> None:
    with pytest.raises(ConversionError, match="is for EthosUBackend, not for VgfBackend"):
        place(pte, Vgf())


def test_without_its_tosa_form_a_file_has_no_estimate(pte: Path, tmp_path: Path) -> None:
    artifact = Artifact(pte, "executorch", "w8a8", EMPTY, 7, "", (), {}, ())
    compiled = ArmAccelerator().compile(artifact, U55, tmp_path)
    assert compiled.measurements == compiled.checks == ()
    assert [finding.code for finding in compiled.findings] == ["no-estimate"]


def test_an_accelerator_of_another_vendor_is_refused(pte: Path, tmp_path: Path) -> None:
    artifact = Artifact(pte, "executorch", "w8a8", EMPTY, 7, "", (), {}, ())
    with pytest.raises(ConfigError, match="edge-tpu"):
        load_accelerator("executorch", "ethos-u65").compile(artifact, EdgeTpu(8 << 20, "usb3"), tmp_path)


def test_delegates_share_sram_and_add_up_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def summary(graph: bytes, npu: EthosU, directory: Path) -> Summary:
        del npu, directory
        n = len(graph)
        return Summary(n, 5e8, 10 * n, 20 * n, 30 * n, 0, 0, 40 * n, 50 * n, 60 * n, 0, 0)

    monkeypatch.setattr(executorch_arm_vela, "_summary", summary)
    cost = estimate([b"1", b"333"], U55, tmp_path)
    assert (cost.latency_ms, cost.cycles, cost.macs) == (4, 40, 80)
    assert cost.sram_bytes == 90
    assert (cost.external_bytes, cost.sram_traffic_bytes, cost.storage_traffic_bytes) == (0, 200, 240)
