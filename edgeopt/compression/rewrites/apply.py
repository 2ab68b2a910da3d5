"""Finding the rewrites that a model has operators for, and applying those that prove to keep its function."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from edgeopt.compression.base import CHECKED_SAMPLES
from edgeopt.compression.fold_batch_norm import fold
from edgeopt.compression.graph import is_in_place, is_node, layer_of, name_of
from edgeopt.compression.rewrites import REWRITES, load_rewrite
from edgeopt.compression.rewrites.base import Applied, Form, Rewrite, Suggestion
from edgeopt.compression.rewrites.proof import kept_db, variations
from edgeopt.compression.rewrites.retrace import exported, with_forms
from edgeopt.errors import ConversionError
from edgeopt.types import Array, Model, NpuKind, Sample, StepRecord

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


def suggest(model: Model, kinds: Iterable[NpuKind]) -> tuple[Suggestion, ...]:
    """Rewrites that have operators of the model to work on and may help one of these accelerators, in the order of
    `REWRITES`.

    Raises ConversionError where torch.export can't follow the model.
    """
    wanted = tuple(dict.fromkeys(kinds))
    graph = exported(model)
    found = (_suggestion(load_rewrite(name), graph, wanted) for name in REWRITES)
    return tuple(suggestion for suggestion in found if suggestion is not None and suggestion.helps)


def apply_rewrites(
    model: Model,
    names: Iterable[str],
    kinds: Iterable[NpuKind],
    samples: Iterable[Sample] = (),
    seed: int = 0,
) -> tuple[Model, tuple[Applied, ...]]:
    """Apply these rewrites one after another, each to all operators that it has a form for, with one `StepRecord` each.

    Each is proven against the model before it, on the example input, on variations of that and on a few samples; one
    that fails its proof, or can't be traced, is left out and says so. Those without operators are not mentioned. Batch
    normalizations are folded first where anything is rewritten: a new form would hide them from exporters.

    Raises ConversionError where torch.export can't follow the model.
    """
    wanted = frozenset(names)
    graph = exported(model)
    rewrites = [load_rewrite(name) for name in REWRITES if name in wanted]
    if not any(_forms(rewrite, graph) for rewrite in rewrites):
        return model, ()
    checked = (*variations(model, seed), *(sample.inputs for sample in islice(samples, CHECKED_SAMPLES)))
    current, _ = fold(replace(model, module=graph))
    done: list[Applied] = []
    for rewrite in rewrites:
        graph = exported(current)
        suggestion = _suggestion(rewrite, graph, tuple(kinds))
        if suggestion is None:
            continue
        current, applied = _applied(rewrite, suggestion, current, graph, checked)
        done.append(applied)
    if all(applied.refused for applied in done):
        return model, tuple(done)
    return current, tuple(done)


def _applied(
    rewrite: Rewrite, suggestion: Suggestion, model: Model, graph: GraphModule, checked: Iterable[Mapping[str, Array]]
) -> tuple[Model, Applied]:
    try:
        rewritten = with_forms(model, graph, _forms(rewrite, graph))
        sqnr_db = kept_db(model, rewritten, checked)
    except ConversionError as error:
        return model, Applied(suggestion, None, rewrite.min_sqnr_db, error.problem)
    if sqnr_db < rewrite.min_sqnr_db:
        kept = f"keeps {sqnr_db:.1f} dB" if math.isfinite(sqnr_db) else "changes the outputs' shapes or finite values"
        reason = f"{kept}, where {rewrite.min_sqnr_db:g} dB count as equivalent"
        return model, Applied(suggestion, sqnr_db, rewrite.min_sqnr_db, reason)
    config = {"layers": len(suggestion.layers), "sqnr_db": round(sqnr_db, 1)}
    step = StepRecord(f"rewrite {rewrite.name}", config)
    return replace(rewritten, history=(*model.history, step)), Applied(suggestion, sqnr_db, rewrite.min_sqnr_db)


def _suggestion(rewrite: Rewrite, graph: GraphModule, kinds: tuple[NpuKind, ...]) -> Suggestion | None:
    layers = tuple(dict.fromkeys(layer_of(node) for node in _forms(rewrite, graph)))
    helps = tuple(kind for kind in kinds if kind in rewrite.helps)
    return Suggestion(rewrite.name, rewrite.summary, layers, helps) if layers else None


def _forms(rewrite: Rewrite, graph: GraphModule) -> dict[Node, Form]:
    return {node: form for node in _operators(graph) if (form := rewrite.form(node)) is not None}


def _operators(graph: GraphModule) -> Iterator[Node]:
    """ATen operators that can be replaced by others: a new value for one that overwrites its input would not reach the
    other readers of what it overwrites."""
    for node in graph.graph.nodes:
        if name_of(node) and not (is_in_place(node) and not _is_private(node)):
            yield node


def _is_private(node: Node) -> bool:
    """Whether it alone reads its first argument, which is no view of anything."""
    source = node.args[0] if node.args else None
    if not is_node(source) or len(source.users) > 1 or source.op != "call_function":
        return False
    schema = getattr(source.target, "_schema", None)
    return schema is not None and all(result.alias_info is None for result in schema.returns)
