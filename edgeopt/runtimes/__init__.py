"""Artifact -> outputs, per-operator times, memory; one module per way to run a file."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module

from edgeopt.errors import ConfigError, MissingError
from edgeopt.runtimes.base import Runtime
from edgeopt.types import Format

RUNTIMES: dict[str, str] = {
    "litert": "edgeopt.runtimes.litert:LiteRTRuntime",
    "onnxruntime": "edgeopt.runtimes.onnxruntime:OnnxRuntime",
    "executorch": "edgeopt.runtimes.executorch:ExecuTorchRuntime",
    "openvino": "edgeopt.runtimes.openvino:OpenVinoRuntime",
    "coreml": "edgeopt.runtimes.coreml:CoreMLRuntime",
    "coreml-reference": "edgeopt.runtimes.coreml_reference:CoreMLReference",
    "litert-reference": "edgeopt.runtimes.litert_reference:LiteRTReference",
    "tosa": "edgeopt.runtimes.tosa:TosaRuntime",
    "qnn-htp": "edgeopt.runtimes.qnn_htp:QnnHtpRuntime",
    "vgf": "edgeopt.runtimes.vgf:VgfRuntime",
}
#: Runtimes of which there is one per device: "phone:cortex-a76" is `PhoneRuntime("cortex-a76")`.
PER_DEVICE: dict[str, str] = {
    "phone": "edgeopt.runtimes.phone:PhoneRuntime",
}
#: Where a float file runs when its quantized twin runs in an emulator, which would cost the reference its exactness.
HOST_RUNTIMES: dict[Format, str] = {
    "litert": "litert",
    "onnx": "onnxruntime",
    "executorch": "executorch",
    "coreml": "coreml-reference",
}


def runtimes_here(wanted: tuple[str, ...], emulators: tuple[str, ...]) -> tuple[str, ...]:
    """The wanted runtimes where all of them work on this machine, else those that stand in for them.

    Raises ConfigError on an unknown name, MissingError where neither can be used.
    """
    missing = [reason for name in wanted if (reason := load_runtime(name).unavailable()) is not None]
    if not missing:
        return wanted
    if not emulators:
        raise MissingError(missing[0])
    for name in emulators:
        if (reason := load_runtime(name).unavailable()) is not None:
            raise MissingError(f"{missing[0]}; {reason}")
    return emulators


def load_runtime(name: str) -> Runtime:
    """The runtime of that name; imports its module now. Raises ConfigError on an unknown name."""
    family, _, device = name.partition(":")
    if device and family in PER_DEVICE:
        made: Runtime = _class(PER_DEVICE[family])(device)
        return made
    if name not in RUNTIMES:
        known = (*RUNTIMES, *(f"{family}:DEVICE" for family in PER_DEVICE))
        near = get_close_matches(name, known, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"take one of {', '.join(known)}"
        raise ConfigError(f"unknown runtime {name!r}", fix=fix)
    runtime: Runtime = _class(RUNTIMES[name])()
    return runtime


def _class(path: str) -> Callable[..., Runtime]:
    module, _, attribute = path.partition(":")
    found: Callable[..., Runtime] = getattr(import_module(module), attribute)
    return found
