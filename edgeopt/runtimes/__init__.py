"""Artifact -> outputs, per-operator times, memory; one module per way to run a file."""

from __future__ import annotations

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
    if name not in RUNTIMES:
        near = get_close_matches(name, RUNTIMES, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"take one of {', '.join(RUNTIMES)}"
        raise ConfigError(f"unknown runtime {name!r}", fix=fix)
    module, _, attribute = RUNTIMES[name].partition(":")
    runtime: Runtime = getattr(import_module(module), attribute)()
    return runtime
