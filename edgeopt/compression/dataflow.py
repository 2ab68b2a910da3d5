"""What reads what: the weights of a network as one system in which channels can be rescaled.

`follow` gives every editable operator and, for each of its weights, the class of the channel that it writes and of
the one that it reads. With a factor s per class,

    weight / s[class it writes] * s[class it reads],  bias / s[class it writes]

is the same function in exact arithmetic (Nagel et al. 2019, section 4.1, for any graph): s = 1 for class 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from edgeopt.compression.channels import Channels
from edgeopt.compression.graph import Graph, Operator, capture
from edgeopt.compression.surgery import Surgery
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Array, Model


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

    def rescaled_inputs(self, factors: Array) -> list[str]:
        """Names of the weights whose operator reads other values than before."""
        return [name for name, classes in self.reads.items() if (factors[classes] != 1).any()]


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


def ranges_without(
    ranges: Mapping[str, tuple[float, float]], weights: Iterable[str]
) -> Mapping[str, tuple[float, float]]:
    """`Model.input_ranges` less those of the layers with these weights, whose inputs a pass has moved."""
    moved = {strip_wrapper(name.rpartition(".")[0]) for name in weights}
    return {layer: bounds for layer, bounds in ranges.items() if strip_wrapper(layer) not in moved}
