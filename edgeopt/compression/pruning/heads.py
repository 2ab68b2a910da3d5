"""Attention heads: found by the numbers that modules keep about them, proven by removing some."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.compression.layers import arguments_of
from edgeopt.compression.pruning.check import Proof
from edgeopt.compression.pruning.cuts import in_width, is_matrix_first, out_width
from edgeopt.compression.pruning.groups import Attribute, Indices, PruningGroup, Slice
from edgeopt.compression.pruning.multihead import multihead_groups
from edgeopt.compression.pruning.removal import parameter_axis
from edgeopt.types import Model

if TYPE_CHECKING:
    from torch import nn

#: What modules, and the configurations that they hold, call the number of their (query) heads ...
_COUNTS = frozenset({
    "num_heads", "n_heads", "n_head", "nheads", "nhead", "heads", "h", "num_head", "num_attention_heads", "num_q_heads",
    "num_query_heads", "encoder_attention_heads", "decoder_attention_heads",
})  # fmt: skip
#: ... of their key and value heads, and of query heads for each of these ...
_SHARED_COUNTS = frozenset({
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "num_k_heads",
})  # fmt: skip
_REPEATS = frozenset({"num_key_value_groups", "n_rep", "num_queries_per_kv", "kv_repeats"})
#: ... the width of one head ...
_WIDTHS = frozenset({
    "head_dim", "attention_head_size", "dim_head", "d_head", "head_size", "d_kv", "key_value_proj_dim",
})  # fmt: skip
#: ... and of all heads together.
_TOTALS = frozenset({
    "embed_dim", "all_head_size", "inner_dim", "split_size", "hidden_size", "dim", "d_model", "n_embd", "attn_dim",
    "q_size", "query_dim", "width", "total_head_dim",
})  # fmt: skip


#: Linear layers of an attention that has a module of its own, and of a block that is written out in one module.
_ATTENTION_LAYERS, _MOST_LAYERS = 5, 12


@dataclass(frozen=True, slots=True)
class Attention:
    """Layers that make queries, keys and values, and the one that takes all heads' outputs in.

    Attributes:
        owner: path of the module whose numbers tell about the heads.
        projections: layer -> its output channels, in execution order.
        output: the layer behind the heads.
        width: of its input: of all heads together.
    """

    owner: str
    projections: Mapping[str, int]
    output: str
    width: int


@dataclass(frozen=True, slots=True)
class Heads:
    """What was found.

    Attributes:
        groups: proven.
        refused: why the heads of other attentions stay, by their layers.
        layers: all that make queries, keys and values, whose channels can't go one by one.
    """

    groups: tuple[PruningGroup, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    layers: frozenset[str] = frozenset()


def find_heads(model: Model, proof: Proof) -> Heads:
    """All attentions of a network whose heads can go.

    Torch's own `MultiheadAttention` tells what it is made of. Layouts that are tried elsewhere: queries, keys and
    values in layers of their own, in one layer side by side or head by head, and fewer keys and values than queries
    (Ainslie et al. 2023).
    """
    from torch import nn

    module = model.module
    assert module is not None
    found: list[PruningGroup] = []
    refused: dict[str, str] = {}
    kinds: dict[tuple[object, ...], list[list[PruningGroup]]] = defaultdict(list)
    layers: set[str] = set()
    for readings in _attentions(model, module):
        first = readings[0]
        candidates = [group for reading in readings for group in _candidates(module, reading)]
        if candidates:
            owner = type(module.get_submodule(first.owner))
            kinds[owner, len(candidates), tuple(first.projections.values()), first.width].append(candidates)
        else:
            layers.update(first.projections)
            reason = "attention: it has one head, or a number of them that is not known"
            refused.update(dict.fromkeys(first.projections, reason))
    for path, group in multihead_groups(module):
        if isinstance(group, PruningGroup):
            kinds[nn.MultiheadAttention, group.units, group.width].append([group])
        else:
            refused[path] = group
    for sites in kinds.values():
        passed, reasons = _proven_alike(sites, proof)
        found += passed
        refused.update(reasons)
    layers.update(refused, (part.layer for group in found for part in group.slices if part.side == "out"))
    return Heads(tuple(found), refused, frozenset(layers))


def _proven_alike(sites: Sequence[list[PruningGroup]], proof: Proof) -> tuple[list[PruningGroup], dict[str, str]]:
    """One candidate of each site, and why other sites have none; what one proves is tried on the rest at once."""
    found: list[PruningGroup] = []
    refused: list[tuple[list[PruningGroup], str]] = []
    while sites:
        first, *sites = sites
        reason: str | None = None
        for index, candidate in enumerate(first):
            if (reason := proof.objection([candidate])) is None:
                alike, _ = proof.proven([site[index] for site in sites])
                found += [candidate, *alike]
                sites = [site for site in sites if site[index] not in alike]
                break
        if reason is not None:
            refused.append((first, reason))
    joined, reasons = _proven_together(refused, proof)
    return found + joined, reasons


def _proven_together(
    refused: Sequence[tuple[list[PruningGroup], str]], proof: Proof
) -> tuple[list[PruningGroup], dict[str, str]]:
    """Sites of one stack of layers as one group, where they can't lose heads alone: in T5 the first layer makes the
    position bias of every head of every layer, so that a head goes from all layers or from none."""
    stacks: dict[str, list[tuple[list[PruningGroup], str]]] = defaultdict(list)
    for candidates, reason in refused:
        stacks[re.sub(r"\d+", "*", candidates[0].name)].append((candidates, reason))
    found: list[PruningGroup] = []
    reasons: dict[str, str] = {}
    for stack in stacks.values():
        joined = (_joined(alike) for alike in zip(*(candidates for candidates, _ in stack), strict=True))
        proven = next((group for group in joined if len(stack) > 1 and proof.objection([group]) is None), None)
        if proven is not None:
            found.append(proven)
            continue
        for (first, *_), reason in stack:
            makers = [part.layer for part in first.slices if part.side == "out"]
            reasons.update(dict.fromkeys(makers, f"attention: {reason}"))
    return found, reasons


def _joined(groups: Sequence[PruningGroup]) -> PruningGroup:
    slices = tuple(part for group in groups for part in group.slices)
    return replace(groups[0], slices=slices, attributes=tuple(a for group in groups for a in group.attributes))


def _attentions(model: Model, module: nn.Module) -> Iterator[list[Attention]]:
    """Modules with numbers of heads, innermost first, and the linear layers that run in and right after them: for each
    the ways to read it, the one with most layers that make queries, keys and values first."""
    from torch import nn

    from edgeopt.sources.structure import PrunedMultiheadAttention

    # What holds one of these only tells how many heads that one has.
    others = (nn.MultiheadAttention, PrunedMultiheadAttention)
    parts = dict(module.named_modules())
    order = _linear_layers_in_order(model, module)
    used: set[str] = set()
    for path in sorted(parts, key=lambda path: -path.count(".")):
        if not _head_counts(parts[path]) or any(isinstance(part, others) for part in list(parts[path].modules())[1:]):
            continue
        inside = [layer for layer in order if layer.startswith(f"{path}.") and layer not in used]
        if not 1 <= len(inside) <= _MOST_LAYERS:
            continue
        readings = []
        for makers, output in _splits(order, inside):
            projections = {layer: _out(parts[layer]) for layer in makers}
            width = in_width(parts[output])
            if len(inside) > _ATTENTION_LAYERS and not _returns_to_its_input([parts[m] for m in makers], parts[output]):
                continue
            if projections and width is not None and _fits(list(projections.values()), width):
                readings.append(Attention(path, projections, output, width))
        if readings:
            used.update(inside)
            yield sorted(readings, key=lambda reading: -len(reading.projections))


def _splits(order: Sequence[str], inside: Sequence[str]) -> Iterator[tuple[Sequence[str], str]]:
    """Layers that may make queries, keys and values, and the one that may take the heads' outputs in: the last in the
    module, or the next after it; in a block that is written out in one module, any few in a row."""
    if len(inside) > _ATTENTION_LAYERS:
        for start in range(len(inside)):
            for length in (3, 1):
                if start + length < len(inside):
                    yield inside[start : start + length], inside[start + length]
        return
    if len(inside) > 1:
        yield inside[:-1], inside[-1]
    following = order.index(inside[-1]) + 1
    if following < len(order):
        yield inside, order[following]


def _returns_to_its_input(makers: Sequence[nn.Module], output: nn.Module) -> bool:
    """Whether these layers read one width and the output gives it back, as in a residual block; others in a row, such
    as those of two feed-forward parts, do not."""
    return {in_width(maker) for maker in makers} == {out_width(output)}


def _fits(widths: Sequence[int], total: int) -> bool:
    """Whether layers of these widths can hold `total` channels of queries, and keys and values."""
    return sum(widths) > total and max(widths) >= total and len(widths) <= 3


def _head_counts(part: nn.Module) -> list[int]:
    """Numbers of heads that a module or its configuration tells, the largest first."""
    holders = (vars(part), getattr(getattr(part, "config", None), "__dict__", {}))
    own = {value for name, value in vars(part).items() if name in _COUNTS | _WIDTHS and _is_count(value)}
    if not own:
        return []
    counts = {value for holder in holders for name, value in holder.items() if name in _COUNTS and _is_count(value)}
    return sorted(counts, reverse=True) or [1]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _candidates(module: nn.Module, site: Attention) -> Iterator[PruningGroup]:
    """Ways in which the channels may belong to heads, the likeliest first."""
    owner = module.get_submodule(site.owner)
    counts = _head_counts(owner)
    widths = {value for name, value in vars(owner).items() if name in _WIDTHS and _is_count(value)}
    counts += [site.width // width for width in widths if site.width % width == 0]
    for heads in dict.fromkeys(count for count in counts if count > 1 and site.width % count == 0):
        for units, layout in _layouts(site, heads):
            if units < 2:
                continue
            slices = [Slice(layer, "out", indices) for layer, indices in layout.items()]
            slices.append(Slice(site.output, "in", _by_head(site.width, units)))
            slices += _per_head(module, site, heads, units)
            for attributes in _attributes(module, site, heads, units):
                width = layout[next(iter(layout))].shape[1]
                name = next(iter(site.projections))
                yield PruningGroup(name, "heads", units, width, tuple(slices), attributes)


def _layouts(site: Attention, heads: int) -> Iterator[tuple[int, dict[str, Indices]]]:
    """Units and each projection's channels of each of them."""
    total, size = site.width, site.width // heads
    narrow = min(site.projections.values())
    if narrow < total and narrow % size == 0:
        shared = narrow // size
        if shared > 1 and any(width % shared for width in site.projections.values()):
            return
        if shared > 1:
            yield shared, {layer: _by_head(width, shared) for layer, width in site.projections.items()}
        else:
            wide = {layer: width for layer, width in site.projections.items() if width == total}
            yield heads, {layer: _by_head(width, heads) for layer, width in wide.items()}
        return
    if len(site.projections) == 1:
        ((layer, width),) = site.projections.items()
        rest = width - total
        if rest < 2 * total and rest % (2 * size) == 0 and rest > 0 and heads % (rest // (2 * size)) == 0:
            shared = rest // (2 * size)
            queries, keys, values = _by_head(total, shared), _by_head(rest // 2, shared), _by_head(rest // 2, shared)
            yield shared, {layer: np.concatenate([queries, keys + total, values + total + rest // 2], axis=1)}
            return
    if all(width % heads == 0 for width in site.projections.values()):
        yield heads, {layer: _side_by_side(width, total, heads) for layer, width in site.projections.items()}
        if any(width != total for width in site.projections.values()):
            yield heads, {layer: _by_head(width, heads) for layer, width in site.projections.items()}


def _per_head(module: nn.Module, site: Attention, heads: int, units: int) -> Iterator[Slice]:
    """Tables with a value per head: relative position biases, temperatures."""
    owner = module.get_submodule(site.owner)
    for path, part in owner.named_modules(prefix=site.owner):
        if out_width(part) == heads and in_width(part) is None:
            yield Slice(path, "out", _by_head(heads, units))
        elif out_width(part) is None:
            for name, tensor in part.named_parameters(recurse=False):
                if any(size > 1 for size in tensor.shape) and tensor.shape[parameter_axis(tensor)] == heads:
                    yield Slice(path, "out", _by_head(heads, units), name)


def _by_head(width: int, heads: int) -> Indices:
    """(heads, width / heads): all channels of a head lie next to one another."""
    return np.arange(width, dtype=np.int64).reshape(heads, -1)


def _side_by_side(width: int, total: int, heads: int) -> Indices:
    """Queries of all heads, then keys, then values."""
    if width % total:
        return _by_head(width, heads)
    return np.arange(width, dtype=np.int64).reshape(width // total, heads, -1).swapaxes(0, 1).reshape(heads, -1)


def _attributes(module: nn.Module, site: Attention, heads: int, units: int) -> Iterator[tuple[Attribute, ...]]:
    """Numbers that may have to follow, in and below the module that owns the heads: all, then fewer of them."""
    counts: list[Attribute] = []
    totals: list[Attribute] = []
    owner = module.get_submodule(site.owner)
    for path, part in owner.named_modules(prefix=site.owner):
        if out_width(part) is not None:
            continue
        for name, value in sorted(vars(part).items()):
            if not _is_count(value) and value != 1:
                continue
            if name in _COUNTS and value == heads:
                counts.append(Attribute(path, name, heads // units))
            elif (name in _SHARED_COUNTS and value == units) or (name in _REPEATS and value == heads == units):
                counts.append(Attribute(path, name, 1))
            elif name in _TOTALS and value == site.width:
                totals.append(Attribute(path, name, site.width // units))
    yield from dict.fromkeys(((*counts, *totals), tuple(counts), tuple(totals), ()))


def _linear_layers_in_order(model: Model, module: nn.Module) -> list[str]:
    """Paths of linear layers in the order of their first calls."""
    import torch
    from torch import nn

    order: dict[str, None] = {}
    names = {
        part: path for path, part in module.named_modules() if isinstance(part, nn.Linear) or is_matrix_first(part)
    }

    def note(part: nn.Module, arguments: object) -> None:
        del arguments
        order.setdefault(names[part])

    hooks = [part.register_forward_pre_hook(note) for part in names]
    try:
        with torch.no_grad():
            module(*arguments_of(model.inputs, model.example_inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def _out(layer: nn.Module) -> int:
    width = out_width(layer)
    assert width is not None
    return width
