from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeopt.cli import main


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEOPT_HOME", str(tmp_path))


def test_doctor_without_an_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emulator", "doctor"]) == 3
    shown = capsys.readouterr()
    assert "cortex-a76" in shown.out
    assert "cortex-x3*" in shown.out
    assert "edgeopt emulator setup" in shown.err


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emulator", "doctor", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["works"] is False
    assert document["diagnosis"]["size_bytes"] == 0


def test_remove_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emulator", "remove"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_setup_on_another_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert main(["emulator", "setup"]) == 3
    assert "needs Linux on x86-64" in capsys.readouterr().err
