"""How `device/check` reaches a device, and what it does there: adb, ssh, the shell part, the directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from edgeopt.bundle.templates.device import devicecheck
from edgeopt.bundle.templates.device.devicecheck.device import Device, Facts, Workspace
from edgeopt.bundle.templates.device.devicecheck.errors import CheckError
from edgeopt.bundle.templates.device.devicecheck.transport import Adb, Reply, connect, hostname

if TYPE_CHECKING:
    from edgeopt.bundle.templates.device.devicecheck.transport import Transport

SCRIPT = Path(devicecheck.__file__).parent / "on_device.sh"
PHONE = Facts("android", "", "", "arm64-v8a", "aarch64", "Google", "Pixel 6", "", False, None, None, 1000, frozenset())


@pytest.mark.parametrize(
    ("listing", "serial", "code", "phrase"),
    [
        ("", None, 3, "no device is attached"),
        ("A\tdevice\nB\tdevice\n", None, 2, "choose one with --adb A or B"),
        ("A\tunauthorized\n", None, 3, "has not authorized this computer"),
        ("A\toffline\n", "A", 3, "is offline"),
        ("A\tno permissions (user in plugdev group); see [http://x]\n", "A", 3, "udev"),
        ("A\trecovery\n", "A", 3, "in the state 'recovery'"),
        ("A\tdevice\n", "10.0.0.2:5555", 3, "adb connect 10.0.0.2:5555"),
    ],
)
def test_what_adb_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str, serial: str | None, code: int, phrase: str
) -> None:
    (tmp_path / "listing").write_text(f"List of devices attached\n{listing}\n")
    (tmp_path / "adb").write_text(f"#!/bin/sh\ncat {tmp_path}/listing\n")
    (tmp_path / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(CheckError, match=phrase.replace("(", r"\(")) as caught:
        Adb(serial, None)
    assert caught.value.code == code


def test_no_adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CheckError, match="adb is not installed") as caught:
        connect(None, None, None, None)
    assert caught.value.code == 3


@pytest.mark.parametrize(
    ("lease", "stale"),
    [
        ("1300 {host} {us}", False),
        ("900 {host} {us}", True),  # ran out
        ("1300 {host} 99999999", True),  # its process is gone
        ("1300 elsewhere 99999999", False),
        ("900 elsewhere 1", True),
        ("9999999 elsewhere 1", True),  # from a clock that was wrong
        ("", True),
        ("garbage", True),
    ],
)
def test_what_crashed_checks_left(lease: str, stale: bool) -> None:
    device = cast("Device", SimpleNamespace(transport=SimpleNamespace(base="/tmp")))
    workspace = Workspace(device, PHONE)
    assert workspace._is_stale(lease.format(host=hostname(), us=os.getpid())) is stale


@pytest.mark.parametrize(
    ("adb", "ssh", "directory"), [("A", "host", None), (None, "-oProxyCommand=x", None), (None, "host", "tmp; rm")]
)
def test_wrong_use_of_connections(adb: str | None, ssh: str | None, directory: str | None) -> None:
    with pytest.raises(CheckError) as caught:
        connect(adb, ssh, directory, None)
    assert caught.value.code == 2


SHELLS = [shell for name in ("dash", "bash", "mksh", "busybox") if (shell := shutil.which(name)) is not None]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_part(shell: str, tmp_path: Path) -> None:
    """What it makes, runs and removes; `remove` takes nothing but its own directories."""
    words = [shell, "sh"] if shell.endswith("busybox") else [shell]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*words, "-s", "--", *arguments], input=SCRIPT.read_text(), text=True, capture_output=True, timeout=20
        )

    directory = tmp_path / "edgeopt-0123abcd"
    assert call("create", str(directory), "99 host 1").returncode == 0
    assert call("create", str(directory), "99 host 1").returncode != 0
    assert call("leases", str(tmp_path)).stdout == f"{directory}|99 host 1\n"
    done = call("execute", str(directory), "5", "", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    late = call("execute", str(directory), "1", "", "sh", "-c", "sleep 30 & wait")
    assert late.returncode == 124
    assert "os=linux\n" in call("facts", str(tmp_path)).stdout
    assert call("digest", str(directory / "lease")).stdout.split()[1] == "10"
    for other in (tmp_path, tmp_path / "edgeopt-0123abcd/..", tmp_path / "edgeopt-1"):
        other.mkdir(exist_ok=True)
        assert call("remove", str(other)).returncode != 0
    assert call("remove", str(directory)).returncode == 0
    assert not directory.exists()


@pytest.mark.parametrize("knows_how_to_wait", [True, False])
def test_a_setsid_that_forks(tmp_path: Path, knows_how_to_wait: bool) -> None:
    """toybox's does in some versions of Android: it is waited for, and what hangs is stopped."""
    real = shutil.which("setsid")
    shim = tmp_path / "setsid"
    forks = f'[ "$1" = -w ] && shift && exec {real} --fork --wait "$@"\nexec {real} --fork "$@"'
    plain = f'[ "$1" = -w ] && exit 1\nexec {real} "$@"'  # busybox's: it doesn't fork where it need not
    shim.write_text(f"#!/bin/sh\n{forks if knows_how_to_wait else plain}\n")
    shim.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-s", "--", *arguments], input=SCRIPT.read_text(), env=environment, text=True, capture_output=True,
            timeout=20,
        )  # fmt: skip

    directory = tmp_path / "edgeopt-0123abcd"
    call("create", str(directory), "99 host 1")
    done = call("execute", str(directory), "5", "", "sh", "-c", "sleep 0.2; echo out; exit 7")
    assert (done.returncode, done.stdout) == (7, "out\n")
    beats = tmp_path / "beats"
    hang = f"while :; do echo >>{beats}; sleep 0.02; done"
    assert call("execute", str(directory), "1", "", "sh", "-c", f"({hang}) & wait").returncode == 124
    size = beats.stat().st_size
    time.sleep(0.2)
    assert beats.stat().st_size == size


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_what_others_put_in_tmp_is_not_touched(tmp_path: Path) -> None:
    for name, owner in (("edgeopt-0123abcd", 0), ("edgeopt-feedbeef", 65534)):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, owner, -1)
    done = subprocess.run(
        ["sh", "-s", "--", "leases", str(tmp_path)], input=SCRIPT.read_bytes(), capture_output=True, timeout=20
    )
    assert done.stdout.decode() == f"{tmp_path}/edgeopt-0123abcd|\n"


@pytest.mark.parametrize("written", ["-1", "{pid} x", "x", ""])
def test_only_a_process_id_is_ended(tmp_path: Path, written: str) -> None:
    directory = tmp_path / "edgeopt-0123abcd"
    directory.mkdir()
    with subprocess.Popen(["sleep", "30"]) as other:
        (directory / "pid").write_text(written.format(pid=other.pid) + "\n")
        # In a user namespace of its own, "kill -9 -1" would reach no further.
        done = subprocess.run(
            ["sh", "-s", "--", "remove", str(directory)],
            input=SCRIPT.read_bytes().replace(b"kill -9", b"echo killed"), capture_output=True, timeout=20,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, b"")
        other.kill()


def test_an_interrupted_start_leaves_nothing() -> None:
    class Interrupted(Device):
        def __init__(self) -> None:
            self.transport = cast("Transport", SimpleNamespace(base="/tmp", name="phone"))
            self.calls: list[str] = []

        def call(self, *words: str, seconds: float = 0) -> Reply:
            del seconds
            self.calls.append(words[0])
            if words[0] == "create":
                raise KeyboardInterrupt
            return Reply(0, b"", "")

    device = Interrupted()
    with pytest.raises(KeyboardInterrupt), Workspace(device, PHONE):
        raise AssertionError("it never started")
    assert device.calls == ["leases", "create", "remove"]


def test_the_device_is_cleaned_up_from_any_thread() -> None:
    device = SimpleNamespace(
        transport=SimpleNamespace(base="/tmp", name="phone"), call=lambda *_, **__: Reply(0, b"", "")
    )
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with Workspace(cast("Device", device), PHONE):
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for ssh whose board is this computer; the file that it makes when its master ends."""
    (tmp_path / "ssh").write_text(
        f"""#!/bin/sh
case "$*" in
    *ControlMaster=yes*) while [ "$1" != -S ]; do shift; done; : >"$2"; cat; : >{tmp_path}/ended ;;
    *) for last in "$@"; do :; done; exec sh -c "$last" ;;
esac
"""
    )
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "ended"


@pytest.mark.usefixtures("ssh")
@pytest.mark.parametrize(("told", "base"), [("/var/tmp", "/var/tmp"), ("/tmp/a b", "/tmp"), ("tmp", "/tmp")])
def test_only_a_plain_directory_of_the_board_is_taken(told: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", told)
    transport = connect(None, "board", None, None)
    transport.close()
    assert transport.base == base


def test_the_connection_ends_with_a_killed_check(ssh: Path) -> None:
    code = (
        "import time; from edgeopt.bundle.templates.device.devicecheck.transport import connect; "
        "connect(None, 'board', None, None); print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert not ssh.exists()
        process.kill()
    for _ in range(100):
        if ssh.exists():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the master is still there")
    assert list(Path("/tmp").glob(f"edgeopt-ssh-{process.pid}-*"))
    connect(None, "board", None, None).close()
    assert not list(Path("/tmp").glob(f"edgeopt-ssh-{process.pid}-*"))
