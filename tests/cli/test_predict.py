"""`edgeopt predict` and `edgeopt devices`: what they print, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from typer.main import get_command

from edgeopt.cli.console import Settings
from edgeopt.cli.devices import devices
from edgeopt.cli.failures import report_failure
from edgeopt.cli.predict import predict

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("EDGEOPT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    app = typer.Typer()
    app.command()(predict)
    app.add_typer(devices)

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            command = get_command(app)
            code = command.main([str(a) for a in arguments], "edgeopt", standalone_mode=False, obj=Settings())
        except Exception as error:
            code = report_failure(error, debug=False)
        captured = capsys.readouterr()
        return int(code or 0), captured.out, captured.err

    return call


@pytest.fixture
def file(tmp_path: Path) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="stem/Conv")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, 32, 32])],
        [numpy_helper.from_array(np.zeros((16, 8, 3, 3), np.float32), "w")],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def test_one_device(run: Run, file: Path) -> None:
    code, out, err = run("predict", file, "--device", "pixel-4", "--threads", "4")
    assert (code, err) == (0, "")
    assert out.startswith("net.onnx on pixel-4, 4 threads\n")
    assert " ms, estimated" in out
    assert "90% of cases" in out
    assert "stem/Conv" in out
    assert "note: onnx: the figures are of LiteRT; ONNX Runtime is taken to be as fast" in out


def test_as_json(run: Run, file: Path) -> None:
    _, out, _ = run("predict", file, "--device", "pixel-4", "--json")
    document = json.loads(out)
    assert document["provenance"] == "estimated"
    assert document["prediction"]["ops"][0]["name"] == "stem/Conv"
    assert document["prediction"]["low"] < document["prediction"]["ms"] < document["prediction"]["high"]
    assert document["float"] is None


def test_all_devices(run: Run, file: Path) -> None:
    code, out, _ = run("predict", file)
    assert code == 0
    assert "raspberry-pi-zero-2-w" in out
    assert "not intel-n100: the latency model knows nothing about the core gracemont" in out
    _, out, _ = run("predict", file, "--json")
    assert {p["device"] for p in json.loads(out)["devices"]["predictions"]} >= {"pixel-4", "iphone-15"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("none.tflite",), "none.tflite: no such file"),
        (("net.txt",), "net.txt: is not a model file; give a .tflite, .onnx or .pte file, or a bundle"),
        (("net.onnx", "--device", "pixxel-4"), "unknown device 'pixxel-4'; did you mean"),
        (("net.onnx", "--device", "corstone-300"), "device 'corstone-300': takes no onnx files"),
    ],
)
def test_errors_are_one_line(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], line: str
) -> None:
    monkeypatch.chdir(file.parent)
    code, out, err = run("predict", *arguments)
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1


def test_calibrating(run: Run, file: Path) -> None:
    code, out, _ = run("devices", "calibrate", "pixel-4", "--artifact", file, "--ms", "3.5", "--threads", "2")
    assert code == 0
    assert "net.onnx" in out
    assert "'edgeopt predict --device pixel-4' uses this from now on" in out
    assert "calibrated with 1 figure of yours" in run("predict", file, "--device", "pixel-4")[1]
    _, out, _ = run("devices", "calibrate", "pixel-4", "--artifact", file, "--ms", "3", "--json")
    assert len(json.loads(out)["calibration"]["figures"]) == 2
    assert run("devices", "calibrate", "pixel-4", "--forget")[1] == "pixel-4: calibration removed\n"
    assert "calibrated with" not in run("predict", file, "--device", "pixel-4")[1]
    code, _, err = run("devices", "calibrate", "pixel-4")
    assert (code, err) == (2, "error: calibrate: give device reports, or --artifact and --ms\n")


def test_devices_by_name_as_ever(run: Run) -> None:
    assert run("devices", "raspberry-pi-5")[1].startswith("Raspberry Pi 5\n")
    assert run("devices", "raspberry-pi-5", "--json")[1] == run("devices", "--json", "raspberry-pi-5")[1]
    assert json.loads(run("devices", "--json")[1])["devices"]
    assert "raspberry-pi-zero-2-w" in run("devices")[1]
    assert "unknown device 'pixxel'" in run("devices", "pixxel")[2]
