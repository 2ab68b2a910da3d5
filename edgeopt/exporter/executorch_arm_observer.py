"""Calibration of a graph prepared by Arm's quantizer, by our range estimators.

Unlike XNNPACK's, that quantizer takes operators apart before it annotates (softmax, layer norm), and which ones depends
on the layers that are exempt. Names of the parts then stand for other tensors, so ranges are kept per graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import ActivationRanges, Range
from edgeopt.calibration.weights import quantize_weight
from edgeopt.exporter.base import CalibrationRun
from edgeopt.exporter.executorch_graph import attribute, layer_of, target_is
from edgeopt.exporter.executorch_observer import CLIPS, is_gemm, tensors
from edgeopt.types import Scheme, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

#: The finest steps. TOSA's RESCALE has 31 or 15 significant bits and shifts by up to 62; the int32 bias, whose scale is
#: that of the input times that of the weight, is the narrower bound.
_SMALLEST_SCALE = {8: 2.0**-16, 16: 2.0**-20}
#: The finest weight scale, and the bound of an int32 bias with room for what is added to it.
_FINEST, _BIAS = 2.0**-24, 2.0**30


@dataclass(frozen=True, slots=True)
class _Place:
    """One observer call and the tensor that it reads: its name, and the key under which its range is kept."""

    call: Node
    observer: torch.nn.Module
    source: Node
    name: str
    key: str


def calibrate(
    prepared: GraphModule,
    run: CalibrationRun,
    inputs: tuple[TensorSpec, ...],
    scheme: Scheme,
    layer_ranges: Mapping[str, tuple[float, float]],
) -> None:
    """Set the scale and zero point of every open activation observer of a prepared graph.

    The samples run only when `run.known` lacks a range of this very graph.

    Args:
        prepared: from `prepare_pt2e` with the quantizer of `executorch_arm_quantizer`.
        run: samples, estimator, and the ranges known already, to which new ones are added.
        inputs: order and type of the graph's arguments.
        scheme: bits of activations, whether zero points are fixed at 0, and which scales are allowed.
        layer_ranges: see `Model.input_ranges`.

    Raises:
        DataError: a sample lacks an input, or an activation is not finite.
    """
    symmetric = _is_symmetric(scheme)
    places = _open_places(prepared, inputs, scheme)
    groups: dict[int, list[_Place]] = {}
    for place in places:
        groups.setdefault(id(place.observer), []).append(place)
    trained = _trained(prepared, places, layer_ranges)
    measured = [place for key, group in groups.items() if key not in trained for place in _that_count(group)]
    changing = [place for place in measured if place.source.op != "get_attr"]
    if not all(place.key in run.known for place in changing):
        _observe(prepared, run, inputs, changing, scheme)
    for key, group in groups.items():
        ranges = trained.get(key) or [_range(prepared, place, run) for place in _that_count(group)]
        _set(group[0].observer, _join(ranges, symmetric=symmetric), scheme)


def _is_symmetric(scheme: Scheme) -> bool:
    return scheme.activation_symmetric or scheme.activation_bits == 16


def _open_places(prepared: GraphModule, inputs: Sequence[TensorSpec], scheme: Scheme) -> list[_Place]:
    from torchao.quantization.pt2e import FixedQParamsObserver

    prefix = f"{'symmetric ' if _is_symmetric(scheme) else ''}{scheme.activation_bits} bits {_identity(prepared)} "
    arguments = [node for node in prepared.graph.nodes if node.op == "placeholder"]
    names = {node: spec.name for node, spec in zip(arguments, inputs, strict=True)}
    found = []
    for call in prepared.graph.nodes:
        observer = prepared.get_submodule(str(call.target)) if call.op == "call_module" else None
        if isinstance(observer, FixedQParamsObserver) and bool(observer.scale.isnan()):
            source = call.args[0]
            name = names.get(source) or f"{layer_of(source)}/{source.name}"
            found.append(_Place(call, observer, source, name, prefix + name))
    return found


def _identity(prepared: GraphModule) -> str:
    """A digest of the operators and their names, observers left out."""
    digest = hashlib.sha256()
    for node in prepared.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            digest.update(f"{layer_of(node)} {node.name} {node.target}\n".encode())
    return digest.hexdigest()[:16]


def _that_count(group: Sequence[_Place]) -> list[_Place]:
    """Of tensors that share a range, those that decide it: what only clips of the group read is clipped by them."""
    sources = {place.source for place in group}

    def is_clipped_next(place: _Place) -> bool:
        users = place.call.users
        return bool(users) and all(target_is(user, *CLIPS) and user in sources for user in users)

    return [place for place in group if not is_clipped_next(place)] or list(group)


def _trained(
    prepared: GraphModule, places: Sequence[_Place], ranges: Mapping[str, tuple[float, float]]
) -> dict[int, list[Range]]:
    """Observer -> the ranges that the model says the layers behind it shall read."""
    observers = {place.call: place.observer for place in places}
    found: dict[int, list[Range]] = {}
    for node in prepared.graph.nodes:
        if is_gemm(node) and layer_of(node) in ranges and node.args[0] in observers:
            found.setdefault(id(observers[node.args[0]]), []).append(Range(*ranges[layer_of(node)]))
    return found


def _observe(
    prepared: GraphModule,
    run: CalibrationRun,
    inputs: tuple[TensorSpec, ...],
    places: Sequence[_Place],
    scheme: Scheme,
) -> None:
    """Run the samples and add what they show to `run.known`."""
    import torch
    from torch.fx import Interpreter

    watched = {place.source: place.name for place in places}
    keys = {place.name: place.key for place in places}
    symmetric, bits = _is_symmetric(scheme), scheme.activation_bits
    ranges = ActivationRanges(run.estimator, symmetric=symmetric, bits=bits, total=run.count)

    class Watcher(Interpreter):
        def run_node(self, n: Node) -> object:
            value: object = super().run_node(n)
            if n in watched and isinstance(value, torch.Tensor):
                ranges.update(watched[n], value.numpy())
            return value

    with torch.no_grad():
        watcher = Watcher(prepared)
        for sample in run.samples():
            watcher.run(*tensors(sample.inputs, inputs), enable_io_processing=False)
            ranges.next_sample()
    for finding in ranges.findings():
        run.on_finding(finding)
    for name, range_ in ranges.ranges().items():
        run.known[keys[name]] = range_


def _range(prepared: GraphModule, place: _Place, run: CalibrationRun) -> Range:
    if place.source.op != "get_attr":
        return run.known[place.key]
    value = attribute(prepared, place.source)
    return Range(float(value.min()), float(value.max()))


def _join(ranges: Iterable[Range], *, symmetric: bool) -> Range:
    """The smallest range with zero in it that covers all of them."""
    members = list(ranges)
    low, high = min(0.0, *(r.min for r in members)), max(0.0, *(r.max for r in members))
    bound = max(-low, high)
    return Range(-bound, bound) if symmetric else Range(low, high)


def _set(observer: torch.nn.Module, found: Range, scheme: Scheme) -> None:
    """Affine: scale = (max - min) / 255, zero point = -128 - min / scale; symmetric: max / (2^(bits-1) - 1) and 0.

    A power-of-two scale is the next larger one.
    """
    import torch

    bits, symmetric = scheme.activation_bits, _is_symmetric(scheme)
    exact = found.max / (2 ** (bits - 1) - 1) if symmetric else (found.max - found.min) / 255
    scale = max(exact, _SMALLEST_SCALE[bits])
    if scheme.scale == "power-of-two":
        scale = 2.0 ** np.ceil(np.log2(scale))
    scale = float(np.float32(scale))
    zero_point = 0 if symmetric else int(np.clip(round(-128 - found.min / scale), -128, 127))
    observer.scale = torch.tensor([scale], dtype=torch.float32)
    observer.zero_point = torch.tensor([zero_point], dtype=torch.int32)


# --- weights ---------------------------------------------------------------------------------------------------------


def observe_weights(prepared: GraphModule, scheme: Scheme) -> None:
    """Give every weight observer of a calibrated graph the scale that its weight gets at this scheme."""
    import torch
    from torchao.quantization.pt2e import FixedQParamsObserver
    from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase

    for call in prepared.graph.nodes:
        if call.op != "call_module" or call.args[0].op != "get_attr":
            continue
        observer = prepared.get_submodule(str(call.target))
        if not isinstance(observer, UniformQuantizationObserverBase) or isinstance(observer, FixedQParamsObserver):
            continue
        weight = attribute(prepared, call.args[0]).detach().numpy()
        quantized = quantize_weight(weight, scheme, getattr(observer, "ch_axis", None))
        floor = max((_finest_scale(prepared, gemm) for gemm in call.users if is_gemm(gemm)), default=_FINEST)
        if scheme.scale == "power-of-two":
            floor = float(2.0 ** np.ceil(np.log2(floor)))
        scale = torch.as_tensor(np.maximum(quantized.scale, np.float32(floor)))
        observer.register_buffer("eps", torch.zeros(1))  # the floor has been applied
        # These observers derive scale = max|w| / 127.
        observer.register_buffer("min_val", -127 * scale)
        observer.register_buffer("max_val", 127 * scale)


def _finest_scale(prepared: GraphModule, gemm: Node) -> float:
    """The smallest weight scale with which this layer's bias is an int32 at input scale x weight scale."""
    from torch.fx import Node
    from torchao.quantization.pt2e import FixedQParamsObserver

    source, bias = gemm.all_input_nodes[0], gemm.args[2] if len(gemm.args) > 2 else None
    observer = prepared.get_submodule(str(source.target)) if source.op == "call_module" else None
    if not isinstance(observer, FixedQParamsObserver) or not isinstance(bias, Node):
        return _FINEST
    constant = bias.all_input_nodes[0] if bias.op == "call_module" else bias
    largest = float(attribute(prepared, constant).detach().abs().max())
    return max(_FINEST, largest / (float(observer.scale) * _BIAS))
