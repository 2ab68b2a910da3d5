"""Whole blocks that a pass-through can replace: residual ones, and those of a series of alike blocks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.compression.layers import arguments_of
from edgeopt.compression.pruning.check import Proof
from edgeopt.compression.pruning.groups import PruningGroup
from edgeopt.types import Model

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a module that may be a block: its first argument, what came back, and all arguments.

    `returns` and `handed` are those of `PruningGroup`.
    """

    input: torch.Tensor
    returns: int | None
    handed: tuple[int, ...]
    arguments: tuple[object, ...]
    keywords: dict[str, object]


def find_blocks(model: Model, proof: Proof) -> list[PruningGroup]:
    """Blocks without which the network still runs and has outputs of the same shape.

    A block's first input and output have the same shape, and either its output is its input where all its weights are
    zero (so that it adds to it), or it is one of a series of modules of one class of its own. Of nested ones the
    outermost counts, unless it is a stack of several.
    """
    module = model.module
    assert module is not None
    calls = _calls(model, module)
    series = _series(module)
    fitting = [path for path in calls if path in series or _adds(module.get_submodule(path), calls[path])]
    stacks = {
        path for path in fitting if sum(other.startswith(f"{path}.") for other in _outermost_below(path, fitting)) > 1
    }
    blocks = [path for path in fitting if path not in stacks]
    outermost = [path for path in blocks if not any(path.startswith(f"{other}.") for other in blocks)]
    groups = [PruningGroup(path, "blocks", 1, 1, (), (), calls[path].returns, calls[path].handed) for path in outermost]
    return proof.proven(groups)[0]


def _outermost_below(path: str, paths: list[str]) -> list[str]:
    below = [other for other in paths if other.startswith(f"{path}.")]
    return [other for other in below if not any(other.startswith(f"{between}.") for between in below)]


def _calls(model: Model, module: nn.Module) -> dict[str, _Call]:
    """Modules with children that are called once and whose output may stand for their input."""
    import torch

    counts: Counter[str] = Counter()
    calls: dict[str, _Call] = {}
    names = {part: path for path, part in module.named_modules() if path and next(part.parameters(), None) is not None}

    def note(part: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object], output: object) -> None:
        path = names[part]
        counts[path] += 1
        first = arguments[0] if arguments else next(iter(keywords.values()), None)
        given = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, torch.Tensor) or not isinstance(given, torch.Tensor):
            return
        rest = output[1:] if isinstance(output, tuple) else ()
        handed = _handed(rest, arguments)
        if first.shape != given.shape or first.dtype != given.dtype or handed is None:
            return
        returns = len(output) if isinstance(output, tuple) else None
        calls[path] = _Call(first, returns, handed, arguments, keywords)

    hooks = [
        part.register_forward_hook(note, with_kwargs=True) for part in names if next(part.children(), None) is not None
    ]
    try:
        with torch.no_grad():
            module(*arguments_of(model.inputs, model.example_inputs))
    finally:
        for hook in hooks:
            hook.remove()
    order = [path for path in names.values() if path in calls]
    return {path: calls[path] for path in order if counts[path] == 1}


def _handed(rest: Sequence[object], arguments: Sequence[object]) -> tuple[int, ...] | None:
    """Places of the arguments that a block's further outputs are, -1 where one is None; () where all are. None where
    the block made one itself, which would be missing."""
    places: list[int] = []
    for value in rest:
        same = [place for place, argument in enumerate(arguments) if argument is value]
        if value is not None and not same:
            return None
        places.append(-1 if value is None else same[0])
    return tuple(places) if any(place >= 0 for place in places) else ()


def _series(module: nn.Module) -> set[str]:
    """Members of lists and sequences that have siblings of the same class, which is no mere container."""
    from torch import nn

    found: set[str] = set()
    for path, part in module.named_modules():
        if isinstance(part, nn.ModuleList | nn.Sequential):
            kinds = Counter(type(child) for child in part)
            found.update(
                f"{path}.{name}" if path else name
                for name, child in part.named_children()
                if kinds[type(child)] > 1 and not type(child).__module__.startswith("torch.nn.modules.")
            )
    return found


def _adds(block: nn.Module, call: _Call) -> bool:
    """Whether the block gives its input back once all its weights are zero.

    The input is noise: what an untrained network hands on can be so small that zeros would pass for it.
    """
    import torch
    from torch.utils._pytree import tree_map

    noise = call.input
    if noise.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(noise.shape, generator=generator).to(noise.device, noise.dtype)

    def given_noise(value: object) -> object:
        return noise.clone() if value is call.input else value  # a copy, as the block may work in place

    arguments, keywords = tree_map(given_noise, (call.arguments, call.keywords))
    silent = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in silent.parameters():
            parameter.zero_()
        try:
            result = silent(*arguments, **keywords)
        except Exception:
            # Any exception of the user's forward: a block that can't be run alone is none to remove.
            return False
    given = result[0] if isinstance(result, tuple) else result
    return isinstance(given, torch.Tensor) and given.shape == noise.shape and torch.allclose(given, noise)
