"""What reads what: the weights of a network as one system in which channels can be rescaled.

`follow` gives every editable operator and, for each of its weights, the class of the channel that it writes and of
the one that it reads. With a factor s per class,

    weight / s[class it writes] * s[class it reads],  bias / s[class it writes]

is the same function in exact arithmetic (Nagel et al. 2019, section 4.1, for any graph): s = 1 for class 0.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.compression.channels import Channels
from edgeopt.compression.graph import Graph, Operator, capture
from edgeopt.types import Array, Model

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Family:
    """Classes that the same operators write and the same operators read, such as the channels of one activation.

    Attributes:
        classes: sorted ids, none of them 0.
        producers, consumers: names of the weights that write and read them.
    """

    classes: Array
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dataflow:
    """A followed network.

    Attributes:
        graph: where it comes from.
        operators: by the name of their weight, in execution order.
        reads, writes: per weight name the class of each input and output channel.
        wrote: as `writes`, before classes were joined: a label of its own for each channel.
        read: as `reads`, in the labels of `wrote`.
        labels: bound of all ids, of classes and of labels.
    """

    graph: Graph
    operators: Mapping[str, Operator]
    reads: Mapping[str, Array]
    writes: Mapping[str, Array]
    wrote: Mapping[str, Array]
    read: Mapping[str, Array]
    labels: int

    def families(self) -> list[Family]:
        """All channels that can be scaled and have both writers and readers, in execution order."""
        producers: dict[int, set[str]] = defaultdict(set)
        consumers: dict[int, set[str]] = defaultdict(set)
        for members, classes in ((producers, self.writes), (consumers, self.reads)):
            for name, own in classes.items():
                for class_ in np.unique(own[own > 0]).tolist():
                    members[class_].add(name)
        families: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = defaultdict(list)
        for class_ in sorted(producers.keys() & consumers.keys()):
            families[tuple(sorted(producers[class_])), tuple(sorted(consumers[class_]))].append(class_)
        return [Family(np.array(classes), *members) for members, classes in families.items()]

    def scaled(self, name: str, weight: Array, factors: Array) -> Array:
        """An operator's weight under a factor per class."""
        operator = self.operators[name]
        scaled: Array = weight / factors[self.writes[name]][operator.out_index]
        if operator.in_index is not None:
            scaled = scaled * factors[self.reads[name]][operator.in_index]
        return scaled

    def rescale(self, surgery: Surgery, factors: Array) -> None:
        """Edit all weights and biases."""
        for name, operator in self.operators.items():
            surgery.set(name, self.scaled(name, surgery.get(name), factors))
            if operator.bias is not None:
                bias = surgery.get(operator.bias)
                surgery.set(operator.bias, bias / factors[self.writes[name]].reshape(bias.shape))


def follow(model: Model) -> Dataflow:
    """Capture a model's module and follow its channels.

    Raises:
        ConversionError: torch.export can't follow the module.
    """
    graph = capture(model)
    channels = Channels(graph)
    root = channels.classes()
    operators = {operator.weight: operator for operator in graph.operators.values()}
    wrote = {name: channels.outputs[operator.node] for name, operator in operators.items()}
    read = {name: channels.inputs[operator.node] for name, operator in operators.items() if operator.kind != "affine"}
    return Dataflow(
        graph=graph,
        operators=operators,
        reads={name: root[labels] for name, labels in read.items()},
        writes={name: root[labels] for name, labels in wrote.items()},
        wrote=wrote,
        read=read,
        labels=channels.count,
    )


class Surgery:
    """A copy of a module whose parameters are edited in place, so that all its layers keep their names."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = copy.deepcopy(module)

    def get(self, name: str) -> Array:
        """A parameter or buffer by its path, as float64."""
        values: Array = self._tensor(name).detach().cpu().double().numpy()
        return values

    def set(self, name: str, values: Array) -> None:
        """Write it, rounded to its own type."""
        import torch

        tensor = self._tensor(name)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)))

    def add_bias(self, operator: Operator, values: Array) -> str:
        """Give a layer the bias that it has a place for; `biasable` says which do. Returns the bias's name."""
        import torch

        owner = self.module.get_submodule(operator.weight.rpartition(".")[0])
        like = self._tensor(operator.weight)
        owner.bias = torch.nn.Parameter(torch.from_numpy(values).to(like.dtype), requires_grad=like.requires_grad)
        return f"{operator.weight.rpartition('.')[0]}.bias".lstrip(".")

    def _tensor(self, name: str) -> torch.Tensor:
        path, _, attribute = name.rpartition(".")
        tensor: torch.Tensor = getattr(self.module.get_submodule(path), attribute)
        return tensor


def biasable(model: Model, operators: Mapping[str, Operator]) -> frozenset[str]:
    """Names of the weights whose operator has no bias but whose module takes one.

    A module with a forward of its own may never look at its bias, so each gets a zero one and the network is captured
    again.
    """
    import torch
    from torch.nn.modules.conv import _ConvNd

    if model.module is None:
        raise ValueError("a pass takes a model with a torch module; see sources.as_torch")
    surgery = Surgery(model.module)
    stock, candidates = set(), {}
    for name, operator in operators.items():
        owner = surgery.module.get_submodule(name.rpartition(".")[0])
        if operator.bias is not None or operator.has_foreign_bias or not name.endswith("weight"):
            continue
        if isinstance(owner, _ConvNd | torch.nn.Linear) and owner.bias is None:
            candidates[name] = surgery.add_bias(operator, np.zeros(operator.out_channels))
            if type(owner).__module__.startswith("torch.nn.modules."):
                stock.add(name)
    if len(stock) == len(candidates):
        return frozenset(stock)
    found = {
        operator.weight: operator.bias for operator in capture(_with_module(model, surgery.module)).operators.values()
    }
    return frozenset(name for name, bias in candidates.items() if found.get(name) == bias)


def _with_module(model: Model, module: torch.nn.Module) -> Model:

    return replace(model, module=module)
