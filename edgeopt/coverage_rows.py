"""Placements of many targets as the rows of one table."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from edgeopt.coverage_values import Cell, Fallback, Row, TargetCoverage
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import OpPlacement

if TYPE_CHECKING:
    import torch

#: (source layer or None, operator) -> name of its row.
_Namer = Callable[[str | None, OpPlacement], str]
#: Of torch.nn, but no layers.
_CONTAINERS = frozenset({"Sequential", "ModuleList", "ModuleDict", "Module"})


def layer_kinds(module: torch.nn.Module | None) -> dict[str, str]:
    """Path -> class of every module without children; those are layers, the others' operators are code of their own.

    Recurrent and other layers of torch count as layers whatever is inside them.
    """
    if module is None:
        return {}
    kinds: dict[str, str] = {}
    for path, part in module.named_modules():
        is_torch = type(part).__module__.startswith("torch.nn.modules.") and type(part).__name__ not in _CONTAINERS
        if path and (is_torch or not any(True for _ in part.children())):
            kinds[strip_wrapper(path)] = type(part).__name__
    return kinds


def rows_by_kind(targets: Sequence[TargetCoverage], kinds: Mapping[str, str]) -> tuple[Row, ...]:
    """One row per class of layer, in the order of the model; then what belongs to no layer."""
    return _rows(targets, kinds, lambda layer, op: _kind(layer, op, kinds), Counter(kinds.values()))


def rows_by_layer(targets: Sequence[TargetCoverage], kinds: Mapping[str, str]) -> tuple[Row, ...]:
    """One row per layer, "features.0.conv Conv2d"; then what belongs to no layer."""
    names = {layer: f"{layer} {kind}" for layer, kind in kinds.items()}

    def name(layer: str | None, op: OpPlacement) -> str:
        return names[layer] if layer is not None else f"{op.layer or ''} {_between(op)}".strip()

    return _rows(targets, kinds, name, Counter(names.values()))


def fallbacks(targets: Iterable[TargetCoverage]) -> tuple[Fallback, ...]:
    """What falls back, of all targets, the most frequent first."""
    first: dict[tuple[str, str], OpPlacement] = {}
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for target in targets:
        for op in target.placement.on_cpu if target.placement is not None else ():
            key = op.type, re.sub(r"'[^']*'", "", op.reason or "")  # names of tensors make no other reason
            first.setdefault(key, op)
            counts[key][target.target] += 1
    found = [Fallback(op.type, op.reason or "not told", op.fix, dict(counts[key])) for key, op in first.items()]
    return tuple(sorted(found, key=lambda one: (-max(one.counts.values()), -len(one.counts), one.type, one.reason)))


def source_layer(op: OpPlacement, kinds: Mapping[str, str]) -> str | None:
    """The layer that an operator comes from: its own, or the one around it; None where it is code between layers."""
    path = op.layer or ""
    while path and path not in kinds:
        path = path.rpartition(".")[0]
    return path or None


def _rows(
    targets: Sequence[TargetCoverage],
    kinds: Mapping[str, str],
    name_of: _Namer,
    counts: Mapping[str, int],
) -> tuple[Row, ...]:
    cells: dict[str, dict[str, Cell]] = {name: {} for name in counts}
    for target in targets:
        for name, groups in _grouped(target, kinds, name_of).items():
            on = sum(all(op.on == "accelerator" for op in ops) for ops in groups.values())
            cells.setdefault(name, {})[target.target] = Cell(on, len(groups))
    return tuple(Row(name, counts.get(name, 0), by_target) for name, by_target in cells.items() if by_target)


def _grouped(
    target: TargetCoverage, kinds: Mapping[str, str], name_of: _Namer
) -> dict[str, dict[str, list[OpPlacement]]]:
    """Row -> layer, or operator where there is none -> operators."""
    groups: dict[str, dict[str, list[OpPlacement]]] = defaultdict(lambda: defaultdict(list))
    for op in target.placement.ops if target.placement is not None else ():
        layer = source_layer(op, kinds)
        groups[name_of(layer, op)][f"layer {layer}" if layer is not None else f"operator {op.name}"].append(op)
    return groups


def _kind(layer: str | None, op: OpPlacement, kinds: Mapping[str, str]) -> str:
    if layer is not None:
        return kinds[layer]
    return _between(op) if kinds else _plain(op.type)  # of a file without its model only operators are known


def _between(op: OpPlacement) -> str:
    return f"({_plain(op.type)})"


def _plain(type_: str) -> str:
    """ "add" for ADD, Add and aten.add.Tensor; "conv_2d" for CONV_2D."""
    name = type_.split(".")[1] if type_.startswith(("aten.", "dim_order_ops.")) else type_.rpartition("::")[2]
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return words.lower().removesuffix("_copy")
