"""VGF in .pte files, on Arm's emulation of its ML extensions for Vulkan: ExecuTorch's own runtime, as on the device."""

from __future__ import annotations

import os
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path

from edgeopt.errors import ConversionError, MissingError
from edgeopt.runtimes.base import Session
from edgeopt.runtimes.executorch import ExecuTorchRuntime
from edgeopt.runtimes.tosa_program import SUFFIX as PROGRAM_SUFFIX
from edgeopt.types import Format, Signature

_BACKEND = "VgfBackend"
#: Where the Vulkan loader looks for drivers, beside what VK_DRIVER_FILES and VK_ICD_FILENAMES name.
_DRIVERS = (Path("/usr/share/vulkan/icd.d"), Path("/etc/vulkan/icd.d"), Path("/usr/local/share/vulkan/icd.d"))
_LAYERS = ("VK_LAYER_ML_Graph_Emulation", "VK_LAYER_ML_Tensor_Emulation")


class VgfRuntime:
    """See `edgeopt.runtimes.base.Runtime`.

    It needs four things that no package brings together: a Vulkan loader, a driver (Mesa's lavapipe runs on any CPU),
    Arm's emulation layer in the environment, and an ExecuTorch that was built with the VGF backend.
    """

    name = "vgf"
    formats: tuple[Format, ...] = ("executorch",)
    emulates: str | None = "a GPU with neural graphics, by Arm's emulation layer for Vulkan"

    def unavailable(self) -> str | None:
        reason = ExecuTorchRuntime().unavailable()
        if reason is not None:
            return reason
        if find_library("vulkan") is None:
            return "there is no Vulkan loader; install libvulkan1"
        named = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES")
        if not named and not any(any(folder.glob("*.json")) for folder in _DRIVERS):
            return "there is no Vulkan driver; install mesa-vulkan-drivers"
        if find_spec("emulation_layer") is None:
            return MissingError.extra("ai-ml-emulation-layer-for-vulkan", "vgf", "running VGF").line()
        layers = os.environ.get("VK_INSTANCE_LAYERS", "")
        if any(layer not in layers for layer in _LAYERS):
            return 'Arm\'s emulation layer is not switched on; eval "$(emulation_layer)"'
        if not _is_built_in():
            return "this build of executorch has no VGF backend; build it with EXECUTORCH_BUILD_VGF=ON"
        return None

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        reason = self.unavailable()
        if reason is not None:
            raise MissingError(reason, where="runtime vgf")
        return ExecuTorchRuntime().open(program_beside(path), signature, threads)


def program_beside(path: Path) -> Path:
    """The .pte file itself where its TOSA form is given: the exporter writes both side by side, by the same name.

    Raises ConversionError where there is none.
    """
    if path.suffix == ".pte":
        return path
    stem = path.name.removesuffix(PROGRAM_SUFFIX).removesuffix(".tosa")
    program = path.with_name(f"{stem}.pte")
    if not program.is_file():
        raise ConversionError("has no .pte file beside it", where=str(path), fix="export it again")
    return program


def _is_built_in() -> bool:
    from executorch.runtime import Runtime

    return _BACKEND in Runtime.get().backend_registry.registered_backend_names
