"""`device/check` and `edgeopt device run` through the real adb, adbd, ssh and sshd, with everything that can go wrong.

The phone and the board are processes in a private network namespace (fixtures/device_lab.sh).
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeopt.bundle import BundleContents, GoldenVector, open_bundle, write_bundle
from edgeopt.device_profiles import load_device
from edgeopt.emulator import Emulator
from edgeopt.targets import load_target
from edgeopt.types import Artifact, Model, Report, Signature, SignatureTensor, TensorSpec

pytestmark = pytest.mark.e2e

_spec = spec_from_file_location("device_lab", Path(__file__).parent / "fixtures/device_lab.py")
assert _spec is not None
assert _spec.loader is not None
device_lab = module_from_spec(_spec)
_spec.loader.exec_module(device_lab)
Lab, UnavailableError, unpack_tools, PHONE = (
    device_lab.Lab, device_lab.UnavailableError, device_lab.unpack_tools, device_lab.PHONE,
)  # fmt: skip

#: Whatever a file calls its inputs, no shell may read it.
INPUT = "in/x='1' $(id) \"y\":0"
#: Does what edgeopt-runner does for y = x + x, with hooks for everything that a device can do wrong.
RUNNER = """#!/usr/bin/python3
import array, json, os, sys, time
words = sys.argv[1:]
value = lambda flag: words[words.index(flag) + 1]
named, dtype, sizes = value("--input").rsplit(":", 2)
numbers = array.array("f", open(named.rpartition("=")[2], "rb").read())
{hook}
runs = int(value("--runs"))
times = [1.0 + k % 3 / 100 for k in range(runs)]
doubled = array.array("f", [x + x for x in numbers])
open(os.path.join(value("--output-dir"), "output_0.bin"), "wb").write(doubled.tobytes())
json.dump({{"load_ms": 3.0, "first_ms": 2.0, "latencies_ms": times, "peak_kb": 2048,
           "outputs": [{{"name": "y", "dtype": "float32", "shape": [1, 4], "file": "output_0.bin"}}]}},
          open(value("--json"), "w"))
"""
STARTED = "open('/data/started', 'w')"
UNTIL_GO = "[time.sleep(0.05) for _ in iter(lambda: os.path.exists('/data/go'), True)]"


@pytest.fixture(scope="module")
def lab(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    del emulator  # the lab finds it
    tools = tmp_path_factory.mktemp("tools")
    try:
        unpack_tools(tools)
        lab = Lab(tools, tmp_path_factory.mktemp("lab"))
    except UnavailableError as reason:
        pytest.skip(str(reason))
    try:
        yield lab
    finally:
        lab.close()
        shutil.rmtree(tools)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path)


def make_bundle(folder: Path, golden: float = 2.0) -> Path:
    """A bundle around a real ONNX file, y = x + x, whose one golden vector says y = golden * x."""
    x = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([helper.make_node("Add", [INPUT, INPUT], ["y"])], "g", [x], [y])
    path = folder / "made.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    data = path.read_bytes()
    signature = Signature(
        inputs=(SignatureTensor("x", INPUT, (1, 4), "float32", "float32"),),
        outputs=(SignatureTensor("scores", "y", (1, 4), "float32", "float32"),),
    )
    sha256 = hashlib.sha256(data).hexdigest()
    artifact = Artifact(path, "onnx", "fp32", signature, len(data), sha256, (), {}, ())
    spec = TensorSpec("x", (1, 4), "float32")
    model = Model("net", None, None, (spec,), (TensorSpec("scores", (1, 4), "float32"),), {}, None, (), (), "0" * 64)
    value = np.array([[1.0, -2.0, 3.5, 0.0]], np.float32)
    scores = {"scores": value * np.float32(golden)}
    contents = BundleContents(
        target=load_target("linux-arm64-onnx-fp32"),
        device=load_device("raspberry-pi-5"),
        model=model,
        artifact=artifact,
        float_artifact=None,
        report=Report("passed", "net", "linux-arm64-onnx-fp32", "onnxruntime", (), (), (), (), (), {}),
        golden=(GoldenVector({"x": value}, scores, scores, label=None),),
    )
    return write_bundle(folder / "bundle", contents).path


def runner(folder: Path, hook: str = "") -> list[str]:
    """`--runner` with a stand-in that executes `hook` before it answers."""
    path = folder / "stand-in"
    path.mkdir(exist_ok=True)
    (path / "edgeopt-runner").write_text(RUNNER.format(hook=hook))
    return ["--runner", str(path / "edgeopt-runner"), "--runs", "40"]


def check(bundle: Path) -> list[str]:
    """The bundle's own script."""
    return ["sh", str(bundle / "device/check")]


def edgeopt(bundle: Path) -> list[str]:
    return [sys.executable, "-m", "edgeopt", "device", "run", str(bundle)]


def report_of(bundle: Path) -> dict[str, object]:
    document: dict[str, object] = json.loads((bundle / "device_report.json").read_text())
    return document


def test_the_phone_is_measured_and_left_clean(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    code, output, errors = lab.run(*check(bundle), *runner(tmp_path))
    assert (code, output.splitlines()[-1]) == (0, "passed"), errors
    report = report_of(bundle)
    assert report["device"]["name"] == "Google Pixel 6"  # type: ignore[index]
    assert report["settings"]["cpus"] == [1]  # type: ignore[index]  # the big core of the two
    assert report["settings"]["affinity"] == "2"  # type: ignore[index]
    assert report["latency_ms"]["runs"] == 40  # type: ignore[index]
    assert report["latency_ms"]["p50"] == pytest.approx(1.01)  # type: ignore[index]
    assert report["before"]["clocks"][1]["governor"] == "schedutil"  # type: ignore[index]
    assert report["before"]["temperatures_c"] == [{"zone": "BIG", "value": 41.25}]  # type: ignore[index]
    assert report["before"]["battery"] == {  # type: ignore[index]
        "level_percent": 87, "temperature_c": 29.1, "charging": False,
    }  # fmt: skip
    assert report["golden"]["worst"] == 0.0  # type: ignore[index]
    assert (report["peak_memory_bytes"], report["throttled"]) == (2048 * 1024, False)
    assert lab.left() == []


def test_arm_kernels_behind_adb(lab: Lab, emulator: Emulator, bundle: Path, tmp_path: Path) -> None:
    command = device_lab.arm_command(str(emulator.runner("onnx")))
    folder = tmp_path / "arm"
    folder.mkdir()
    (folder / "edgeopt-runner").write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    code, output, errors = lab.run(*check(bundle), "--runner", str(folder / "edgeopt-runner"), "--runs", "20")
    assert code == 0, errors + output
    assert report_of(bundle)["golden"]["worst"] == 0.0  # type: ignore[index]
    assert lab.left() == []


def test_boards_get_the_emulated_phones_runner(lab: Lab, bundle: Path) -> None:
    """... with its libraries, and it is the board's system that starts the Arm program."""
    if not lab.runs_arm:
        pytest.skip("this kernel does not let a user namespace run programs of other machines")
    code, output, errors = lab.run(*edgeopt(bundle), *lab.ssh(), "--runs", "20")
    assert code == 0, errors + output
    report = report_of(bundle)
    assert (report["device"]["abi"], report["runtime"]["program"]) == ("aarch64", "edgeopt-runner")  # type: ignore[index]
    assert report["golden"]["worst"] == 0.0  # type: ignore[index]
    assert lab.left() == []


def test_edgeopt_merges_what_the_phone_told(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second run replaces what the first one told
        code, output, errors = lab.run(*edgeopt(bundle), "--adb", PHONE, *runner(tmp_path))
        assert code == 0, errors + output
    loaded = open_bundle(bundle)
    report = loaded.report()
    assert [check.name for check in report.checks] == ["golden@device:google-pixel-6"]
    latency = next(m for m in report.measurements if m.name == "latency_ms")
    assert (latency.provenance, latency.runtime, latency.repetitions) == (
        "measured-device", "device:google-pixel-6", 40,
    )  # fmt: skip
    assert latency.spread is not None
    assert report_of(bundle)["status"] == "passed"
    assert lab.left() == []


def test_the_board_is_measured_and_left_clean(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    code, output, errors = lab.run(*edgeopt(bundle), *lab.ssh(), *runner(tmp_path), "--json")
    assert code == 0, errors
    assert json.loads(output)["device"]["transport"] == "ssh"
    assert lab.left() == []


def test_wrong_outputs_fail(lab: Lab, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, golden=2.5)
    code, output, _ = lab.run(*check(bundle), *runner(tmp_path))
    assert code == 1
    assert "FAILED: the outputs are not those of the golden vectors" in output
    assert report_of(bundle)["status"] == "failed"
    (tmp_path / "again").mkdir()
    code, _, errors = lab.run(*edgeopt(make_bundle(tmp_path / "again", 2.5)), *runner(tmp_path))
    assert (code, errors.count("\n")) == (1, 1), errors
    assert lab.left() == []


def test_a_tampered_bundle_is_refused_before_the_device_is_touched(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    words = check(bundle)
    golden = next((bundle / "golden/0").glob("output_*.bin"))
    golden.write_bytes(golden.read_bytes()[::-1])
    code, _, errors = lab.run(*words, *runner(tmp_path))
    assert (code, "SHA-256 differs" in errors) == (2, True)


def test_wrong_architecture(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    shutil.copyfile("/bin/true", tmp_path / "edgeopt-runner")
    code, _, errors = lab.run(*check(bundle), "--runner", str(tmp_path / "edgeopt-runner"))
    assert (code, errors.splitlines()[-1]) == (
        4, f"error: {tmp_path}/edgeopt-runner is built for x86_64, the device is arm64-v8a",
    )  # fmt: skip
    # What tells nothing of itself is found out when it is started.
    (tmp_path / "edgeopt-runner").write_bytes(b"\x7fMZ\0\0\0\0")
    code, _, errors = lab.run(*check(bundle), *lab.ssh(), "--runner", str(tmp_path / "edgeopt-runner"))
    assert (code, "exec format error" in errors.lower()) == (4, True), errors
    assert lab.left() == []


def test_a_hung_program_is_killed_on_the_device(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    hang = "while True: open('/data/beat', 'a').write('.'); time.sleep(0.05)"
    code, _, errors = lab.run(*check(bundle), *runner(tmp_path, hang), "--timeout", "1")
    assert (code, "did not end within 1 s" in errors) == (4, True), errors
    beats = lab.shell("wc -c </data/beat")
    time.sleep(0.3)
    assert lab.shell("wc -c </data/beat") == beats
    assert lab.left() == []


def test_unplugged_midway(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    lab.shell("rm -f /data/started /data/go")
    process = lab.start(*check(bundle), *runner(tmp_path, f"{STARTED}; {UNTIL_GO}"))
    wait_for(lambda: lab.shell("ls /data/started") == "/data/started")
    lab.order("unplug")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, f"lost the device {PHONE}" in errors) == (3, True), errors
    assert not (bundle / "device_report.json").exists()
    lab.plug()
    assert len(lab.left()) == 1
    code, _, errors = lab.run(*check(bundle), *runner(tmp_path))
    assert (code, "removed what 1 broken-off" in errors) == (0, True), errors
    assert lab.left() == []


def test_the_board_hangs_up_midway(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    started = lab.board / "started"
    process = lab.start(*check(bundle), *lab.ssh(), *runner(tmp_path, f"open({str(started)!r}, 'w'); time.sleep(3)"))
    wait_for(started.exists)
    lab.order("hang-up")
    _, errors = process.communicate(timeout=60)
    lab.order("serve")
    started.unlink()
    assert (process.returncode, "lost the connection to board" in errors) == (3, True), errors
    wait_for(lambda: lab.run(*check(bundle), *lab.ssh(), *runner(tmp_path))[0] == 0)
    assert lab.left() == []


def test_no_space(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    lab.order("full")
    try:
        code, _, errors = lab.run(*check(bundle), *runner(tmp_path))
    finally:
        lab.order("empty")
    assert (code, "no space left" in errors) == (3, True), errors
    # ... and where it fills up while the model runs.
    fill = "os.system('dd if=/dev/zero of=../filler bs=1M 2>/dev/null')"
    try:
        code, _, errors = lab.run(*check(bundle), *runner(tmp_path, fill))
    finally:
        lab.order("empty")
    assert (code, "no space left" in errors) == (3, True), errors
    assert lab.left() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(lab: Lab, bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    lab.shell("rm -f /data/started /data/go")
    command = check(bundle) if number == signal.SIGTERM else edgeopt(bundle)
    process = lab.start(*command, *runner(tmp_path, f"{STARTED}; {UNTIL_GO}"))
    wait_for(lambda: lab.shell("ls /data/started") == "/data/started")
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, "interrupted" in errors.splitlines()[-1]) == (130, True), errors
    assert not (bundle / "device_report.json").exists()
    assert lab.left() == []


def test_throttling_is_told(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    hot = "open('/data/thermal', 'w').write('3')"
    try:
        code, output, errors = lab.run(*check(bundle), *runner(tmp_path, hot))
    finally:
        lab.order("cool")
    assert (code, "throttled: Android's thermal status is 3" in output) == (0, True), errors
    assert report_of(bundle)["throttled"] is True


def test_the_benchmark_program_alone_is_not_enough(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    program = tmp_path / "onnxruntime_perf_test"
    program.write_text(
        "#!/bin/sh\necho 'Session creation time cost: 0.01 s'\necho 'Average inference time cost: 4.5 ms'\n"
        "echo 'Peak working set size: 1048576 bytes'\necho 'P50 Latency: 0.0044 s'\n"
    )
    code, output, _ = lab.run(*check(bundle), "--benchmark", str(program))
    assert (code, output.splitlines()[-1]) == (3, "incomplete")
    report = report_of(bundle)
    assert report["latency_ms"]["p50"] == pytest.approx(4.4)  # type: ignore[index]
    assert (report["load_ms"], report["golden"]["passed"]) == (10.0, None)  # type: ignore[index]
    assert lab.left() == []


def test_nothing_that_runs_the_model(lab: Lab, bundle: Path) -> None:
    code, _, errors = lab.run(*check(bundle))
    assert (code, "build the runner" in errors) == (3, True), errors
    assert lab.left() == []


def test_a_second_run_waits_for_nobody(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    lab.shell("rm -f /data/started /data/go")
    first = lab.start(*edgeopt(bundle), *runner(tmp_path, f"{STARTED}; {UNTIL_GO}"))
    wait_for(lambda: lab.shell("ls /data/started") == "/data/started")
    code, _, errors = lab.run(*edgeopt(bundle), *runner(tmp_path))
    lab.shell(">/data/go")
    assert (code, "another 'edgeopt device run'" in errors) == (2, True), errors
    first.communicate(timeout=60)
    assert first.returncode == 0


def test_ssh_that_does_not_let_us_in(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    config = (lab.folder / "board/ssh_config").read_text()
    for change, reason in (
        (("known_hosts", "unknown_hosts"), "the host key of board is not known here"),
        (("user_key", "host_key"), "board refuses the login"),
        (("Port 6522", "Port 6523"), "board refuses the connection"),
    ):
        changed = tmp_path / "config"
        changed.write_text(config.replace(*change))
        code, _, errors = lab.run(*check(bundle), "--ssh", "board", "--ssh-config", str(changed))
        assert (code, reason in errors, errors.count("\n")) == (3, True, 1), errors


def wait_for(condition: object) -> None:
    assert callable(condition)
    for _ in range(150):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")
