"""What works on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from edgeopt import doctor
from edgeopt.cli import main
from edgeopt.progress import Silent


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine where some packages are missing and some code fails."""

    def make(missing: tuple[str, ...] = (), broken: str = "", problem: str = "") -> None:
        monkeypatch.setattr(doctor, "_version", lambda package: None if package in missing else "1.0")
        monkeypatch.setattr(doctor, "_run", lambda code: problem if broken and broken in code else None)

    return make


def part(name: str, kind: str) -> doctor.Part:
    (found,) = (p for p in doctor.diagnose(Silent()).parts if (p.name, p.kind) == (name, kind))
    return found


def test_all_is_well(machine: Callable[..., None]) -> None:
    machine()
    diagnosis = doctor.diagnose(Silent())
    assert diagnosis.core_works
    assert all(p.works and p.fix is None for p in diagnosis.parts)
    assert {"torch", "litert", "onnx", "onnxruntime", "executorch", "hf"} <= {p.name for p in diagnosis.parts}


def test_a_missing_extra_is_no_trouble_and_has_its_command(machine: Callable[..., None]) -> None:
    machine(missing=("transformers", "tokenizers"))
    found = part("hf", "extra")
    assert (found.works, found.detail) == (False, "not installed: transformers, tokenizers")
    assert found.fix == "pip install 'edgeopt[hf]'"
    assert doctor.diagnose(Silent()).core_works


def test_a_missing_core_package_comes_with_the_version_that_we_need(machine: Callable[..., None]) -> None:
    machine(missing=("onnxsim",))
    found = part("onnx", "exporter")
    assert found.detail == "not installed: onnxsim"
    assert found.fix is not None
    assert "'onnxsim>=" in found.fix
    assert not doctor.diagnose(Silent()).core_works


def test_every_extra_of_the_package_is_known_to_the_doctor() -> None:
    from importlib.metadata import metadata

    assert set(metadata("edgeopt").get_all("Provides-Extra") or ()) - {"accelerators", "dev"} == set(doctor._EXTRAS)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("pass", None),
        ("import absent_module", "ModuleNotFoundError: No module named 'absent_module'"),
        ("import os; os.abort()", "crashed with signal 6"),
        ("print('needs a driver')", "needs a driver"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_a_part_is_tried_where_it_can_not_hurt(code: str, problem: str | None) -> None:
    assert doctor._run(code) == problem


def test_a_part_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS_PER_PART", 0.2)
    assert doctor._run("import time; time.sleep(60)") == "took more than 0 s"


def test_the_command_ends_with_3_when_the_core_is_broken(
    machine: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    machine(broken="import torch", problem="crashed with signal 11")
    assert main(["doctor"]) == 3
    out, err = capfd.readouterr()
    assert "crashed with signal 11" in out
    assert "To get core torch:\n  pip install 'torch>=" in out
    assert err == "error: the core does not work here: core 'torch'; the output says how to mend each\n"
    assert main(["doctor", "--json"]) == 3
    document = json.loads(capfd.readouterr().out)
    assert document["core_works"] is False
    assert document["machine"]["cores"] >= 1


def test_the_command_ends_with_0_when_only_extras_are_missing(
    machine: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    machine(missing=("tensorflow",))
    assert main(["doctor"]) == 0
    out, err = capfd.readouterr()
    assert "pip install 'edgeopt[tensorflow]'" in out
    assert err == ""
