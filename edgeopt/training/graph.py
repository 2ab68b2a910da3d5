"""The operators that a network runs for one sample, and which of them read what: the basis of the simulation's plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgeopt.training.sites import Operator, Scopes, Site, SiteMode, operator_name

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
TRANSPOSED_CONVOLUTIONS = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
PRODUCTS = frozenset({"linear", "addmm", "matmul"})
CLIPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
#: Which argument is the weight, by position and keyword.
_WEIGHT = {"addmm": (2, "mat2"), "matmul": (1, "other"), "embedding": (1, "weight")}


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator call.

    Attributes:
        site: None where the operator is not tracked.
        layer: path of the layer that it belongs to: the owner of its weight, else the calling module.
        inputs: for each tensor among its arguments, in order, the value that it is; None for constants.
        outputs: the values that it makes.
        weight: which tensor is a constant weight, and the path of that parameter (empty if it is computed from some).
        bounds: of a clip by constants.
        factor: of a product or quotient with a Python number.
        rank: of the first output.
        is_spatial_mean: it averages height and width of a 4-D tensor away.
        keeps_dims: the averaged dimensions stay, with size 1.
        elements: number of values of the weight.
    """

    site: Site | None
    operator: str
    layer: str
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    weight: tuple[int, str] | None
    bounds: tuple[float, float] | None
    factor: float | None
    rank: int
    is_spatial_mean: bool
    keeps_dims: bool
    elements: int


@dataclass(frozen=True, slots=True)
class Graph:
    """Operations in the order in which they ran.

    Attributes:
        results: the values that the network returns.
        floats: those of a floating-point type.
    """

    operations: tuple[Operation, ...]
    results: frozenset[int]
    floats: frozenset[int]

    def readers(self) -> dict[int, list[int]]:
        """Value -> the operations that read it, by index."""
        found: dict[int, list[int]] = {}
        for index, operation in enumerate(self.operations):
            for value in dict.fromkeys(v for v in operation.inputs if v is not None):
                found.setdefault(value, []).append(index)
        return found


def record(network: nn.Module, scopes: Scopes, arguments: Sequence[Tensor], composites: frozenset[str]) -> Graph:
    """Run the network once, as it is (call it in eval mode), and write down what it did."""
    recorder = _Recorder(network, scopes, composites)
    for tensor in arguments:
        recorder.value_of(tensor)
    scopes.restart()
    with torch.no_grad(), recorder:
        outputs = network(*arguments)
    scopes.restart()
    results = {recorder.known(leaf) for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)}
    ends = frozenset(value for value in results if value is not None)
    return Graph(tuple(recorder.operations), ends, frozenset(recorder.floats))


def tensors_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments, in an order that is the same for every call of one site."""
    return list(_tensors((*args, *kwargs.values())))


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif type(values) in (list, tuple):
        assert isinstance(values, list | tuple)
        for value in values:
            yield from _tensors(value)


class _Recorder(SiteMode):
    def __init__(self, network: nn.Module, scopes: Scopes, composites: frozenset[str]) -> None:
        super().__init__(scopes, composites)
        self.operations: list[Operation] = []
        self._paths = {id(parameter): name for name, parameter in _state(network)}
        self._values: dict[int, int] = {}
        self._alive: list[Tensor] = []  # ids of tensors that are gone would be given out again
        self.floats: set[int] = set()
        self._count = 0

    def value_of(self, tensor: Tensor) -> int:
        """Make a new value of the tensor."""
        self._alive.append(tensor)
        self._values[id(tensor)] = self._count
        if tensor.is_floating_point():
            self.floats.add(self._count)
        self._count += 1
        return self._count - 1

    def known(self, tensor: Tensor) -> int | None:
        return self._values.get(id(tensor))

    def at_site(self, site: Site, function: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        return self._run(site, function, args, kwargs)

    def elsewhere(self, function: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        return self._run(None, function, args, kwargs)

    def _run(self, site: Site | None, function: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        tensors = tensors_of(args, kwargs)
        inputs = tuple(self.known(tensor) for tensor in tensors)
        result = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not made or all(value is None for value in inputs):
            return result
        operator = operator_name(function)
        if operator == "getitem" and made[0].dim() < tensors[0].dim():
            operator = "select"  # an integer index, which files have as a Gather
        weight, elements = self._weight(operator, args, kwargs, tensors)
        owner = weight[1].rpartition(".")[0] if weight is not None and weight[1] else ""
        layer = owner or (site.layer if site is not None else "")
        spatial, keeps = _mean_of(operator, args, kwargs, tensors[0])
        outputs = tuple(self.value_of(tensor) for tensor in made)
        self.operations.append(
            Operation(
                site, operator, layer, inputs, outputs, weight, _bounds(operator, args, kwargs),
                _factor(operator, args), made[0].dim(), spatial, keeps, elements,
            )
        )  # fmt: skip
        return result

    def _weight(
        self, operator: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]
    ) -> tuple[tuple[int, str] | None, int]:
        if operator not in CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | PRODUCTS | {"embedding"}:
            return None, 0
        position, keyword = _WEIGHT.get(operator, (1, "weight"))
        if operator == "embedding":
            weight = next((t for t in tensors if t.is_floating_point()), None)
        else:
            weight = args[position] if len(args) > position else kwargs.get(keyword)
        if not isinstance(weight, Tensor) or self.known(weight) is not None or weight.dim() < 2:
            return None, 0
        slot = next(index for index, tensor in enumerate(tensors) if tensor is weight)
        return (slot, self._paths.get(id(weight), "")), weight.numel()


def _state(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def _bounds(operator: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[float, float] | None:
    if operator == "relu":
        return 0.0, math.inf
    if operator == "relu6":
        return 0.0, 6.0
    if operator not in ("hardtanh", "clamp"):
        return None
    names = ("min_val", "max_val") if "min_val" in kwargs or "max_val" in kwargs else ("min", "max")
    defaults = (-1.0, 1.0) if operator == "hardtanh" else (None, None)
    given = [
        args[i + 1] if len(args) > i + 1 else kwargs.get(name, default)
        for i, (name, default) in enumerate(zip(names, defaults, strict=True))
    ]
    if any(isinstance(bound, Tensor) for bound in given):
        return None
    low, high = given
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


def _factor(operator: str, args: tuple[Any, ...]) -> float | None:
    if operator not in ("mul", "div") or len(args) < 2:
        return None
    number = next((a for a in args[:2] if isinstance(a, int | float) and not isinstance(a, bool)), None)
    if number is None or (operator == "div" and not isinstance(args[0], Tensor)):
        return None
    return float(number)


def _mean_of(operator: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Tensor) -> tuple[bool, bool]:
    """Whether it averages height and width of a 4-D tensor, and keeps these dimensions."""
    if values.dim() != 4:
        return False, False
    if operator == "adaptive_avg_pool2d":
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        return size in (1, (1, 1), [1, 1]), True
    if operator != "mean":
        return False, False
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    spatial = isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]
    return spatial, bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
