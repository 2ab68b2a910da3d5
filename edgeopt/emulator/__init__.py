"""A phone in a box: aarch64 programs, and the runtimes' own aarch64 builds, under QEMU's user emulation.

`setup` installs it below $EDGEOPT_HOME (by default ~/.cache/edgeopt), unprivileged; everything comes from pinned
files. `installed()` gives the `Emulator` that runs programs on one of the CPUs of `core_for`.
"""

from __future__ import annotations

from edgeopt.emulator.cores import Core, all_cores, core_for
from edgeopt.emulator.home import remove
from edgeopt.emulator.installation import Emulator, installed, unavailable
from edgeopt.emulator.installer import setup

__all__ = ["Core", "Emulator", "all_cores", "core_for", "installed", "remove", "setup", "unavailable"]
