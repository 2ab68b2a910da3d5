"""`device/check` and `edgeopt device run` through the real adb, adbd, ssh and sshd, with everything that can go wrong.

The phone and the board are processes in a private network namespace (fixtures/device_lab.sh).
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeopt import emulator
from edgeopt.bundle import BundleContents, GoldenVector, open_bundle, write_bundle
from edgeopt.device_profiles import load_device
from edgeopt.targets import load_target
from edgeopt.types import Artifact, Model, Report, Signature, SignatureTensor, TensorSpec

pytestmark = pytest.mark.e2e

FIXTURES = Path(__file__).parent / "fixtures"
PHONE = "127.0.0.1:6555"
INPUT = "in/x:0"
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


class Lab:
    """The phone and the board, and how a command reaches their network."""

    def __init__(self, tools: Path, folder: Path, arm: Path) -> None:
        self.folder = folder
        self.board = folder / "board/tmp"
        command = ["unshare", "-rnm", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command += ["sh", str(FIXTURES / "device_lab.sh"), str(tools), str(folder), str(arm)]
        with (folder / "errors").open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self.close()
            pytest.skip(f"no private namespace here: {(folder / 'errors').read_text().strip()[-200:]}")
        platform_tools = tools / "usr/lib/android-sdk/platform-tools"
        libraries = [tools / name for name in ("usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/android")]
        (folder / "bin").mkdir()
        adb = folder / "bin/adb"
        adb.write_text(
            f'#!/bin/sh\nLD_LIBRARY_PATH={libraries[0]}:{libraries[1]} exec {platform_tools}/adb -P 5037 "$@"\n'
        )
        adb.chmod(0o755)
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = {**os.environ, "HOME": str(folder), "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def order(self, *words: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        for word in words:
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
            assert self._process.stdout.readline() == "done\n"

    def start(self, *words: str) -> subprocess.Popen[str]:
        (child,) = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        enter = ["nsenter", "--preserve-credentials", "-U", "-n", "-t", child]
        return subprocess.Popen(
            [*enter, *words], env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        try:
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, output, errors

    def plug(self) -> None:
        self.order("plug")
        for _ in range(100):
            self.run("adb", "disconnect", PHONE)
            if self.run("adb", "connect", PHONE)[1].startswith(("connected", "already")) and self.shell("echo up"):
                return
            time.sleep(0.1)
        raise AssertionError("the phone does not come back")

    def shell(self, command: str) -> str:
        return self.run("adb", "-s", PHONE, "shell", command)[1].strip()

    def left(self) -> list[str]:
        """Directories of the check on the phone and on the board."""
        return [*self.shell("ls /data/local/tmp").split(), *(path.name for path in self.board.iterdir())]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked packages."""
    from edgeopt.emulator import deb, download, home, lock
    from edgeopt.errors import EdgeoptError

    if (reason := home.unsupported()) is not None:
        pytest.skip(reason)
    for program in ("unshare", "nsenter", "ssh", "ssh-keygen"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("tools")
    home.downloads().mkdir(parents=True, exist_ok=True)
    mirrors = download.mirrors(lock.read().debian_mirrors)
    for package in tomllib.loads((FIXTURES / "device_lab.toml").read_text())["package"]:
        name = package["path"].rpartition("/")[2]
        urls = tuple(f"{mirror}/{package['path']}" for mirror in mirrors)
        wanted = download.Download(name, urls, package["sha256"], package["size"])
        try:
            deb.unpack(download.fetch(wanted, home.downloads(), lambda _: None), folder, name, lambda _: True)
        except EdgeoptError as error:
            pytest.skip(str(error))
    return folder


@pytest.fixture(scope="module")
def lab(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    # A short path: the names of sockets are limited.
    folder = tmp_path_factory.mktemp("lab")
    arm = tmp_path_factory.mktemp("arm") if emulator.unavailable() is not None else emulator.installed().directory
    lab = Lab(tools, folder, arm)
    try:
        for _ in range(50):
            if lab.run("adb", "connect", PHONE)[1].startswith("connected"):
                break
            time.sleep(0.1)
        yield lab
    finally:
        lab.close()


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


def ssh(lab: Lab) -> list[str]:
    return ["--ssh", "board", "--ssh-config", str(lab.folder / "board/ssh_config")]


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


@pytest.mark.skipif(emulator.unavailable() is not None, reason="the emulated phone is not set up")
def test_arm_kernels_behind_adb(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    installed = emulator.installed()
    command = installed.command(emulator.core_for("cortex-a76"), [str(installed.runner("onnx"))])
    folder = tmp_path / "arm"
    folder.mkdir()
    (folder / "edgeopt-runner").write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    code, output, errors = lab.run(*check(bundle), "--runner", str(folder / "edgeopt-runner"), "--runs", "20")
    assert code == 0, errors + output
    assert report_of(bundle)["golden"]["worst"] == 0.0  # type: ignore[index]
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
    code, output, errors = lab.run(*edgeopt(bundle), *ssh(lab), *runner(tmp_path), "--json")
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
    code, _, errors = lab.run(*check(bundle), *ssh(lab), "--runner", str(tmp_path / "edgeopt-runner"))
    assert (code, "exec format error" in errors.lower()) == (4, True), errors
    assert lab.left() == []


def test_a_hung_program_is_killed_on_the_device(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    hang = "while True: open('/data/beat', 'a').write('.'); time.sleep(0.05)"
    code, _, errors = lab.run(*check(bundle), *runner(tmp_path, hang), "--timeout", "2")
    assert (code, "did not end within 2 s" in errors) == (4, True), errors
    beats = lab.shell("wc -c </data/beat")
    time.sleep(0.3)
    assert lab.shell("wc -c </data/beat") == beats
    assert lab.left() == []


def test_unplugged_midway(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    lab.shell("rm -f /data/started")
    process = lab.start(*check(bundle), *runner(tmp_path, "open('/data/started', 'w'); time.sleep(3)"))
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
    process = lab.start(*check(bundle), *ssh(lab), *runner(tmp_path, f"open({str(started)!r}, 'w'); time.sleep(3)"))
    wait_for(started.exists)
    lab.order("hang-up")
    _, errors = process.communicate(timeout=60)
    lab.order("serve")
    started.unlink()
    assert (process.returncode, "lost the connection to board" in errors) == (3, True), errors
    wait_for(lambda: lab.run(*check(bundle), *ssh(lab), *runner(tmp_path))[0] == 0)
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


def test_interrupted(lab: Lab, bundle: Path, tmp_path: Path) -> None:
    lab.shell("rm -f /data/started")
    process = lab.start(*check(bundle), *runner(tmp_path, "open('/data/started', 'w'); time.sleep(20)"))
    wait_for(lambda: lab.shell("ls /data/started") == "/data/started")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.splitlines()[-1]) == (130, "error: interrupted; the device was cleaned up")
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
    lab.shell("rm -f /data/started")
    hook = "open('/data/started', 'w'); time.sleep(4)"
    first = lab.start(*edgeopt(bundle), *runner(tmp_path, hook), "--runs", "1")
    wait_for(lambda: lab.shell("ls /data/started") == "/data/started")
    code, _, errors = lab.run(*edgeopt(bundle), *runner(tmp_path))
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
