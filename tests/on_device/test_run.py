"""Which runner edgeopt brings to a device, and how errors of the check become errors of ours."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from edgeopt.bundle.templates.device.devicecheck.device import Facts
from edgeopt.emulator.installation import Emulator, Manifest
from edgeopt.native import IMPLEMENTATIONS
from edgeopt.types import Format

#: `edgeopt.on_device.run` is the function there.
module = importlib.import_module("edgeopt.on_device.run")
BOARD = Facts("linux", "", "", "aarch64", "aarch64", "", "Raspberry Pi 5", "", False, None, None, 0, frozenset())


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """An installation with empty files where setup puts the runners and libraries."""
    files = [f"bin/edgeopt-runner-{name}" for name in IMPLEMENTATIONS]
    for name, implementation in IMPLEMENTATIONS.items():
        folder = f"runtimes/{name}/{implementation.package}"
        files += [f"{folder}/{library.replace('*', '1.31.1')}" for library in implementation.libraries]
    for file in files:
        (tmp_path / "emulator" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "emulator" / file).touch()
    onnx = tmp_path / "emulator/runtimes/onnx/onnxruntime/capi"
    (onnx / "libonnxruntime.so.1").symlink_to("libonnxruntime.so.1.31.1")
    emulator = Emulator(tmp_path / "emulator", Manifest({}, {}, {}, {}))
    monkeypatch.setattr(module, "unavailable", lambda: None)
    monkeypatch.setattr(module, "installed", lambda: emulator)
    return emulator


@pytest.mark.parametrize(
    ("format_", "libraries"),
    [
        ("litert", {"libLiteRt.so"}),
        ("onnx", {"libonnxruntime.so.1"}),  # by the name that the program looks for
        ("executorch", {Path(name).name for name in IMPLEMENTATIONS["executorch"].libraries}),
    ],
)
@pytest.mark.usefixtures("phone")
def test_a_board_gets_the_emulated_phones_runner(tmp_path: Path, format_: Format, libraries: set[str]) -> None:
    folder = tmp_path / "sent"
    folder.mkdir()
    assert module._own_runner(format_, BOARD, folder) == folder / "edgeopt-runner"
    assert {path.name for path in folder.iterdir()} == {"edgeopt-runner", *libraries}


@pytest.mark.parametrize("change", [{"os": "android"}, {"machine": "armv7l"}, {"machine": "x86_64"}])
@pytest.mark.usefixtures("phone")
def test_other_devices_get_none(tmp_path: Path, change: dict[str, str]) -> None:
    assert module._own_runner("litert", replace(BOARD, **change), tmp_path) is None  # type: ignore[arg-type]


def test_without_the_emulated_phone_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "unavailable", lambda: "not set up")
    assert module._own_runner("litert", BOARD, tmp_path) is None
