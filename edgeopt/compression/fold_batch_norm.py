"""Batch normalization becomes part of the weights before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgeopt.compression.base import Needs, PassInputs, forward
from edgeopt.compression.graph import Graph, Operator, arguments, capture, is_node, name_of
from edgeopt.compression.surgery import Surgery, biasable, bypass, graph_use
from edgeopt.errors import ConversionError
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Model, Scheme, StepRecord

if TYPE_CHECKING:
    import torch
    from torch.fx import Node


@dataclass(frozen=True, slots=True)
class FoldBatchNorm:
    """Fold each batch normalization into the convolution or linear operator that alone feeds it.

    With the running statistics mean and var, weight becomes weight * gamma / sqrt(var + eps) per output channel and
    bias (bias - mean) * gamma / sqrt(var + eps) + beta (Jacob et al. 2018, section 3.2). The normalization's module
    becomes an Identity, and its operator leaves an exported graph; where the user's code needs it to be what it was,
    its numbers become those of an identity. Left alone: normalizations in front of a convolution, shared ones, those
    that use the batch's own statistics, and those behind a layer that has no bias and whose code takes none.
    """

    name: ClassVar[str] = "fold-batch-norm"
    needs: ClassVar[Needs] = "nothing"
    keeps_function: ClassVar[bool] = True

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        del scheme
        try:
            pairs, homeless = _foldable(model)
        except ConversionError as error:
            return error.problem
        if pairs:
            return None
        if homeless:
            return f"the code of layer {homeless[0]!r} takes no bias, which its batch normalization would become"
        return "no batch normalization follows a layer that it can be folded into"

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        del inputs
        folded, count = fold(model)
        return replace(folded, history=(*model.history, StepRecord(self.name, {"folded": count})))


def fold(model: Model) -> tuple[Model, int]:
    """The model without foldable batch normalizations, and how many they were; the history stays."""
    if model.module is None:
        raise ValueError("a pass takes a model with a torch module; see sources.as_torch")
    pairs, _ = _foldable(model)
    surgery = Surgery(model.module)
    for pair in pairs:
        _fold(surgery, pair)
        _neutralize(surgery, pair)
    folded = replace(model, module=surgery.module, native=None)
    without = replace(model, module=_without(surgery, pairs))
    try:
        forward(without, model.example_inputs)
    except AttributeError:
        # The user's code asks the normalization for something that an Identity doesn't have.
        return folded, len(pairs)
    return replace(without, native=None), len(pairs)


@dataclass(frozen=True, slots=True)
class _Pair:
    """`norm` maps mean, var, and where there are some weight and bias, to names in the module."""

    operator: Operator
    norm: Mapping[str, str]
    eps: float


def _foldable(model: Model) -> tuple[list[_Pair], list[str]]:
    """The pairs, and the layers that make none only because they have no place for a bias."""
    graph = capture(model)
    pairs = [pair for node in graph.nodes if (pair := _pair(graph, node)) is not None]
    without_bias = {pair.operator.weight: pair.operator for pair in pairs if pair.operator.bias is None}
    able = biasable(model, without_bias) if without_bias else frozenset()
    homeless = [name for name in without_bias if name not in able]
    return (
        [pair for pair in pairs if pair.operator.weight not in homeless],
        [strip_wrapper(name.rpartition(".")[0]) for name in homeless],
    )


def _pair(graph: Graph, node: Node) -> _Pair | None:
    if name_of(node) != "aten.batch_norm":
        return None
    given = arguments(node)
    source, eps = given["input"], given["eps"]
    operator = graph.operators.get(source) if is_node(source) else None
    if operator is None or operator.has_foreign_bias or operator.kind == "affine" or len(operator.node.users) != 1:
        return None
    rank = operator.node.meta["val"].dim()
    if operator.channel_axis % rank != 1 or given["training"] or not isinstance(eps, float):
        return None
    norm = {}
    for key, argument in (("mean", "running_mean"), ("var", "running_var"), ("weight", "weight"), ("bias", "bias")):
        value = given[argument]
        if is_node(value) and value in graph.owned:
            norm[key] = graph.owned[value]
        elif value is not None or key in ("mean", "var"):
            return None
    return _Pair(operator, norm, eps)


def _fold(surgery: Surgery, pair: _Pair) -> None:
    operator = pair.operator
    mean, var = surgery.get(pair.norm["mean"]), surgery.get(pair.norm["var"])
    gain = 1 / np.sqrt(var + pair.eps)
    if "weight" in pair.norm:
        gain = gain * surgery.get(pair.norm["weight"])
    beta = surgery.get(pair.norm["bias"]) if "bias" in pair.norm else np.zeros_like(mean)
    bias = surgery.get(operator.bias) if operator.bias is not None else np.zeros_like(mean)
    surgery.set(operator.weight, surgery.get(operator.weight) * gain[operator.out_index])
    folded = (bias - mean) * gain + beta
    if operator.bias is not None:
        surgery.set(operator.bias, folded)
    else:
        surgery.add_bias(operator, folded)


def _neutralize(surgery: Surgery, pair: _Pair) -> None:
    """Give the normalization the numbers of an identity."""
    values = {"mean": 0.0, "var": 1.0 - pair.eps, "weight": 1.0, "bias": 0.0}
    for key, name in pair.norm.items():
        surgery.set(name, np.full(surgery.get(name).shape, values[key]))


def _without(surgery: Surgery, pairs: list[_Pair]) -> torch.nn.Module:
    """A copy of the module in which torch's own and exported graphs' batch normalizations, now neutral, are gone."""
    import torch

    plain = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
    module = Surgery(surgery.module).module
    for pair in pairs:
        use = graph_use(module, pair.norm["var"])
        if use is not None:
            if name_of(use.node) == "aten.batch_norm":
                bypass(use)
            continue
        parent, _, attribute = pair.norm["var"].rpartition(".")[0].rpartition(".")
        owner = module.get_submodule(parent)
        if attribute and type(getattr(owner, attribute)) in plain:
            setattr(owner, attribute, torch.nn.Identity())
    return module
