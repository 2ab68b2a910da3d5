"""Artifact -> outputs, per-operator times, memory; one module per way to run a file."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from edgeopt.errors import ConfigError
from edgeopt.runtimes.base import Runtime

RUNTIMES: dict[str, str] = {
    "litert": "edgeopt.runtimes.litert:LiteRTRuntime",
    "onnxruntime": "edgeopt.runtimes.onnxruntime:OnnxRuntime",
    "executorch": "edgeopt.runtimes.executorch:ExecuTorchRuntime",
}


def load_runtime(name: str) -> Runtime:
    """The runtime of that name; imports its module now. Raises ConfigError on an unknown name."""
    if name not in RUNTIMES:
        near = get_close_matches(name, RUNTIMES, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"take one of {', '.join(RUNTIMES)}"
        raise ConfigError(f"unknown runtime {name!r}", fix=fix)
    module, _, attribute = RUNTIMES[name].partition(":")
    runtime: Runtime = getattr(import_module(module), attribute)()
    return runtime
