"""Figures of the user's own: what follows from them, how they are kept, and how device reports are read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.device_profiles import load_device
from edgeopt.errors import ConfigError, UsageError
from edgeopt.prediction import calibrate, find_calibration, forget, measurement, read_device_report
from edgeopt.prediction.calibration import directory
from edgeopt.prediction.calibration_fit import Share, factors


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEOPT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def model(path: Path, side: int = 256) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="stem/Conv")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, side, side])],
        [numpy_helper.from_array(np.zeros((16, 8, 1, 1), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def test_what_agrees_changes_nothing() -> None:
    assert factors([Share(3.0, 2.0, 0.5, 5.5)]) == pytest.approx((1.0, 1.0))


def test_one_figure_moves_both_most_of_the_way() -> None:
    compute, memory = factors([Share(5.0, 5.0, 0.0, 15.0)])
    assert 1.3 < (compute + memory) / 2 < 1.5
    # One that is far off is trusted less than it says, as it may be of a throttled device.
    assert factors([Share(10.0, 0.0, 0.0, 100.0)])[0] < 10


def test_several_figures_tell_the_two_apart() -> None:
    truth = (1.4, 0.8)
    mixes = [(9.0, 1.0), (1.0, 9.0), (5.0, 5.0), (8.0, 2.0)] * 3
    shares = [Share(c, m, 0.2, c * truth[0] + m * truth[1] + 0.2) for c, m in mixes]
    assert factors(shares) == pytest.approx(truth, rel=0.03)


def test_kept_in_a_file_and_read_back(tmp_path: Path, home: Path) -> None:
    device, path = load_device("pixel-4"), model(tmp_path / 'odd "name".onnx')
    assert find_calibration(device) is None
    made = calibrate(device, [measurement(path, 0.3, 4)])
    assert made.path == home / "devices" / "pixel-4.toml"
    assert find_calibration(device) == made
    assert made.figures[0].file == 'odd "name".onnx'
    more = calibrate(device, [measurement(path, 0.2, 4), measurement(path, 0.5, 1)])
    assert [(f.threads, f.share.measured_ms) for f in more.figures] == [(4, 0.2), (1, 0.5)]
    assert [p.name for p in made.path.parent.iterdir()] == ["pixel-4.toml"]
    assert forget(device)
    assert not forget(device)
    assert find_calibration(device) is None


def test_without_edgeopt_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EDGEOPT_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert directory() == tmp_path / ".config" / "edgeopt" / "devices"


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    device = load_device("pixel-4")
    path = calibrate(device, [measurement(model(tmp_path / "m.onnx"), 1.0, 1)]).path
    good = path.read_text()
    path.write_text(good.replace("measured-ms = 1.0", "measured-ms = -1.0"))
    with pytest.raises(ConfigError, match=r"pixel-4\.toml: figure\[0\]\.measured-ms"):
        find_calibration(device)
    path.write_text(good.replace('model = "', 'model = "0'))
    with pytest.raises(UsageError, match=r"another version of the latency model; .*--forget"):
        find_calibration(device)


@pytest.mark.parametrize(
    ("name", "ms", "line"),
    [
        ("m.onnx", 0.0, "--ms: must be more than 0"),
        ("m.onnx", float("nan"), "--ms: must be more than 0"),
        ("m.txt", 1.0, "is not a model file"),
        ("absent.onnx", 1.0, "no such file"),
    ],
)
def test_figures_that_are_none(tmp_path: Path, name: str, ms: float, line: str) -> None:
    model(tmp_path / "m.onnx")
    with pytest.raises(UsageError) as caught:
        measurement(tmp_path / name, ms, 1)
    assert line in caught.value.line()


def report(folder: Path, of: Path, **changed: object) -> Path:
    document = {
        "schema_version": 1,
        "kind": "edgeopt-device-report",
        "status": "passed",
        "model": {
            "file": of.name,
            "sha256": hashlib.sha256(of.read_bytes()).hexdigest(),
            "format": "onnx",
            "name": "m",
        },
        "device": {"name": "Pixel 4"},
        "settings": {"threads": 4, "runs": 50},
        "latency_ms": {"p50": 1.25, "mean": 1.5},
        "throttled": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "device_report.json"
    path.write_text(json.dumps(document | changed))
    return path


def pinned(folder: Path, of: Path, threads: int, cpus: tuple[int, ...]) -> Path:
    """On a Pixel 4, which has little cores at 1.8 GHz, big ones at 2.4 and a prime one at 2.8."""
    clocks = [((0, 1, 2, 3), 1_785_600), ((4, 5, 6), 2_419_200), ((7,), 2_841_600)]
    state = {"clocks": [{"cpus": cpus, "most_khz": khz} for cpus, khz in clocks]}
    return report(folder, of, settings={"threads": threads, "cpus": cpus}, before=state)


@pytest.mark.parametrize(("threads", "cpus"), [(1, (7,)), (1, (4, 5, 6)), (4, (4, 5, 6, 7)), (8, tuple(range(8)))])
def test_reports_of_fast_cores_are_good(tmp_path: Path, threads: int, cpus: tuple[int, ...]) -> None:
    file = model(tmp_path / "model.onnx")
    assert read_device_report(pinned(tmp_path, file, threads, cpus)).threads == threads


@pytest.mark.parametrize("cpus", [(), (6, 7)])
def test_reads_what_the_check_writes(tmp_path: Path, cpus: tuple[int, ...]) -> None:
    """Both sides of device_report.json, as `device/check` makes it."""
    from edgeopt.bundle.templates.device.devicecheck import conditions
    from edgeopt.bundle.templates.device.devicecheck import report as written
    from edgeopt.bundle.templates.device.devicecheck.check import Difference, Result, Settings
    from edgeopt.bundle.templates.device.devicecheck.contents import Contents
    from edgeopt.bundle.templates.device.devicecheck.device import Facts
    from edgeopt.bundle.templates.device.devicecheck.programs import Figures

    file = model(tmp_path / "model.onnx")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    contents = Contents("net", "t", "pixel-4", "onnx", "fp32", file, digest, "1" * 64, (), 0.1, None, None)
    facts = Facts("android", "13", "", "arm64-v8a", "aarch64", "Google", "Pixel 4", "", False, 1, 1, 0, frozenset())
    policy = conditions.Policy((6, 7), "schedutil", 900_000, 2_400_000, 2_400_000)
    state = conditions.State((policy,), ((6, 1024), (7, 1024)), (), (), None, None)

    def measured(difference: float, throttling: tuple[str, ...] = ()) -> Path:
        timing = Figures(1.0, 2.0, (3.0, 4.0, 5.0), {}, None, None)
        settings, differences = Settings(threads=2), (Difference(0, "y", difference),)
        result = Result(
            *(contents, "adb", facts, "edgeopt-runner", None, settings, cpus, 5, differences, timing),
            *(state, state, throttling, 1.0),
        )
        written.write(written.document(result), tmp_path / written.NAME)
        return tmp_path / written.NAME

    found = read_device_report(measured(0.01))
    assert (found.path, found.sha256, found.format, found.threads, found.ms) == (file, digest, "onnx", 2, 4.0)
    with pytest.raises(UsageError, match="outputs were wrong"):
        read_device_report(measured(0.5))
    with pytest.raises(UsageError, match="throttled"):
        read_device_report(measured(0.01, ("clock capped",)))
    calibration = calibrate(load_device("pixel-4"), [read_device_report(measured(0.01))])
    assert [(figure.threads, figure.share.measured_ms) for figure in calibration.figures] == [(2, 4.0)]


def test_device_reports(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    file = model(tmp_path / "bundle" / "model.onnx")
    for folder in (tmp_path / "bundle", tmp_path / "bundle" / "device"):
        measured = read_device_report(report(folder, file))
        assert (measured.path, measured.format, measured.threads, measured.ms) == (file, "onnx", 4, 1.25)
    no_median = report(tmp_path / "bundle", file, latency_ms={"p50": None, "mean": 1.5})
    assert read_device_report(no_median).ms == 1.5
    elsewhere = report(tmp_path / "a" / "b" / "c" / "d", file)
    assert read_device_report(elsewhere, file).path == file


def test_device_reports_that_say_nothing(tmp_path: Path) -> None:
    file, other = model(tmp_path / "model.onnx"), model(tmp_path / "other.onnx", side=8)
    far = tmp_path / "a" / "b" / "c" / "d"
    cases = [
        (lambda: read_device_report(tmp_path / "none.json"), "no such file"),
        (lambda: read_device_report(report(far, file)), "does not lie beside it; name the file with --artifact"),
        (lambda: read_device_report(report(far, file), other), "SHA-256 differs"),
        (lambda: read_device_report(report(tmp_path, file, throttled=True)), "the device was throttled; let it cool"),
        (lambda: read_device_report(report(tmp_path, file, latency_ms={})), "holds no latency"),
        (lambda: read_device_report(report(tmp_path, file, kind="x")), "device_report.json: is no report of a device"),
        (lambda: read_device_report(report(tmp_path, file, settings={"threads": 0})), "holds no number of threads"),
        (lambda: read_device_report(report(tmp_path, file, golden={"passed": False})), "outputs were wrong there"),
        (lambda: read_device_report(pinned(tmp_path, file, 2, (0, 1))), "measured on slower or fewer cores"),
        (lambda: read_device_report(pinned(tmp_path, file, 4, (7,))), "measured on slower or fewer cores"),
    ]
    for call, line in cases:
        with pytest.raises(UsageError) as caught:
            call()
        assert line in caught.value.line()


def test_files_that_tell_nothing_of_a_device(tmp_path: Path) -> None:
    """Factors that they can't move would pass for a calibration, and one of 287 was written for a compiled NPU file."""
    device = load_device("imx93")
    with pytest.raises(UsageError, match="too small to tell how fast the device is"):
        calibrate(device, [measurement(model(tmp_path / "small.onnx", side=8), 1.0, 1)])
    graph = onnx.load(str(model(tmp_path / "npu.onnx")))
    graph.graph.node[0].op_type = "EPContext"
    onnx.save(graph, str(tmp_path / "npu.onnx"))
    with pytest.raises(UsageError, match=r"npu\.onnx: holds too much .*\(EPContext\)"):
        calibrate(device, [measurement(tmp_path / "npu.onnx", 1.0, 1)])
    assert find_calibration(device) is None
