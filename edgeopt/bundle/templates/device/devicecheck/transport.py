"""How this computer reaches the device: adb or ssh. Both run a shell command and move files, or say why not."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from .errors import MISSING, USAGE, CheckError, ConnectionLostError

#: Ends what a command prints. Old adb servers lose exit codes, and a connection that breaks looks like success.
_END = b"\nedgeopt-end "
#: What the connection itself may take longer than the command on the device.
_GRACE_SECONDS = 20.0
_NO_SPACE = "no space left on device"
#: Where the sockets of connections are, below /tmp; then comes the process.
_SOCKETS = "edgeopt-ssh-"
#: Directories for which every step, removing included, is safe to write in a shell.
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/-]*")


@dataclass(frozen=True)
class Reply:
    code: int
    output: bytes
    errors: str

    @property
    def text(self) -> str:
        return self.output.decode("utf-8", "replace")


class Transport(ABC):
    """An open connection to one device."""

    #: "adb" or "ssh"; the report names it.
    kind: str
    #: Where directories for a while are made.
    base: str
    #: The device in messages.
    name: str

    def shell(self, command: str, seconds: float, script: bytes = b"") -> Reply:
        """Run a POSIX shell command, with `script` as its standard input.

        Raises ConnectionLostError where the connection broke, CheckError where it never stood or nothing came back.
        """
        wrapped = f"{{ {command} ; }} ; printf '\\nedgeopt-end %s\\n' $?"
        code, output, errors = self._local(self._shell_arguments(wrapped), seconds, script)
        head, end, tail = output.replace(b"\r\n", b"\n").rpartition(_END)
        if not end or not tail.strip().isdigit():
            raise self._explain(errors, code)
        return Reply(int(tail), head, errors)

    @abstractmethod
    def push(self, local: Path, remote: str, seconds: float) -> None:
        """Copy a file to the device. Raises CheckError, where its disk is full with that reason."""

    @abstractmethod
    def pull(self, remote: str, seconds: float) -> bytes:
        """The content of a file on the device."""

    @abstractmethod
    def close(self) -> None:
        """Give up the connection."""

    @abstractmethod
    def _shell_arguments(self, command: str) -> list[str]: ...

    @abstractmethod
    def _explain(self, errors: str, code: int) -> CheckError:
        """Why a command of ours never ended, from what adb or ssh printed."""

    def _local(self, arguments: list[str], seconds: float, stdin: bytes = b"") -> tuple[int, bytes, str]:
        try:
            done = subprocess.run(
                arguments, input=stdin, capture_output=True, timeout=seconds + _GRACE_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise ConnectionLostError(f"{self.name} does not answer any more") from None
        return done.returncode, done.stdout, done.stderr.decode("utf-8", "replace").strip()

    def _copy_failed(self, errors: str, code: int, remote: str) -> CheckError:
        if _NO_SPACE in errors.lower():
            return CheckError(f"no space left on {self.name} in {self.base}; free some, or name another --directory", 3)
        if "permission denied" in errors.lower() or "read-only file system" in errors.lower():
            return CheckError(f"{self.name} lets nobody write to {remote}; name another --directory", MISSING)
        return self._explain(errors, code)


def _last_line(text: str) -> str:
    return text.splitlines()[-1].strip() if text else ""


class Adb(Transport):
    kind = "adb"

    def __init__(self, serial: str | None, base: str | None) -> None:
        program = shutil.which("adb")
        if program is None:
            raise CheckError(
                "adb is not installed; it is in Android's SDK platform-tools, or the package 'adb'", MISSING
            )
        self._adb = program
        self.name = "the device"
        self.base = base or "/data/local/tmp"
        self._serial = self._choose(serial)
        self.name = self._serial

    def push(self, local: Path, remote: str, seconds: float) -> None:
        code, output, errors = self._local([*self._command(), "push", str(local), remote], seconds)
        if code != 0:
            raise self._copy_failed(f"{output.decode('utf-8', 'replace')}\n{errors}".strip(), code, remote)

    def pull(self, remote: str, seconds: float) -> bytes:
        with tempfile.TemporaryDirectory(prefix="edgeopt-") as folder:
            local = Path(folder, "file")
            code, output, errors = self._local([*self._command(), "pull", remote, str(local)], seconds)
            if code != 0 or not local.is_file():
                raise self._explain(f"{output.decode('utf-8', 'replace')}\n{errors}".strip(), code)
            return local.read_bytes()

    def close(self) -> None:
        """Nothing to do: the adb server was there before, or stays for whoever comes next."""

    def _command(self) -> list[str]:
        return [self._adb, "-s", self._serial]

    def _shell_arguments(self, command: str) -> list[str]:
        return [*self._command(), "shell", command]

    def _choose(self, wanted: str | None) -> str:
        code, output, errors = self._local([self._adb, "devices"], 10.0)
        if code != 0:
            raise CheckError(f"adb does not work: {_last_line(errors)}", MISSING)
        lines = [line.split(None, 1) for line in output.decode("utf-8", "replace").splitlines()[1:]]
        states = {fields[0]: fields[1].strip() for fields in lines if len(fields) == 2 and fields[0] != "*"}
        if wanted is None:
            if not states:
                raise CheckError("no device is attached: adb sees none; connect one and allow USB debugging", MISSING)
            if len(states) > 1:
                raise CheckError(f"several devices are attached: choose one with --adb {' or '.join(states)}", USAGE)
            wanted = next(iter(states))
        if wanted not in states:
            seen = f"it sees {', '.join(states)}" if states else "it sees none"
            hint = f"; try: adb connect {wanted}" if ":" in wanted else ""
            raise CheckError(f"adb does not see the device {wanted}: {seen}{hint}", MISSING)
        if states[wanted] != "device":
            raise self._not_ready(wanted, states[wanted])
        return wanted

    @staticmethod
    def _not_ready(serial: str, state: str) -> CheckError:
        if state == "unauthorized":
            return CheckError(f"{serial} has not authorized this computer: unlock it and accept USB debugging", MISSING)
        if state == "offline":
            return CheckError(f"{serial} is offline: reconnect it, or run: adb reconnect", MISSING)
        if state.startswith("no permissions"):
            return CheckError(f"this user may not open {serial}: install the udev rules for Android devices", MISSING)
        return CheckError(f"{serial} is in the state '{state}', not started normally", MISSING)

    def _explain(self, errors: str, code: int) -> CheckError:
        del code
        lowered = errors.lower()
        for state in ("unauthorized", "offline"):
            if f"device {state}" in lowered:
                return self._not_ready(self.name, state) if state == "unauthorized" else self._lost(errors)
        return self._lost(errors)

    def _lost(self, errors: str) -> CheckError:
        reason = f" ({_last_line(errors)})" if errors else ""
        return ConnectionLostError(f"lost the device {self.name}{reason}; is it still connected?")


def _sweep_sockets() -> None:
    """Remove what killed checks of this user left."""
    for folder in Path("/tmp").glob(f"{_SOCKETS}*-*"):
        process = folder.name[len(_SOCKETS) :].partition("-")[0]
        if process.isdigit() and not folder.is_symlink() and not is_alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


class Ssh(Transport):
    """One master connection, opened first, that every command goes through."""

    kind = "ssh"

    def __init__(self, host: str, base: str | None, config: Path | None) -> None:
        program = shutil.which("ssh")
        if program is None:
            raise CheckError("ssh is not installed; it is in the package 'openssh-client'", MISSING)
        if not host or host.startswith("-") or any(c.isspace() for c in host):
            raise CheckError(f"{host!r} is no host for --ssh", USAGE)
        self.name = host
        self._host = host
        # A short path: a socket's may have 107 characters.
        _sweep_sockets()
        self._folder = tempfile.mkdtemp(prefix=f"{_SOCKETS}{os.getpid()}-", dir="/tmp")
        settings = ["BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3"]
        self._command = [program, *(("-F", str(config)) if config is not None else ())]
        self._command += [part for setting in settings for part in ("-o", setting)]
        self._command += ["-S", str(Path(self._folder, "s"))]
        with Path(self._folder, "errors").open("wb") as errors:
            # It ends when this process does, however that ends: the pipe closes, and with it the last session.
            self._master = subprocess.Popen(
                [*self._command, "-o", "ControlMaster=yes", "-T", "--", host, "exec cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for us: the device has to be cleaned up through it
            )
        try:
            self._wait()
            self.base = base or self._temporary()
        except BaseException:
            self.close()
            raise

    def push(self, local: Path, remote: str, seconds: float) -> None:
        command = f"cat >{shlex.quote(remote)}"
        with local.open("rb") as file:
            reply = self.shell(command, seconds, file.read())
        if reply.code != 0:
            raise self._copy_failed(reply.errors, reply.code, remote)

    def pull(self, remote: str, seconds: float) -> bytes:
        command = [*self._through_master(), f"cat {shlex.quote(remote)}"]
        code, output, errors = self._local(command, seconds)
        if code != 0:
            raise self._explain(errors, code)
        return output

    def close(self) -> None:
        if self._master.poll() is None:
            self._master.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._master.wait(5.0)
        if self._master.poll() is None:
            self._master.kill()
            self._master.wait()
        if self._master.stdin is not None:
            self._master.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _temporary(self) -> str:
        told = self.shell('printf %s "${TMPDIR:-/tmp}"', 10.0).text.strip()
        return told if _PLAIN_PATH.fullmatch(told) else "/tmp"

    def _wait(self) -> None:
        deadline = time.monotonic() + 60.0
        socket = Path(self._folder, "s")
        while not socket.exists():
            if self._master.poll() is not None:
                raise self._explain(Path(self._folder, "errors").read_text("utf-8", "replace").strip(), 255)
            if time.monotonic() > deadline:
                raise CheckError(f"{self.name} does not answer", MISSING)
            time.sleep(0.02)

    def _through_master(self) -> list[str]:
        # Without its master a command would log in again, and hide that the connection was lost.
        return [*self._command, "-o", "ControlMaster=no", "-o", "ProxyCommand=false", "-T", "--", self._host]

    def _shell_arguments(self, command: str) -> list[str]:
        return [*self._through_master(), f"sh -c {shlex.quote(command)}"]

    def _explain(self, errors: str, code: int) -> CheckError:
        del code
        host = self.name
        known = {
            "remote host identification has changed": (
                f"the host key of {host} has changed: check that it is the same board, then forget the old one with "
                "ssh-keygen -R"
            ),
            "host key verification failed": f"the host key of {host} is not known here: run once by hand, ssh {host}",
            "permission denied": f"{host} refuses the login: set up a key first, ssh-copy-id {host}",
            "could not resolve hostname": f"there is no host of the name {host}",
            "connection refused": f"{host} refuses the connection: no ssh server listens there",
            "no route to host": f"{host} can't be reached: no route to it",
            "connection timed out": f"{host} does not answer",
        }
        lowered = errors.lower()
        for phrase, message in known.items():
            if phrase in lowered:
                return CheckError(message, MISSING)
        reason = f" ({_last_line(errors)})" if errors else ""
        return ConnectionLostError(f"lost the connection to {host}{reason}")


def connect(adb: str | None, ssh: str | None, directory: str | None, ssh_config: Path | None) -> Transport:
    """Open the connection that the flags ask for; without any, to the only device that adb sees."""
    if adb is not None and ssh is not None:
        raise CheckError("give --adb or --ssh, not both", USAGE)
    if directory is not None and not _PLAIN_PATH.fullmatch(directory):
        raise CheckError(f"--directory {directory!r} is no absolute path of letters, digits and . _ - /", USAGE)
    if ssh is not None:
        return Ssh(ssh, directory, ssh_config)
    return Adb(adb, directory)


def hostname() -> str:
    """This computer, in leases."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", os.uname().nodename) or "host"


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
