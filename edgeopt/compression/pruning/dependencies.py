"""Which channels must go together, by Torch-Pruning's dependency graph (Fang et al. 2023, *DepGraph*).

That graph is followed here rather than by its own groups: those keep one root channel per place, while channels that
meet in one place (both halves of a gated unit, all channels of one group of a convolution) must become one unit.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from edgeopt.compression.layers import arguments_of
from edgeopt.compression.pruning.cuts import in_width, is_matrix_first, out_width
from edgeopt.compression.pruning.groups import PruningGroup, Slice
from edgeopt.compression.pruning.tracing import traceable
from edgeopt.errors import ConversionError
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Model

if TYPE_CHECKING:
    import torch
    import torch_pruning as tp
    from torch import nn

_Handler = Callable[..., object]
_Index: TypeAlias = "tp._helpers._HybridIndex"
_Step: TypeAlias = "tuple[tp.dependency.Node, _Handler, list[_Index]]"
_Side = Literal["out", "in"]
#: A layer's side -> the sides of other layers whose weights are the same tensor, cut along the same dimension.
_Ties = Mapping["tuple[nn.Module, _Side]", "Sequence[tuple[nn.Module, _Side]]"]


@dataclass(frozen=True, slots=True)
class Uneven:
    """Channels of a layer that can't be told apart into units of one size."""

    layer: str
    reason: str


def channel_groups(model: Model) -> Iterator[PruningGroup | Uneven]:
    """Candidates, in execution order, each channel of a layer's output in at most one; none is proven yet.

    Raises ConversionError when the network can't be traced.
    """
    graph, order = _trace(model)
    ties, idle = _ties(graph)
    taken: dict[str, set[int]] = defaultdict(set)
    for path, layer in order.items():
        width = out_width(layer)
        if width is None or layer not in graph.module2node:
            continue
        left = [channel for channel in range(width) if channel not in taken[path]]
        if not left:
            continue
        reached = _Reached(graph, ties)
        reached.start(layer, left)
        group = reached.group(path)
        if isinstance(group, PruningGroup):
            group = replace(group, slices=(*group.slices, *_in_idle(group, idle)))
        for part in reached.slices:
            if part.side == "out" and not part.parameter:
                taken[part.layer].update(part.indices.reshape(-1).tolist())
        taken[path].update(left)
        yield group


class _Reached:
    """All places that the channels of one layer reach, and which of these channels must stay together."""

    def __init__(self, graph: tp.DependencyGraph, ties: _Ties) -> None:
        self._graph = graph
        self._ties = ties
        # Torch-Pruning's guesses at offsets can push indices further with every turn of a loop.
        self._limit = max(max(out_width(part) or 0, in_width(part) or 0) for part in graph.model.modules())
        self._parent: dict[int, int] = {}
        self._places: dict[tuple[tp.dependency.Node, _Handler], dict[int, int]] = defaultdict(dict)
        self.slices: list[Slice] = []

    def start(self, layer: nn.Module, channels: Sequence[int]) -> None:
        node = self._graph.module2node[layer]
        self._parent = {channel: channel for channel in channels}
        first = self._graph.get_pruner_of_module(layer).prune_out_channels
        waiting = [(node, first, [_index(channel, channel) for channel in channels])]
        while waiting:
            node, handler, arrived = waiting.pop()
            new = self._arrive(node, handler, arrived)
            if not new:
                continue
            waiting += self._partners(node, handler, new)
            for dependency in node.dependencies:
                if dependency.is_triggered_by(handler):
                    moved = new
                    for mapping in dependency.index_mapping:
                        moved = moved if mapping is None else mapping(moved)
                    waiting.append((dependency.target, dependency.handler, moved))

    def group(self, root: str) -> PruningGroup | Uneven:
        """What was found, as units in the order of their first channels. No other group begins at the same layer, so
        its path is a name that stays when channels go."""
        units: dict[int, int] = {}
        for channel in self._parent:
            units.setdefault(self._top(channel), len(units))
        for (node, handler), places in self._places.items():
            part = self._slice(node, handler, places, units)
            if isinstance(part, Uneven):
                return part
            if part is not None:
                self.slices.append(part)
        self.slices.sort(key=lambda part: part.layer != root or part.side != "out")
        own = self.slices[0].indices
        return PruningGroup(root, "channels", len(units), own.shape[1], tuple(self.slices))

    def _slice(
        self, node: tp.dependency.Node, handler: _Handler, places: Mapping[int, int], units: Mapping[int, int]
    ) -> Slice | Uneven | None:
        from torch import nn

        if not places:
            return None

        graph, module = self._graph, node.module
        parameter = ""
        side: _Side = "out"
        if isinstance(module, nn.Parameter):
            layer, _, parameter = graph._param_to_name[module].rpartition(".")
        elif out_width(module) is None or module not in graph._module2name:
            return None
        else:
            layer = graph._module2name[module]
            if in_width(module) is not None and handler == graph.get_pruner_of_module(module).prune_in_channels:
                side = "in"
            elif _groups(module) > 1 and handler != graph.get_pruner_of_module(module).prune_out_channels:
                return None
        channels: list[list[int]] = [[] for _ in units]
        for place in sorted(places):
            channels[units[self._top(places[place])]].append(place)
        if len({len(unit) for unit in channels}) != 1:
            return Uneven(layer, f"its channels don't share out evenly over layer {strip_wrapper(layer)!r}")
        return Slice(layer, side, np.array(channels, dtype=np.int64), parameter)

    def _arrive(self, node: tp.dependency.Node, handler: _Handler, arrived: Sequence[_Index]) -> list[_Index]:
        """Those that were not there before; a channel in a place where another is already stays with that one."""
        places = self._places[node, handler]
        new = []
        for index in arrived:
            if index.root_idx is None or not 0 <= index.idx < self._limit:
                continue
            if index.idx in places:
                self._parent[self._top(index.root_idx)] = self._top(places[index.idx])
            else:
                places[index.idx] = index.root_idx
                new.append(index)
        return new

    def _partners(self, node: tp.dependency.Node, handler: _Handler, new: Sequence[_Index]) -> list[_Step]:
        """Places that go with these because of what the layer is: the rest of their group, the other direction, the
        same of another layer's weight that is the same tensor."""
        from torch import nn

        module, pruner = node.module, self._graph.get_pruner_of_module(node.module)
        steps: list[_Step] = []
        side: _Side = "in" if in_width(module) is not None and handler == pruner.prune_in_channels else "out"
        for other, other_side in self._ties.get((module, side), ()):
            partner = self._graph.get_pruner_of_module(other)
            function = partner.prune_in_channels if other_side == "in" else partner.prune_out_channels
            steps.append((self._graph.module2node[other], function, list(new)))
        match module:
            case nn.RNNBase() if module.bidirectional and side == "out":
                hidden = module.hidden_size
                moved = [_index((index.idx + hidden) % (2 * hidden), index.root_idx) for index in new]
                steps.append((node, handler, moved))
            case nn.GroupNorm() if 1 < module.num_groups < module.num_channels:
                width = module.num_channels // module.num_groups
                whole = module.num_groups >= width
                moved = _same_block(new, width) if whole else _same_position(new, width, module.num_channels)
                steps.append((node, handler, moved))
            case _ if _groups(module) > 1 and pruner.prune_in_channels != pruner.prune_out_channels:
                here = module.in_channels if handler == pruner.prune_in_channels else module.out_channels
                groups = [_index(index.idx * module.groups // here, index.root_idx) for index in new]
                for function, width in (
                    (pruner.prune_in_channels, module.in_channels),
                    (pruner.prune_out_channels, module.out_channels),
                ):
                    size = width // module.groups
                    moved = [_index(group.idx * size + k, group.root_idx) for group in groups for k in range(size)]
                    steps.append((node, function, moved))
        return steps

    def _top(self, channel: int) -> int:
        while self._parent[channel] != channel:
            self._parent[channel] = self._parent[self._parent[channel]]
            channel = self._parent[channel]
        return channel


def _ties(graph: tp.DependencyGraph) -> tuple[_Ties, Mapping[str, Sequence[tuple[str, _Side]]]]:
    """Layers with the same weight: those that run, and by the path of one that runs, those that never do."""
    from torch import nn

    sides: dict[int, list[tuple[str, nn.Module, _Side]]] = defaultdict(list)
    for path, part in graph.model.named_modules():
        weight = part._parameters.get("weight")
        if weight is not None and isinstance(part, nn.Linear | nn.Embedding):
            sides[id(weight)].append((path, part, "in" if isinstance(part, nn.Linear) else "out"))
    ties: dict[tuple[nn.Module, _Side], list[tuple[nn.Module, _Side]]] = defaultdict(list)
    idle: dict[str, list[tuple[str, _Side]]] = defaultdict(list)
    for owners in sides.values():
        running = [owner for owner in owners if owner[1] in graph.module2node]
        for _, part, side in running:
            ties[part, side] += [(other, its) for _, other, its in running if other is not part]
        for path, part, side in owners:
            if running and part not in graph.module2node:
                idle[running[0][0]].append((path, side))
    return ties, idle


def _in_idle(group: PruningGroup, idle: Mapping[str, Sequence[tuple[str, _Side]]]) -> Iterator[Slice]:
    """The same cuts in layers that never run but share the weight of one that does."""
    for part in group.slices:
        for path, side in idle.get(part.layer, ()):
            yield Slice(path, side, part.indices)


def _groups(module: nn.Module) -> int:
    from torch.nn.modules.conv import _ConvNd

    return module.groups if isinstance(module, _ConvNd) else 1


def _index(place: int, root: int) -> _Index:
    """Torch-Pruning's pair of a place and the channel of the first layer that it belongs to."""
    from torch_pruning._helpers import _HybridIndex

    return _HybridIndex(place, root)


def _same_block(indices: Sequence[_Index], width: int) -> list[_Index]:
    """All places of the blocks of this width that these lie in."""
    return [_index(index.idx // width * width + k, index.root_idx) for index in indices for k in range(width)]


def _same_position(indices: Sequence[_Index], width: int, total: int) -> list[_Index]:
    """The same places of all blocks of this width."""
    return [_index(k, index.root_idx) for index in indices for k in range(index.idx % width, total, width)]


def _trace(model: Model) -> tuple[tp.DependencyGraph, dict[str, nn.Module]]:
    """Torch-Pruning's graph of a copy of the network, and the copy's layers in the order of their first calls."""
    import torch
    import torch_pruning as tp
    from torch.utils._pytree import tree_leaves

    assert model.module is not None
    traced = traceable(model.module)
    names = {part: path for path, part in traced.named_modules()}
    order: dict[str, nn.Module] = {}

    def note(part: nn.Module, arguments: object) -> None:
        del arguments
        order.setdefault(names[part], part)

    def outputs(result: object) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]

    hooks = [part.register_forward_pre_hook(note) for part in names if out_width(part) is not None]
    arguments = arguments_of(model.inputs, model.example_inputs)
    graph = tp.DependencyGraph()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph.build_dependency(
                traced,
                arguments,
                forward_fn=lambda net, tensors: net(*tensors),
                output_transform=outputs,
                customized_pruners=_more_pruners(traced),
                verbose=False,
            )
    except Exception as error:
        # Torch-Pruning lets anything through that the user's forward or its own heuristics raise.
        last = strip_wrapper(next(reversed(order), ""))
        raise ConversionError(
            f"its dependencies can't be traced: {type(error).__name__}: {' '.join(str(error).split())[:160]}",
            where=f"layer {last!r}" if last else model.name,
            fix="leave structured pruning out for this model",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return graph, order


class _Widths:
    """What Torch-Pruning wants to know about a kind of layer that it does not know, or not right.

    Its functions that prune only tell the layer's sides apart here: `removal` does the work, and nobody calls them.
    """

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError

    def get_out_channels(self, layer: nn.Module) -> int | None:
        return out_width(layer)

    def get_in_channels(self, layer: nn.Module) -> int | None:
        return in_width(layer)


def _more_pruners(module: nn.Module) -> dict[type[nn.Module], _Widths]:
    from torch import nn

    return {type(part): _Widths() for part in module.modules() if isinstance(part, nn.RNNBase) or is_matrix_first(part)}
