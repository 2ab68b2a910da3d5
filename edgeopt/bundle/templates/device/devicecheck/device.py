"""The device behind a connection: what it is, what state it is in, and the one directory on it that is ours."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import MISSING, CheckError
from .transport import hostname, is_alive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .transport import Reply, Transport

#: For whatever only looks around.
QUICK_SECONDS = 20.0
#: Copying a file at the pace of a poor link, bytes per second.
_SLOWEST_LINK = 200_000
#: Less than this is no room for outputs.
_FULL_KB = 64
#: A lease longer than this comes from a clock that was wrong.
_LONGEST_LEASE = 86_400
_SCRIPT = Path(__file__).with_name("on_device.sh")


@dataclass(frozen=True)
class Facts:
    """What the device says of itself; empty texts and None where it does not."""

    os: str
    os_version: str
    kernel: str
    abi: str
    machine: str
    manufacturer: str
    model: str
    soc: str
    emulated: bool
    memory_kb: int | None
    free_kb: int | None
    now: int
    tools: frozenset[str]

    @property
    def name(self) -> str:
        """ "Google Pixel 6"; the machine's architecture where it has no name."""
        model = self.model.strip()
        maker = self.manufacturer.strip()
        if model and maker and not model.lower().startswith(maker.lower()):
            return f"{maker} {model}"
        return model or f"{self.os} {self.machine}"


class Device:
    """Runs the functions of on_device.sh over a connection."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._script = _SCRIPT.read_bytes()

    def call(self, *words: str, seconds: float = QUICK_SECONDS) -> Reply:
        command = " ".join(("sh", "-s", "--", *map(shlex.quote, words)))
        return self.transport.shell(command, seconds, self._script)

    def facts(self) -> Facts:
        reply = self.call("facts", self.transport.base)
        pairs = [line.partition("=")[::2] for line in reply.text.splitlines()]
        values = {key: " ".join(value.split()) for key, value in pairs}
        if "os" not in values or not values.get("now", "").isdigit():
            raise CheckError(
                f"{self.transport.name} has no shell that the check can use: {_last(reply.errors)}", MISSING
            )
        return Facts(
            os=values["os"],
            os_version=values.get("os_version", ""),
            kernel=values.get("kernel", ""),
            abi=values.get("abi") or values.get("machine", ""),
            machine=values.get("machine", ""),
            manufacturer=values.get("manufacturer", ""),
            model=values.get("model", ""),
            soc=values.get("soc", ""),
            emulated="emulated" in values,
            memory_kb=_number(values.get("memory_kb", "")),
            free_kb=_number(values.get("free_kb", "")),
            now=int(values["now"]),
            tools=frozenset(value for key, value in pairs if key == "tool"),
        )


class Workspace:
    """A fresh directory on the device, as a context manager: it is removed however the block ends.

    A lease in it says until when, by the device's clock, and by which process of which computer it is in use; that is
    how the next check knows what a crashed one left behind.
    """

    def __init__(self, device: Device, facts: Facts) -> None:
        self.device = device
        self._transport = device.transport
        self._clock = facts.now
        self.path = f"{self._transport.base}/edgeopt-{secrets.token_hex(4)}"
        self.swept = 0

    def __enter__(self) -> Workspace:
        self.swept = self._sweep()
        try:
            reply = self.device.call("create", self.path, self._lease(QUICK_SECONDS))
        except KeyboardInterrupt:
            with _uninterrupted():
                self._remove()
            raise
        if reply.code != 0:
            reason = _last(reply.errors)
            if "no space left" in reason.lower():
                raise CheckError(f"no space left on {self._transport.name} in {self._transport.base}", MISSING)
            raise CheckError(
                f"can't write to {self._transport.base} on {self._transport.name} ({reason}); "
                "name another --directory", MISSING
            )  # fmt: skip
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            with _uninterrupted():
                self._remove()
        except CheckError as unclean:
            if not isinstance(error, CheckError):
                raise
            left = f"{error}; {self.path} is left on it, the next check removes it"
            raise CheckError(left, error.code) from unclean

    def put(self, local: Path, name: str, executable: bool = False) -> str:
        """Copy a file into the directory and make sure that it arrived; returns its path there."""
        size = local.stat().st_size
        seconds = QUICK_SECONDS + size / _SLOWEST_LINK
        remote = f"{self.path}/{name}"
        self.renew(seconds)
        self._transport.push(local, remote, seconds)
        arrived = self.device.call("digest", remote, seconds=seconds).text.split()
        if len(arrived) != 2 or arrived[1] != str(size):
            raise CheckError(f"{local.name} did not arrive whole on {self._transport.name}", MISSING)
        if executable:
            self._transport.shell(f"chmod 755 {shlex.quote(remote)}", QUICK_SECONDS)
        return remote

    def digest(self, remote: str) -> str | None:
        """SHA-256 of a file there; None where the device can't tell."""
        words = self.device.call("digest", remote, seconds=QUICK_SECONDS * 3).text.split()
        return words[0] if len(words) == 2 and re.fullmatch("[0-9a-f]{64}", words[0]) else None

    def get(self, name: str) -> bytes:
        return self._transport.pull(f"{self.path}/{name}", QUICK_SECONDS * 6)

    def run(self, arguments: list[str], mask: str, seconds: float) -> Reply:
        """Run a program in the directory. Its exit code is 124 when it took longer and was killed there."""
        self.renew(seconds)
        return self.device.call("execute", self.path, f"{seconds:.0f}", mask, *arguments, seconds=seconds)

    def is_full(self) -> bool:
        free = _number(self.device.call("space", self.path).text.strip())
        return free is not None and free < _FULL_KB

    def renew(self, seconds: float) -> None:
        self.device.call("lease", self.path, self._lease(seconds))

    def _lease(self, seconds: float) -> str:
        # From the clock at the start: leases only grow by what each step may take.
        self._clock += int(seconds) + int(QUICK_SECONDS)
        return f"{self._clock} {hostname()} {os.getpid()}"

    def _sweep(self) -> int:
        """Remove what crashed checks left; returns how many directories."""
        removed = 0
        for line in self.device.call("leases", self._transport.base).text.splitlines():
            directory, _, lease = line.partition("|")
            if re.fullmatch(r".*/edgeopt-[0-9a-f]{8}", directory) and self._is_stale(lease):
                removed += self.device.call("remove", directory).code == 0
        return removed

    def _is_stale(self, lease: str) -> bool:
        match = re.fullmatch(r"(\d+) (\S+) (\d+)", lease)
        if match is None:
            return True
        until, host, process = int(match[1]), match[2], int(match[3])
        if host == hostname() and not is_alive(process):
            return True
        return not self._clock - QUICK_SECONDS <= until <= self._clock + _LONGEST_LEASE

    def _remove(self) -> None:
        reply = self.device.call("remove", self.path)
        if reply.code != 0:
            raise CheckError(f"could not remove {self.path} on {self._transport.name}: {_last(reply.errors)}", MISSING)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not keep the device from being cleaned up; the programs started here ignore it, too."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals, and may ask for none
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _last(text: str) -> str:
    return text.strip().splitlines()[-1].strip() if text.strip() else "no reason given"
