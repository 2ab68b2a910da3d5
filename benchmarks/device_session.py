"""From `edgeopt export` to device_report.json, over a real adb and a real ssh, without a device.

    python benchmarks/device_session.py [--example NAME] [--target TARGET] [--bundle BUNDLE] [--runs N]

Exports the example (or takes a copy of BUNDLE), then runs `edgeopt device run` on it twice, and shows each command,
what it printed, how long it took, and what it left on the device:

1. over adb, on Debian's adbd that answers as a Pixel 6. Its runner is a script that starts the emulated phone's;
2. over ssh, on a 64-bit Arm board. edgeopt copies the emulated phone's runner and libraries there, and the kernel
   starts the Arm program (binfmt_misc, Linux 6.7 or newer).

Then both stand in the bundle's report (`edgeopt inspect`), and `edgeopt verify` must still take it. Phone and board
are those of the tests (tests/e2e/fixtures/device_lab.py), in a network namespace. Programs for Arm run under QEMU, so
the milliseconds are QEMU's and no device's. Needs `edgeopt emulator setup`; on the first run it loads 3.5 MB of Debian
packages.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/e2e/fixtures"))

from device_lab import PHONE, Lab, UnavailableError, arm_command, unpack_tools

from edgeopt import emulator
from edgeopt.bundle import open_bundle

EDGEOPT = [sys.executable, "-m", "edgeopt"]
SECONDS = 900


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", default="digits")
    parser.add_argument("--target", default="android-int8")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    if (reason := emulator.unavailable()) is not None:
        parser.error(reason)
    with tempfile.TemporaryDirectory(prefix="edgeopt-session-") as name:
        folder = Path(name)
        (folder / "tools").mkdir()
        (folder / "lab").mkdir()
        try:
            unpack_tools(folder / "tools")
            lab = Lab(folder / "tools", folder / "lab")
        except UnavailableError as reason:
            parser.error(str(reason))
        try:
            return session(lab, folder, args)
        finally:
            lab.close()


def session(lab: Lab, folder: Path, args: argparse.Namespace) -> int:
    """Returns how many commands failed."""
    failed = 0
    if args.bundle is not None:
        bundle = folder / args.bundle.resolve().name
        shutil.copytree(args.bundle, bundle)
    else:
        export = ["export", "--example", args.example, "--target", args.target, "--output-dir", str(folder)]
        failed += show(lab, folder, EDGEOPT, *export)
        bundle = folder / f"{args.example}-{args.target}"
    (folder / "runner").mkdir()
    runner = folder / "runner/edgeopt-runner"
    program = str(emulator.installed().runner(open_bundle(bundle).format))
    runner.write_text(f'#!/bin/sh\nexec {shlex.join(arm_command(program))} "$@"\n')
    run = ["device", "run", str(bundle), "--runs", str(args.runs)]
    failed += show(lab, folder, EDGEOPT, *run, "--adb", PHONE, "--runner", str(runner))
    outline(bundle / "device_report.json")
    if lab.runs_arm:
        failed += show(lab, folder, EDGEOPT, *run, *lab.ssh())
        outline(bundle / "device_report.json")
    else:
        print("\n(no board: this kernel does not let a user namespace run Arm programs)")
    print(f"\nleft on the devices: {lab.left() or 'nothing'}")
    for command in ("verify", "inspect"):
        failed += show(lab, folder, EDGEOPT, command, str(bundle))
    return failed


def show(lab: Lab, folder: Path, program: list[str], *words: str) -> bool:
    """Run a command in the lab's network and print it with its output; returns whether it failed."""
    shown = shlex.join(("edgeopt", *words)).replace(str(folder), "dist")
    print(f"\n$ {shown}", flush=True)
    start = time.monotonic()
    code, output, errors = lab.run(*program, *words, seconds=SECONDS)
    seconds = time.monotonic() - start
    print("\n".join(line.rstrip() for line in f"{errors}{output}".replace(str(folder), "dist").splitlines()))
    print(f"[exit code {code}, {seconds:.1f} s]", flush=True)
    return code != 0


def outline(path: Path) -> None:
    """The report's main keys, a line each."""
    report = json.loads(path.read_text())
    for key in ("status", "device", "runtime", "settings", "latency_ms", "peak_memory_bytes", "checks", "not_checked"):
        print(f"  {key}: {json.dumps(report[key])}")


if __name__ == "__main__":
    sys.exit(main())
