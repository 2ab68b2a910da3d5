"""Qualcomm's HTP by LiteRT and by ExecuTorch: both need Qualcomm's SDK, which no package registry has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from edgeopt.accelerators.base import Compiled
from edgeopt.errors import ConversionError, MissingError
from edgeopt.formats.executorch import read_program
from edgeopt.formats.files import sha256_of, size_of
from edgeopt.formats.litert import summarize
from edgeopt.types import Artifact, Hexagon, Npu, OpPlacement, Placement, StepRecord

#: QNN's numbers of the systems on chip that LiteRT's compiler knows by name. Source: ExecuTorch's
#: backends/qualcomm/serialization/qc_schema.py.
_SOC_NAMES: Mapping[int, str] = {
    30: "SM8350", 36: "SM8450", 42: "SM8475", 43: "SM8550", 57: "SM8650", 69: "SM8750", 87: "SM8850",
}  # fmt: skip
_PLUGIN = Path("vendors", "qualcomm", "compiler", "libLiteRtCompilerPlugin_Qualcomm.so")
_SDK_PACKAGE = "ai_edge_litert_sdk_qualcomm"
_SDK_LIBRARY = Path("lib", "x86_64-linux-clang", "libQnnHtp.so")


class LiteRTHexagonAccelerator:
    """LiteRT's ahead-of-time compiler for Qualcomm. See `edgeopt.accelerators.base.Accelerator`."""

    def unavailable(self) -> str | None:
        litert = find_spec("ai_edge_litert")
        places = list(litert.submodule_search_locations or ()) if litert is not None else []
        if not any((Path(place) / _PLUGIN).is_file() for place in places):
            return "this ai-edge-litert has no compiler plugin for Qualcomm: pip install ai-edge-litert on x86-64 Linux"
        sdk = find_spec(_SDK_PACKAGE)
        places = list(sdk.submodule_search_locations or ()) if sdk is not None else []
        if not any(next(Path(place).rglob("libQnnHtp.so"), None) for place in places):
            return (
                "LiteRT compiles for Qualcomm with Qualcomm's SDK: pip install ai-edge-litert-sdk-qualcomm (which "
                "fetches it from Qualcomm), or take qualcomm-int8"
            )
        return None

    def compile(self, artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
        hexagon = _hexagon(npu, self.unavailable())
        soc = _SOC_NAMES.get(hexagon.soc_model or 0)
        if soc is None:
            raise ConversionError(
                f"LiteRT compiles for none but {', '.join(_SOC_NAMES.values())}",
                where=f"hexagon {hexagon.architecture}",
                fix="take a device with one of these, or qualcomm-int8",
            )
        path = _compiled(artifact.path, soc, directory / "qualcomm")
        left = {op.name for op in summarize(path).ops}
        ops = tuple(
            OpPlacement(op.name, op.type, "cpu", reason="LiteRT's Qualcomm compiler did not take it")
            if op.name in left
            else OpPlacement(op.name, op.type, "accelerator")
            for op in summarize(artifact.path).ops
        )
        told = f"LiteRT's Qualcomm compiler {version('ai-edge-litert')}"
        shipped = replace(
            artifact,
            path=path,
            size_bytes=size_of(path),
            sha256=sha256_of(path),
            history=(*artifact.history, StepRecord("compile", {"accelerator": soc})),
            emulation=artifact.path,
        )
        return Compiled(shipped, Placement(f"Hexagon {hexagon.architecture}", told, predicted=False, ops=ops))


class ExecuTorchHexagonAccelerator:
    """Reads the delegation from the .pte file that the QNN delegate made. See `edgeopt.accelerators.base`."""

    def unavailable(self) -> str | None:
        return _missing_sdk()

    def compile(self, artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
        del directory  # the exporter has compiled already
        hexagon = _hexagon(npu, self.unavailable())
        told = f"the file, made by executorch {version('executorch')}"
        ops = tuple(_delegation(artifact.path))
        return Compiled(artifact, Placement(f"Hexagon {hexagon.architecture}", told, predicted=False, ops=ops))


def _missing_sdk() -> str | None:
    """What of ExecuTorch's QNN route is not on this machine, and how to get it; None when all is there."""
    if find_spec("executorch") is None or find_spec("executorch.backends.qualcomm") is None:
        return "this executorch has no Qualcomm backend: pip install executorch on x86-64 Linux"
    root = os.environ.get("QNN_SDK_ROOT", "")
    if not root:
        return (
            "ExecuTorch's QNN route needs Qualcomm's AI Engine Direct SDK, and QNN_SDK_ROOT is not set: install the "
            "SDK from qpm.qualcomm.com and set QNN_SDK_ROOT and LD_LIBRARY_PATH, or take qualcomm-int8"
        )
    if not (Path(root) / _SDK_LIBRARY).is_file():
        return f"QNN_SDK_ROOT is {root}, which has no {_SDK_LIBRARY}: set it to where the SDK is, or take qualcomm-int8"
    return None


def _hexagon(npu: Npu, missing: str | None) -> Hexagon:
    if missing is not None:
        raise MissingError(missing)
    if not isinstance(npu, Hexagon):
        raise ValueError(f"{npu.kind} is no Hexagon")
    return npu


def _compiled(source: Path, soc: str, directory: Path) -> Path:
    from ai_edge_litert.aot.aot_compile import aot_compile
    from ai_edge_litert.aot.vendors.qualcomm.target import SocModel, Target

    directory.mkdir(parents=True, exist_ok=True)
    try:
        aot_compile(str(source), output_dir=directory, target=Target(SocModel(soc)), keep_going=False)
    # The compiler runs as a process of its own; its wrapper raises whatever came of it.
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise ConversionError(f"LiteRT's Qualcomm compiler refuses it: {line}", where=source.name) from error
    written = [path for path in sorted(directory.glob("*.tflite")) if size_of(path) > 0]
    if not written:
        raise ConversionError("LiteRT's Qualcomm compiler wrote no file, or an empty one", where=source.name)
    return written[-1]


def _delegation(path: Path) -> Iterator[OpPlacement]:
    for op in read_program(path).ops:
        layer = op.layer or None
        if op.info.delegate == "QnnBackend":
            yield OpPlacement(op.info.name, op.info.type, "accelerator", layer)
        else:
            reason = "the QNN delegate did not take it"
            yield OpPlacement(op.info.name, op.info.type, "cpu", layer, reason)
