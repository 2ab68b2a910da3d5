"""What a program finds in /proc and /sys on an emulated phone.

Programs choose their kernels and their number of threads by these files. QEMU hands out the host's unless the
directory given with -L has one of the same path.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from edgeopt.emulator.cores import Core

#: /proc/cpuinfo's names for the bits of AT_HWCAP and AT_HWCAP2, lowest first (Linux, arch/arm64/kernel/cpuinfo.c).
_HWCAP = """
    fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4
    asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg
"""
_HWCAP2 = """
    dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 dgh
    rng bti mte ecv afp rpres mte3 sme smei16i64 smef64f64 smei8i32 smef16f32 smeb16f32 smef32f32 smefa64 wfxt ebf16
    sveebf16 cssc rprfm sve2p1
"""
#: kHz. No runtime computes with it; it only has to be the same for all cores.
_FREQUENCY = 2_000_000
#: Bytes; the same in all of Arm's application cores.
_CACHE_LINE = 64


def features_line(hwcap: int, hwcap2: int) -> str:
    """The words after "Features" in /proc/cpuinfo for what a CPU tells its programs in the auxiliary vector."""
    names = [name for bit, name in enumerate(_HWCAP.split()) if hwcap >> bit & 1]
    return " ".join(names + [name for bit, name in enumerate(_HWCAP2.split()) if hwcap2 >> bit & 1])


def make(directory: Path, sysroot: Path, core: Core, features: str, num_cores: int) -> None:
    """Write the directory, unless it is there. It appears with all its files or not at all."""
    if directory.is_dir():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=directory.parent))
    try:
        for name in ("lib", "usr"):
            (scratch / name).symlink_to(os.path.relpath(sysroot / name, directory))
        for path, content in _files(core, features, num_cores).items():
            target = scratch / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="ascii")
        scratch.chmod(0o755)
        scratch.rename(directory)
    except OSError:
        if not directory.is_dir():  # another process was not first either
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _files(core: Core, features: str, num_cores: int) -> dict[str, str]:
    every = "0" if num_cores == 1 else f"0-{num_cores - 1}"
    mask = f"{(1 << num_cores) - 1:x}"
    system = "sys/devices/system/cpu"
    files = {
        "proc/cpuinfo": "\n".join(_cpuinfo(cpu, core.midr, features) for cpu in range(num_cores)),
        # The host's lists of libraries are about another architecture.
        "etc/ld.so.cache": "",
        "etc/ld.so.preload": "",
        f"{system}/kernel_max": f"{num_cores - 1}\n",
        f"{system}/offline": "\n",
    }
    files |= {f"{system}/{name}": f"{every}\n" for name in ("possible", "present", "online")}
    for cpu in range(num_cores):
        own = f"{system}/cpu{cpu}"
        files |= {
            f"{own}/regs/identification/midr_el1": f"0x{core.midr:016x}\n",
            f"{own}/topology/core_id": f"{cpu}\n",
            f"{own}/topology/physical_package_id": "0\n",
            f"{own}/topology/cluster_id": "0\n",
            f"{own}/topology/thread_siblings_list": f"{cpu}\n",
            f"{own}/topology/thread_siblings": f"{1 << cpu:x}\n",
            f"{own}/topology/core_cpus_list": f"{cpu}\n",
            f"{own}/topology/core_cpus": f"{1 << cpu:x}\n",
        }
        for name in ("core_siblings", "package_cpus", "cluster_cpus"):
            files |= {f"{own}/topology/{name}_list": f"{every}\n", f"{own}/topology/{name}": f"{mask}\n"}
        for name in ("cpuinfo_min_freq", "cpuinfo_max_freq", "scaling_cur_freq", "scaling_max_freq"):
            files[f"{own}/cpufreq/{name}"] = f"{_FREQUENCY}\n"
        files |= {f"{own}/cache/{path}": content for path, content in _caches(cpu, core.cache_kb).items()}
    return files


def _caches(cpu: int, kb: tuple[int, int]) -> dict[str, str]:
    """Split first-level caches, a second level, and nothing where the host may have a third."""
    files: dict[str, str] = {}
    for index, (level, kind, size) in enumerate(((1, "Data", kb[0]), (1, "Instruction", kb[0]), (2, "Unified", kb[1]))):
        values = {"level": level, "type": kind, "size": f"{size}K", "coherency_line_size": _CACHE_LINE}
        files |= {f"index{index}/{name}": f"{value}\n" for name, value in values.items()}
        files |= {f"index{index}/shared_cpu_list": f"{cpu}\n", f"index{index}/shared_cpu_map": f"{1 << cpu:x}\n"}
    names = ("level", "type", "size", "coherency_line_size", "shared_cpu_list", "shared_cpu_map")
    return files | {f"index3/{name}": "" for name in names}


def _cpuinfo(cpu: int, midr: int, features: str) -> str:
    return (
        f"processor\t: {cpu}\n"
        "BogoMIPS\t: 38.40\n"
        f"Features\t: {features}\n"
        f"CPU implementer\t: 0x{midr >> 24 & 0xFF:02x}\n"
        "CPU architecture: 8\n"
        f"CPU variant\t: 0x{midr >> 20 & 0xF:x}\n"
        f"CPU part\t: 0x{midr >> 4 & 0xFFF:03x}\n"
        f"CPU revision\t: {midr & 0xF}\n"
    )
