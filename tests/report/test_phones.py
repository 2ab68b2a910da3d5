"""The table of emulated phones."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from edgeopt.report import render, render_summary
from edgeopt.types import Measurement, Provenance, Report


def report(*measurements: Measurement) -> Report:
    return Report("passed", "net", "android-int8", "litert", (), measurements, (), (), (), {})


def measured(name: str, subject: str, value: float, unit: str, how: Provenance = "emulated") -> Measurement:
    return Measurement(name, subject, value, unit, how, "phone:cortex-a76", threads=1)


def shown(found: Report) -> list[str]:
    console = Console(width=100, record=True, quiet=False)
    with console.capture() as capture:
        render(found, console)
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def test_counts_of_the_file_beside_its_twin() -> None:
    lines = shown(
        report(
            measured("host_identical", "quantized", 1.0, "fraction"),
            measured("instructions", "quantized", 65_800_000, "instructions"),
            measured("instructions", "float", 155_000_000, "instructions"),
            measured("instruction_ratio", "quantized", 155 / 65.8, "x"),
            measured("cycles", "quantized", 30e6, "cycles", "estimated"),
            measured("cycles", "float", 90e6, "cycles", "estimated"),
        )
    )
    assert "On emulated Arm cores (instructions of one inference, 1 thread)" in lines
    assert any(line.endswith("float shipped ratio ratio of cycles, estimated") for line in lines)
    assert "cortex-a76 100.00 % 155 M 65.8 M 2.36x 3.00x" in lines


def test_a_file_without_a_twin_and_other_outputs() -> None:
    lines = shown(
        report(
            measured("host_identical", "float", 0.5, "fraction"),
            measured("host_sqnr_db", "float", 110.0, "dB"),
            measured("host_agreement", "float", 1.0, "fraction"),
            measured("instructions", "float", 155_000_000, "instructions"),
        )
    )
    assert "cortex-a76 50.00 % (110.0 dB, 100.00 % answer alike) 155 M" in lines


def test_nothing_where_no_phone_was_asked() -> None:
    assert not any("emulated Arm" in line for line in shown(report()))


def test_a_summary_of_several_targets_shows_each_ones_cores() -> None:
    counted = replace(
        report(measured("instructions", "float", 155_000_000, "instructions")), target="android-onnx-int8"
    )
    console = Console(width=100)
    with console.capture() as capture:
        render_summary((report(), counted), console)
    assert "android-onnx-int8 on emulated Arm cores" in capture.get()
    assert "android-int8 on emulated" not in capture.get()
