"""Calibration of a PT2E graph by our range estimators.

`prepare_pt2e` inserts a placeholder observer wherever a tensor is to be quantized, the same object wherever tensors
share a range. For the calibration runs every place gets a tap that feeds `ActivationRanges`; afterwards the observers
return with the scale and zero point that follow from the range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import ActivationRanges, Range
from edgeopt.errors import DataError
from edgeopt.exporter.base import CalibrationRun
from edgeopt.exporter.executorch_graph import layer_of, target_is
from edgeopt.types import Array, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node
    from torch.utils.hooks import RemovableHandle

_CLIPS = ("aten.hardtanh", "aten.hardtanh_", "aten.relu", "aten.relu_")


@dataclass(frozen=True, slots=True)
class _Place:
    """One observer call: `target` is its attribute in the graph module, `tensor` the name of its range."""

    call: Node
    target: str
    observer: torch.nn.Module
    source: Node
    tensor: str


def calibrate(
    prepared: GraphModule, run: CalibrationRun, inputs: tuple[TensorSpec, ...], *, symmetric: bool
) -> Mapping[str, Range]:
    """Run the samples through the prepared graph and set every activation observer; returns the ranges by tensor.

    Args:
        prepared: from `prepare_pt2e`, its activation observers being FixedQParamsObserver.
        run: samples and estimator.
        inputs: order and type of the graph's arguments.
        symmetric: zero points fixed at 0.

    Raises:
        DataError: a sample lacks an input, or an activation is not finite.
    """
    import torch

    places = _places(prepared, [spec.name for spec in inputs])
    constant = {p.tensor for p in places} - {p.tensor for p in places if p.source.op != "get_attr"}
    ranges = ActivationRanges(run.estimator, symmetric=symmetric, total=run.count)
    taps: list[RemovableHandle] = []
    with torch.no_grad():
        fixed = _observe_constants(prepared, [p for p in places if p.tensor in constant], symmetric)
        weights = observe_weights(prepared)
        for target in weights:
            setattr(prepared, target, torch.nn.Identity())
        for place in places:
            tap = torch.nn.Identity()
            if place.tensor not in constant and not _is_clipped_next(place, places):
                taps.append(tap.register_forward_hook(_feed(ranges, place.tensor)))
            setattr(prepared, place.target, tap)
        try:
            for sample in run.samples():
                prepared(*tensors(sample.inputs, inputs))
                ranges.next_sample()
        finally:
            for place in places:
                setattr(prepared, place.target, place.observer)
            for target, observer in weights.items():
                setattr(prepared, target, observer)
    for finding in ranges.findings():
        run.on_finding(finding)
    found = ranges.ranges() | fixed
    for place in places:
        _set(place.observer, found[place.tensor], symmetric)
    return found


def tensors(arrays: Mapping[str, Array], inputs: tuple[TensorSpec, ...]) -> tuple[torch.Tensor, ...]:
    """The model's positional arguments from a sample. Raises DataError naming an input that is missing."""
    import torch

    missing = [spec.name for spec in inputs if spec.name not in arrays]
    if missing:
        raise DataError(f"the sample lacks the input {missing[0]!r}", where="calibration data")
    return tuple(torch.tensor(np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype)) for spec in inputs)


def _places(prepared: GraphModule, inputs: Sequence[str]) -> list[_Place]:
    from torchao.quantization.pt2e import FixedQParamsObserver

    modules = dict(prepared.named_modules(remove_duplicate=False))
    arguments = [node for node in prepared.graph.nodes if node.op == "placeholder"]
    inputs_by_node = dict(zip(arguments, inputs, strict=True))
    names: dict[int, str] = {}
    places = []
    for call in prepared.graph.nodes:
        if call.op != "call_module" or not isinstance(modules[str(call.target)], FixedQParamsObserver):
            continue
        observer, source = modules[str(call.target)], call.args[0]
        if id(observer) not in names:
            taken = set(names.values())
            base = inputs_by_node.get(source) or layer_of(source) or source.name
            names[id(observer)] = next(n for n in _candidates(base, source.name) if n not in taken)
        places.append(_Place(call, str(call.target), observer, source, names[id(observer)]))
    return places


def _candidates(layer: str, operator: str) -> Iterable[str]:
    yield layer
    yield f"{layer}/{operator}"
    number = 1
    while True:
        number += 1
        yield f"{layer}/{operator}_{number}"


def _is_clipped_next(place: _Place, places: list[_Place]) -> bool:
    """Whether only clips that share this range read the tensor: then what they let through is all that counts."""
    same = {p.source for p in places if p.tensor == place.tensor}
    return bool(place.call.users) and all(target_is(user, *_CLIPS) and user in same for user in place.call.users)


def _feed(ranges: ActivationRanges, tensor: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...], object], None]:
    def hook(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...], __: object) -> None:
        ranges.update(tensor, arguments[0].numpy())

    return hook


def _observe_constants(prepared: GraphModule, places: list[_Place], symmetric: bool) -> dict[str, Range]:
    """Exact ranges of tensors that no sample changes."""
    found: dict[str, Range] = {}
    for place in places:
        value = _attribute(prepared, place.source)
        low, high = min(float(value.min()), 0.0), max(float(value.max()), 0.0)
        known = found.get(place.tensor, Range(0.0, 0.0))
        low, high = min(low, known.min), max(high, known.max)
        bound = max(-low, high)
        found[place.tensor] = Range(-bound, bound) if symmetric else Range(low, high)
    return found


def observe_weights(prepared: GraphModule) -> dict[str, torch.nn.Module]:
    """Show each weight to its observer, once; PT2E's own calibration would do it again for every sample.

    Returns:
        the observers by their place, so that they can be taken out of the way.
    """
    from torchao.quantization.pt2e import FixedQParamsObserver
    from torchao.quantization.pt2e.observer import ObserverBase

    modules = dict(prepared.named_modules(remove_duplicate=False))
    shown: dict[str, torch.nn.Module] = {}
    for call in prepared.graph.nodes:
        observer = modules.get(str(call.target)) if call.op == "call_module" else None
        if not isinstance(observer, ObserverBase) or isinstance(observer, FixedQParamsObserver):
            continue
        if call.args[0].op == "get_attr":
            observer(_attribute(prepared, call.args[0]))
            shown[str(call.target)] = observer
    return shown


def _attribute(module: GraphModule, node: Node) -> torch.Tensor:
    path, _, name = str(node.target).rpartition(".")
    value: torch.Tensor = getattr(module.get_submodule(path), name)
    return value


#: The finest step: below it, XNNPACK's requantization multipliers overflow (the stock observers stop there too).
_SMALLEST_SCALE = 2.0**-12


def _set(observer: torch.nn.Module, found: Range, symmetric: bool) -> None:
    """int8 affine: scale = (max - min) / 255, zero point = -128 - min / scale; symmetric: max / 127 and 0."""
    import torch

    scale = max(found.max / 127 if symmetric else (found.max - found.min) / 255, _SMALLEST_SCALE)
    scale = float(np.float32(scale))
    zero_point = 0 if symmetric else int(np.clip(round(-128 - found.min / scale), -128, 127))
    observer.scale = torch.tensor([scale], dtype=torch.float32)
    observer.zero_point = torch.tensor([zero_point], dtype=torch.int32)
