"""What can be removed from a network, each group proven by removing some of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from edgeopt.compression.pruning.blocks import find_blocks
from edgeopt.compression.pruning.check import Proof
from edgeopt.compression.pruning.cuts import in_width
from edgeopt.compression.pruning.dependencies import Uneven, channel_groups
from edgeopt.compression.pruning.groups import Kept, Prunable, PruningGroup
from edgeopt.compression.pruning.heads import find_heads
from edgeopt.errors import ConversionError
from edgeopt.layer_names import check_patterns, layer_is_exempt, strip_wrapper
from edgeopt.types import Model

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["channels", "heads", "blocks"]


def analyse(model: Model, remove: Collection[Kind], protect: Sequence[str]) -> Prunable:
    """Find what can go, in a few seconds for a network of some hundred layers.

    Args:
        model: with a torch module.
        remove: what kinds of units to look for.
        protect: shell patterns of layers, by their paths in the user's own module, whose outputs keep their width; they
            may still lose inputs. A block that a pattern matches, or that holds such a layer, stays.

    Raises:
        UsageError: a pattern of `protect` matches no layer.
        ConversionError: the network can't be traced, does not run, or is an exported graph without layers.
    """
    if model.module is None:
        raise ValueError("pruning takes a model with a torch module; see sources.as_torch")
    layers = {strip_wrapper(path) for path, _ in model.module.named_modules()} - {""}
    check_patterns(layers, protect, "protect")
    _refuse_graphs(model.module)
    proof = Proof(model)
    heads = find_heads(model, proof)
    reasons = {**dict.fromkeys(heads.layers, "makes queries, keys or values: only whole heads can go"), **heads.refused}
    found = _unprotected(heads.groups, protect, reasons) if "heads" in remove else []
    if "channels" in remove:
        found += _channels(model, heads.layers, protect, reasons)
    proven, objections = proof.proven(found)
    for group in found:
        if group.name in objections:
            _explain(group, objections[group.name], reasons)
    if "blocks" in remove:
        proven += [block for block in find_blocks(model, proof) if not _holds_protected(model.module, block, protect)]
    order = {path: place for place, (path, _) in enumerate(model.module.named_modules())}
    proven.sort(key=lambda group: (group.kind == "blocks", order.get(group.name, 0)))
    return Prunable(tuple(proven), tuple(_kept(model.module, proven, reasons, remove)))


def _channels(
    model: Model, attentions: Collection[str], protect: Sequence[str], reasons: dict[str, str]
) -> list[PruningGroup]:
    candidates = []
    for group in channel_groups(model):
        if isinstance(group, Uneven):
            reasons.setdefault(group.layer, group.reason)
        elif not any(part.side == "out" and part.layer in attentions for part in group.slices):
            if not any(part.side == "in" for part in group.slices):
                _explain(group, "no layer reads its channels: they are outputs of the model", reasons)
            elif group.units == 1:
                _explain(group, "all its channels can only go together", reasons)
            else:
                candidates.append(group)
    return _unprotected(candidates, protect, reasons)


def _unprotected(groups: Iterable[PruningGroup], protect: Sequence[str], reasons: dict[str, str]) -> list[PruningGroup]:
    free = []
    for group in groups:
        guarded = [part.layer for part in group.slices if part.side == "out" and layer_is_exempt(part.layer, protect)]
        if guarded:
            _explain(group, f"shares its width with {strip_wrapper(guarded[0])!r}, which is protected", reasons)
            reasons.update(dict.fromkeys(guarded, "is protected"))
        else:
            free.append(group)
    return free


def _explain(group: PruningGroup, reason: str, reasons: dict[str, str]) -> None:
    reasons.update((part.layer, reason) for part in group.slices if part.side == "out")


def _holds_protected(module: nn.Module, block: PruningGroup, protect: Sequence[str]) -> bool:
    inside = module.get_submodule(block.name).named_modules(prefix=block.name)
    return any(layer_is_exempt(path, protect) for path, _ in inside)


def _kept(
    module: nn.Module, groups: Iterable[PruningGroup], reasons: Mapping[str, str], remove: Collection[Kind]
) -> Iterable[Kept]:
    """Layers with a weight matrix that no group makes narrower."""
    from torch import nn

    narrowed = {part.layer for group in groups for part in group.slices if part.side == "out"}
    fixed = [path for path, part in module.named_modules() if isinstance(part, nn.MultiheadAttention)]
    for path, part in module.named_modules():
        if not path or path in narrowed or not any(own.ndim > 1 for own in part.parameters(recurse=False)):
            continue
        if any(path == attention or path.startswith(f"{attention}.") for attention in fixed):
            default = "torch's MultiheadAttention ties the width of its heads to that of its input"
        elif "channels" not in remove and in_width(part) is not None:
            default = "channels are not to be removed"
        else:
            default = "is not reached from the outputs, or is no layer whose width can change"
        yield Kept(path, reasons.get(path, default))


def _refuse_graphs(module: nn.Module) -> None:
    from torch.fx import GraphModule

    for path, part in module.named_modules():
        if isinstance(part, GraphModule) and not any(node.op == "call_module" for node in part.graph.nodes):
            raise ConversionError(
                "an exported graph has no layers whose width could change",
                where=f"layer {strip_wrapper(path)!r}" if strip_wrapper(path) else "prune",
                fix="give the model as a Python factory",
            )
