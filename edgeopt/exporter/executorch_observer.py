"""Calibration of a PT2E graph by our range estimators.

`prepare_pt2e` inserts a placeholder observer wherever a tensor is to be quantized, the same object wherever tensors
share a range. Ranges are kept per operator of the captured graph, whose names don't depend on which layers are exempt;
an observer covers those of all the tensors that share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import ActivationRanges, Range
from edgeopt.errors import DataError
from edgeopt.exporter.base import CalibrationRun
from edgeopt.exporter.executorch_graph import attribute, layer_of, target_is
from edgeopt.types import Array, Scheme, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

CLIPS = ("aten.hardtanh", "aten.hardtanh_", "aten.relu", "aten.relu_")
_GEMMS = ("aten.conv1d", "aten.conv2d", "aten.linear", "aten.conv_transpose1d", "aten.conv_transpose2d")
_PADS = ("aten.pad", "aten.constant_pad_nd")
#: Operators with int8 kernels: some assignment of layers may quantize what they read and make.
_QUANTIZABLE = (
    *_GEMMS, *CLIPS, "aten.add", "aten.add_", "aten.mul", "aten.mul_", "aten.sub", "aten.cat", "aten.mean",
    "aten.adaptive_avg_pool2d", "aten.max_pool2d", "aten.elu", "aten.pad", "aten.constant_pad_nd",
)  # fmt: skip

#: The finest step: below it, XNNPACK's requantization multipliers overflow (the stock observers stop there too).
_SMALLEST_SCALE = 2.0**-12


@dataclass(frozen=True, slots=True)
class _Place:
    """One observer call: what it reads, under which name that tensor's range is kept, and who reads it in turn."""

    call: Node
    observer: torch.nn.Module
    source: Node
    tensor: str


def calibrate(
    prepared: GraphModule,
    run: CalibrationRun,
    inputs: tuple[TensorSpec, ...],
    scheme: Scheme,
    layer_ranges: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Set the scale and zero point of every activation observer of a prepared graph.

    The samples run only when `run.known` lacks a range; then everything is observed that a plan with other layers
    exempt could ask for.

    Args:
        prepared: from `prepare_pt2e`, its activation observers being FixedQParamsObserver.
        run: samples, estimator, and the ranges known already, to which new ones are added.
        inputs: order and type of the graph's arguments.
        scheme: whether zero points are fixed at 0, and which scales are allowed.
        layer_ranges: see `Model.input_ranges`.

    Raises:
        DataError: a sample lacks an input, or an activation is not finite.
    """
    names = _Names(prepared, inputs)
    places = [_Place(*place, names.of(place[2])) for place in _observers(prepared)]
    fixed = _layer_ranges(prepared, places, layer_ranges or {}, symmetric=scheme.activation_symmetric)
    groups: dict[int, list[_Place]] = {}
    for place in places:
        groups.setdefault(id(place.observer), []).append(place)
    open_groups = [group for key, group in groups.items() if key not in fixed]
    wanted = {p.tensor for group in open_groups for p in _measured(group) if p.source.op != "get_attr"}
    known = _Known(run.known, symmetric=scheme.activation_symmetric)
    if not all(name in known for name in wanted):
        _observe(prepared, run, inputs, names, wanted, known)
    for key, group in groups.items():
        range_ = fixed[key] if key in fixed else _union(prepared, _measured(group), known)
        _set(group[0].observer, range_, scheme)


class _Known:
    """The exporter's part of `CalibrationRun.known`; symmetric ranges go by names of their own."""

    def __init__(self, ranges: MutableMapping[str, Range], *, symmetric: bool) -> None:
        self.symmetric = symmetric
        self._ranges = ranges

    def __contains__(self, tensor: str) -> bool:
        return self._key(tensor) in self._ranges

    def __getitem__(self, tensor: str) -> Range:
        return self._ranges[self._key(tensor)]

    def __setitem__(self, tensor: str, found: Range) -> None:
        self._ranges[self._key(tensor)] = found

    def _key(self, tensor: str) -> str:
        return f"symmetric {tensor}" if self.symmetric else tensor


class _Names:
    """A model input by its name, any other tensor as "layer/operator"."""

    def __init__(self, prepared: GraphModule, inputs: Sequence[TensorSpec]) -> None:
        arguments = [node for node in prepared.graph.nodes if node.op == "placeholder"]
        self._inputs = {node: spec.name for node, spec in zip(arguments, inputs, strict=True)}

    def of(self, node: Node) -> str:
        return self._inputs.get(node) or f"{layer_of(node)}/{node.name}"


def tensors(arrays: Mapping[str, Array], inputs: tuple[TensorSpec, ...]) -> tuple[torch.Tensor, ...]:
    """The model's positional arguments from a sample. Raises DataError naming an input that is missing."""
    import torch

    missing = [spec.name for spec in inputs if spec.name not in arrays]
    if missing:
        raise DataError(f"the sample lacks the input {missing[0]!r}", where="calibration data")
    return tuple(torch.tensor(np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype)) for spec in inputs)


def activation_scale(prepared: GraphModule, gemm: Node) -> float | None:
    """The scale of what a convolution or linear layer reads, once observers are set; None where it reads float."""
    from torchao.quantization.pt2e import FixedQParamsObserver

    observer = _module_of(prepared, _input_of(gemm))
    return float(observer.scale) if isinstance(observer, FixedQParamsObserver) else None


def is_gemm(node: Node) -> bool:
    """Whether this is a convolution or a linear layer, in the captured graph."""
    return target_is(node, *_GEMMS)


def _observers(prepared: GraphModule) -> list[tuple[Node, torch.nn.Module, Node]]:
    from torchao.quantization.pt2e import FixedQParamsObserver

    found = []
    for call in prepared.graph.nodes:
        module = _module_of(prepared, call)
        if isinstance(module, FixedQParamsObserver):
            found.append((call, module, call.args[0]))
    return found


def _module_of(prepared: GraphModule, node: Node) -> torch.nn.Module | None:
    return prepared.get_submodule(str(node.target)) if node.op == "call_module" else None


def _input_of(gemm: Node) -> Node:
    """What a layer reads, before padding, which is quantized together with it."""
    source: Node = gemm.all_input_nodes[0]
    return source.all_input_nodes[0] if target_is(source, *_PADS) else source


def _measured(group: Iterable[_Place]) -> list[_Place]:
    """Of tensors that share a range, those that count: what only clips of the group read is clipped by them."""
    members = list(group)
    sources = {place.source for place in members}

    def is_clipped_next(place: _Place) -> bool:
        users = place.call.users
        return bool(users) and all(target_is(user, *CLIPS) and user in sources for user in users)

    return [place for place in members if not is_clipped_next(place)] or members


def _layer_ranges(
    prepared: GraphModule, places: Sequence[_Place], ranges: Mapping[str, tuple[float, float]], *, symmetric: bool
) -> dict[int, Range]:
    """Observer -> the range that the model says the layers behind it shall read; what several say is joined."""
    observers = {place.call: place.observer for place in places}
    found: dict[int, Range] = {}
    for node in prepared.graph.nodes:
        layer = layer_of(node)
        if layer not in ranges or not is_gemm(node) or _input_of(node) not in observers:
            continue
        key = id(observers[_input_of(node)])
        joined = _join([Range(*ranges[layer]), *([found[key]] if key in found else [])], symmetric=symmetric)
        found[key] = joined
    return found


def _observe(
    prepared: GraphModule,
    run: CalibrationRun,
    inputs: tuple[TensorSpec, ...],
    names: _Names,
    wanted: set[str],
    known: _Known,
) -> None:
    """Run the samples, without observers, and add what they show to `known`."""
    import torch
    from torch.fx import Interpreter

    ranges = ActivationRanges(run.estimator, symmetric=known.symmetric, total=run.count)
    watched = {node: name for node, name in _observable(prepared, names).items() if name in wanted or _may_matter(node)}

    class Watcher(Interpreter):
        def run_node(self, n: Node) -> object:
            value: object = super().run_node(n)
            if n in watched and isinstance(value, torch.Tensor):
                ranges.update(watched[n], value.numpy())
            return value

        def call_module(self, target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            del target, kwargs
            return args[0]  # the observers, the only modules in the graph: nothing is to be seen there

    with torch.no_grad():
        watcher = Watcher(prepared)
        for sample in run.samples():
            watcher.run(*tensors(sample.inputs, inputs), enable_io_processing=False)
            ranges.next_sample()
    for finding in ranges.findings():
        if finding.where in wanted:
            run.on_finding(finding)
    for name, found in ranges.ranges().items():
        known[name] = found


def _observable(prepared: GraphModule, names: _Names) -> dict[Node, str]:
    """Float tensors that a sample changes and that are observed now, or next to an operator with an int8 kernel."""
    import torch

    near: dict[Node, None] = {}
    for node in prepared.graph.nodes:
        if target_is(node, *_QUANTIZABLE):
            near |= dict.fromkeys([node, *map(_before_observer, node.all_input_nodes)])
        elif node.op == "call_module":
            near[_before_observer(node)] = None
    found = {}
    for node in near:
        value = node.meta.get("val")
        is_real = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        if is_real and node.op in ("placeholder", "call_function"):
            found[node] = names.of(node)
    return found


def _before_observer(node: Node) -> Node:
    return node.all_input_nodes[0] if node.op == "call_module" else node


def _may_matter(node: Node) -> bool:
    """What only clips read is never quantized itself, unless the clip alone is exempt: that plan observes anew."""
    readers = [reader for user in node.users for reader in (user.users if user.op == "call_module" else (user,))]
    return not readers or not all(target_is(reader, *CLIPS) for reader in readers)


def _union(prepared: GraphModule, places: Iterable[_Place], known: _Known) -> Range:
    members = []
    for place in places:
        if place.source.op == "get_attr":
            value = attribute(prepared, place.source)
            members.append(Range(float(value.min()), float(value.max())))
        else:
            members.append(known[place.tensor])
    return _join(members, symmetric=known.symmetric)


def _join(ranges: Sequence[Range], *, symmetric: bool) -> Range:
    """The smallest range with zero in it that covers all of them."""
    low, high = min(0.0, *(r.min for r in ranges)), max(0.0, *(r.max for r in ranges))
    bound = max(-low, high)
    return Range(-bound, bound) if symmetric else Range(low, high)


def _set(observer: torch.nn.Module, found: Range, scheme: Scheme) -> None:
    """int8 affine: scale = (max - min) / 255, zero point = -128 - min / scale; symmetric: max / 127 and 0.

    A power-of-two scale is the next larger one.
    """
    import torch

    symmetric = scheme.activation_symmetric
    scale = max(found.max / 127 if symmetric else (found.max - found.min) / 255, _SMALLEST_SCALE)
    if scheme.scale == "power-of-two":
        scale = 2.0 ** np.ceil(np.log2(scale))
    scale = float(np.float32(scale))
    zero_point = 0 if symmetric else int(np.clip(round(-128 - found.min / scale), -128, 127))
    observer.scale = torch.tensor([scale], dtype=torch.float32)
    observer.zero_point = torch.tensor([zero_point], dtype=torch.int32)
