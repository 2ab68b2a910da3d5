"""Vela's configuration and reports, read from short recorded texts; nothing is compiled here."""

from __future__ import annotations

from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path

import pytest

from edgeopt.accelerators.ethos_u import VelaAccelerator
from edgeopt.accelerators.ethos_u_config import accelerator_config, title, write_configuration
from edgeopt.accelerators.ethos_u_report import cpu_reasons, fates, read_database, read_summary
from edgeopt.errors import ConfigError, ConversionError
from edgeopt.types import Artifact, EthosU, Signature, Vulkan

U55 = EthosU("ethos-u55", 128, 500, "Fast_Flash", "Shared_Sram", 1 << 20, 4 << 20)

SHIPPED = """\
[System_Config.Fast_Flash]
core_clock=500e6
axi0_port=Sram
axi1_port=OffChipFlash
Sram_clock_scale=1.0
OffChipFlash_clock_scale=0.125
[Memory_Mode.Shared_Sram]
const_mem_area=Axi1
arena_mem_area=Axi0
[Memory_Mode.Small]
inherit=Memory_Mode.Shared_Sram
arena_cache_size=393216
"""

SUMMARY = {
    "inference_time": "0.0195",
    "core_clock": "500000000.0",
    "cycles_total": "9750000",
    "nn_macs": "385",
    "sram_memory_used": "1474.21875",
    "dram_memory_used": "0.0",
    "on_chip_flash_memory_used": "0.0",
    "off_chip_flash_memory_used": "4457.5",
    "sram_total_bytes": "100",
    "dram_total_bytes": "1",
    "on_chip_flash_total_bytes": "2",
    "off_chip_flash_total_bytes": "3",
    "total_original_weights": "40",
    "total_npu_encoded_weights": "30",
}

LOG = """\
Warning (supported operators) operator: QUANTIZE, ofm: 'x_quantized'
Reason: Operation has tensor with unsupported DataType Float32
Feature-map dataTypes must be one of {"INT16", "INT8"}

Warning (supported operators) operator: SIN, ofm: 'head:3'
Reason: Unsupported opType

Warning (supported operators) operator: None, ofm: 'act'
Reason: Unsupported opType

Network summary for model
"""

#: A float input, quantized on the CPU; a convolution with its ReLU6, and a PAD that was folded into it.
DATABASE = """\
<?xml version='1.0' encoding='UTF-8'?>
<debug source="/somewhere/model">
<table name="source">
<![CDATA[
"id","operator","ext_key"
1,"Quantize",0
2,"Pad",1
3,"Conv2D",2
]]>
</table>
<table name="perf">
<![CDATA[
"id","source_id","optimised_id","operator","name","staging_usage","op_cycles"
300,1,9,"Passthrough","x_quantized",0,0
303,3,8,"Conv2D","stem",2048,500
307,3,7,"Relu6","stem",0,20
]]>
</table>
<table name="perf_debug_conn">
<![CDATA[
"id","input_op_id","input_index"
300,"-1",0
303,300,0
"-2",307,0
]]>
</table>
</debug>
"""


def configuration(npu: EthosU, tmp_path: Path) -> ConfigParser:
    shipped = tmp_path / "vela.ini"
    shipped.write_text(SHIPPED)
    write_configuration(npu, shipped, tmp_path / "board.ini")
    found = ConfigParser()
    found.read(tmp_path / "board.ini")
    return found


def test_a_slower_clock_leaves_the_flash_as_fast_as_it_is(tmp_path: Path) -> None:
    section = configuration(replace(U55, mhz=250), tmp_path)["System_Config.Fast_Flash"]
    assert float(section["core_clock"]) == 250e6
    assert float(section["OffChipFlash_clock_scale"]) == 0.25
    assert float(section["Sram_clock_scale"]) == 1.0


def test_keys_keep_their_capitals_for_vela(tmp_path: Path) -> None:
    configuration(U55, tmp_path)
    assert "OffChipFlash_clock_scale=0.125\n" in (tmp_path / "board.ini").read_text()


def test_a_memory_mode_has_what_it_inherits(tmp_path: Path) -> None:
    section = configuration(replace(U55, memory_mode="Small"), tmp_path)["Memory_Mode.Small"]
    assert dict(section) == {"const_mem_area": "Axi1", "arena_mem_area": "Axi0", "arena_cache_size": "393216"}


def test_an_unknown_configuration_is_a_mistake_in_the_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration(replace(U55, system_config="Nowhere"), tmp_path)
    assert "npu.system-config: Vela has no 'Nowhere'" in caught.value.line()
    assert "Fast_Flash, Alif_HP_Sram_Mram" in caught.value.line()


def test_names_of_the_accelerator() -> None:
    assert (accelerator_config(U55), title(U55)) == ("ethos-u55-128", "Ethos-U55-128")
    with pytest.raises(ConfigError, match="there is no Ethos-U55-512; take one of 64, 128, 256"):
        accelerator_config(replace(U55, macs=512))


def write_summary(path: Path, row: dict[str, str]) -> Path:
    path.write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    return path


def test_summary_in_bytes_and_milliseconds(tmp_path: Path) -> None:
    found = read_summary(write_summary(tmp_path / "summary.csv", SUMMARY))
    assert found.inference_ms == pytest.approx(19.5)
    assert (found.cycles, found.macs) == (9_750_000, 385)
    assert (found.sram, found.off_chip_flash) == (1_509_600, 4_564_480)
    assert (found.sram_traffic, found.other_traffic) == (100, 6)


@pytest.mark.parametrize("damage", ["empty", "column", "number"])
def test_a_summary_of_another_version_is_refused(damage: str, tmp_path: Path) -> None:
    row = dict(SUMMARY)
    if damage == "column":
        del row["cycles_total"]
    if damage == "number":
        row["nn_macs"] = "many"
    path = write_summary(tmp_path / "summary.csv", row)
    if damage == "empty":
        path.write_text("")
    with pytest.raises(ConversionError, match=r"summary.csv: Vela's summary has an unknown form"):
        read_summary(path)


def test_reasons_by_the_tensor_that_vela_names() -> None:
    reasons = cpu_reasons(LOG)
    assert set(reasons) == {"x_quantized", "head:3", "act"}
    assert reasons["x_quantized"].startswith("operation has tensor with unsupported DataType Float32: Feature-map")
    assert reasons["head:3"] == "the NPU has no SIN"
    assert reasons["act"] == "Vela has no such operator"


def test_fates_by_position_in_the_file() -> None:
    found = fates(read_database(DATABASE))
    assert list(found) == [0, 1, 2]
    assert (found[0].on_npu, found[0].at_border, found[0].tensor) == (False, True, "x_quantized")
    folded = found[1]
    assert (folded.on_npu, folded.tensor, folded.cycles) == (True, None, 0)
    assert (found[2].on_npu, found[2].cycles, found[2].memory_bytes) == (True, 520, 2048)
    assert found[2].at_border


def test_a_database_without_its_tables_is_refused() -> None:
    with pytest.raises(ConversionError, match="Vela's database has an unknown form"):
        fates(read_database("<debug></debug>"))


def test_another_accelerator_is_refused(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "m.tflite", "litert", "w8a8", Signature((), ()), 1, "0" * 64, (), {}, ())
    with pytest.raises(ConfigError, match="not for vulkan"):
        VelaAccelerator().compile(artifact, Vulkan(), tmp_path)
