"""How long each source layer takes in an exported file, from its runtime's profile."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from edgeopt.formats.onnx import load
from edgeopt.runtimes import load_runtime
from edgeopt.tuning.estimates import is_emulated
from edgeopt.tuning.layers import Layer, path_of
from edgeopt.types import Artifact, OpTiming, Sample

_PROFILED_RUNS = 30
#: What ONNX Runtime appends to a name when it changes an operator's memory layout.
_LAYOUT_SUFFIX = re.compile(r"_nchwc$")
#: Operators that a weighted one absorbs on its way (activation, addition, normalization), at most.
_FUSED = 6


def layer_times(
    artifact: Artifact, runtime: str, sample: Sample, layers: Sequence[Layer], threads: int
) -> dict[str, float]:
    """Milliseconds by layer path; layers that the profile does not name are absent, all of them where the runtime is
    an emulator.

    Where the format keeps no layer names (.pte) the total is shared out by multiply-accumulates: an estimate.
    """
    if is_emulated((artifact,), runtime):
        return {}
    with load_runtime(runtime).open(artifact.path, artifact.signature, threads) as session:
        timings = session.profile(sample.inputs, _PROFILED_RUNS)
    if artifact.format == "executorch":
        return _by_macs(timings, layers)
    owner = _onnx_owner(artifact, layers) if artifact.format == "onnx" else lambda name: path_of("litert", name)
    return _by_name(timings, owner, layers)


def _by_macs(timings: Sequence[OpTiming], layers: Sequence[Layer]) -> dict[str, float]:
    total_ms = sum(timing.ms for timing in timings)
    total_macs = sum(layer.macs or 0 for layer in layers)
    if not total_ms or not total_macs:
        return {}
    return {layer.path: total_ms * (layer.macs or 0) / total_macs for layer in layers}


def _by_name(timings: Sequence[OpTiming], owner: Callable[[str], str], layers: Sequence[Layer]) -> dict[str, float]:
    wanted = {layer.path for layer in layers}
    times: dict[str, float] = {}
    for timing in timings:
        path = owner(timing.name)
        if path in wanted:
            times[path] = times.get(path, 0.0) + timing.ms
    return times


def _onnx_owner(artifact: Artifact, layers: Sequence[Layer]) -> Callable[[str], str]:
    """Profiled name -> layer. A fused operator is called after the tensor that it ends in, not after its layer."""
    nodes = load(artifact.path, weights=False).graph.node
    by_name = {node.name: node for node in nodes}
    producers = {output: node for node in nodes for output in node.output}
    wanted = {layer.path for layer in layers}

    def owner(name: str) -> str:
        if name in by_name:
            return path_of("onnx", name)
        node = producers.get(_LAYOUT_SUFFIX.sub("", name))
        for _ in range(_FUSED):
            if node is None:
                break
            if (path := path_of("onnx", node.name)) in wanted:
                return path
            node = producers.get(node.input[0]) if node.input else None
        return ""

    return owner
