"""Attention maps of a network, seen while its own Python runs: no `output_attentions` is asked for.

A map is a softmax whose shares then weight something in a matrix product, or what `scaled_dot_product_attention`
computes inside.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeopt.errors import UsageError
from edgeopt.training.sites import Operator, Scopes, Site, SiteMode, operator_name

#: What hands a map on, unchanged or with some shares dropped.
_PASSING = frozenset({"dropout", "to", "type_as", "float", "view", "reshape", "contiguous", "clone", "expand"})
_PRODUCTS = frozenset({"matmul", "baddbmm", "einsum", "rmatmul"})


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """Where one call of attention looks.

    Attributes:
        kind: path of the module that computes it, with "*" for numbers: repeated layers share it.
        shares: (batch, heads, queries, keys), each row summing to 1.
    """

    kind: str
    shares: Tensor


@contextmanager
def watched_attention(network: nn.Module, batch: int) -> Iterator[list[AttentionMap]]:
    """The maps that the network computes inside the block, in the order in which they are used.

    Args:
        batch: samples per call, to tell heads and samples apart where the network folds them into one axis.
    """
    scopes = _Paths()
    mode = _AttentionMode(scopes, batch)
    handles = [
        handle
        for path, module in network.named_modules()
        for handle in (
            module.register_forward_pre_hook(scopes.entering(path)),
            module.register_forward_hook(scopes.leave, always_call=True),
        )
    ]
    try:
        with mode:
            yield mode.maps
    finally:
        for handle in handles:
            handle.remove()


class _Paths(Scopes):
    """Knows only which module runs; its hooks are set by who watches, for one run of the network."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self._paths = [""]

    @property
    def path(self) -> str:
        return self._paths[-1]

    def is_inside(self) -> bool:
        return True

    def next_site(self, operator: str) -> Site:
        return Site(self.path, 0, operator, 0)

    def entering(self, path: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def enter(_: nn.Module, __: tuple[object, ...]) -> None:
            self._paths.append(path)

        return enter

    def leave(self, *_: object) -> None:
        self._paths.pop()


class _AttentionMode(SiteMode):
    def __init__(self, scopes: _Paths, batch: int) -> None:
        super().__init__(scopes, frozenset())
        self.maps: list[AttentionMap] = []
        self._paths = scopes
        self._batch = batch
        # By identity; the tensors are kept so that none is reused within the run.
        self._softmaxes: dict[int, tuple[Tensor, Tensor]] = {}

    def at_site(self, site: Site, function: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        del site
        return self.elsewhere(function, args, kwargs)

    def elsewhere(self, function: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        name = operator_name(function)
        if name == "scaled_dot_product_attention":
            self._add(_shares(*args, **kwargs))
        elif name in _PRODUCTS:
            self._use(args)
        result = function(*args, **kwargs)
        if isinstance(result, Tensor):
            if name == "softmax" and result.dim() >= 3:
                self._softmaxes[id(result)] = (result, result)
            elif name in _PASSING and args and id(args[0]) in self._softmaxes:
                self._softmaxes[id(result)] = (result, self._softmaxes[id(args[0])][1])
        return result

    def _use(self, operands: Sequence[object]) -> None:
        """A softmax that weights values is a map; one that is an output of the network is none."""
        for operand in operands:
            parts = operand if isinstance(operand, list | tuple) else (operand,)
            for part in parts:
                known = self._softmaxes.get(id(part))
                if known is not None:
                    self._add(known[1])

    def _add(self, shares: Tensor) -> None:
        if shares.dim() == 3 and shares.shape[0] % self._batch == 0:
            shares = shares.reshape(self._batch, -1, *shares.shape[1:])
        if shares.dim() == 4 and shares.shape[0] == self._batch:
            self.maps.append(AttentionMap(re.sub(r"\d+", "*", self._paths.path), shares))


def _shares(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` weights the values by, before dropout."""
    del value, dropout_p
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        is_choice = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_choice else scores + attn_mask
    # A query that may look nowhere has no shares; torch's own kernels give zeros.
    return torch.softmax(scores, -1).nan_to_num(0.0)


@dataclass(frozen=True, slots=True)
class MapPair:
    """Places of two maps that are to be alike; `averaged` over their heads, where these differ in number."""

    student: int
    teacher: int
    averaged: bool


def matched_maps(student: Sequence[AttentionMap], teacher: Sequence[AttentionMap]) -> tuple[MapPair, ...]:
    """Which of the teacher's maps each of the student's learns from.

    Maps of the same kind are matched; all of them by order where the networks' modules are called differently. Map i
    of n learns from map i m / n of m, both counted from 1: evenly spread, the last from the last (TinyBERT, Jiao et
    al. 2020).

    Raises UsageError where a network computes no attention, or the maps of a pair differ in queries or keys.
    """
    for whose, maps in (("student", student), ("teacher", teacher)):
        if not maps:
            raise UsageError(
                f"the {whose} computes no attention maps that can be seen",
                where="attention",
                fix="leave --attention out, or match hidden states with --features",
            )
    by_kind = set(map(_kind, student)) == set(map(_kind, teacher))
    pairs: list[MapPair] = []
    for kind in Counter(map(_kind, student)) if by_kind else (None,):
        mine, theirs = (
            [place for place, found in enumerate(maps) if kind is None or found.kind == kind]
            for maps in (student, teacher)
        )
        pairs += [
            _pair(place, theirs[math.ceil((i + 1) * len(theirs) / len(mine)) - 1], student, teacher)
            for i, place in enumerate(mine)
        ]
    return tuple(sorted(pairs, key=lambda pair: pair.student))


def _kind(found: AttentionMap) -> str:
    return found.kind


def _pair(mine: int, theirs: int, student: Sequence[AttentionMap], teacher: Sequence[AttentionMap]) -> MapPair:
    one, other = student[mine].shares.shape, teacher[theirs].shares.shape
    if one[2:] != other[2:]:
        raise UsageError(
            f"map {mine + 1} of the student has shape {tuple(one)}, map {theirs + 1} of the teacher {tuple(other)}",
            where="attention",
            fix="leave --attention out, or match hidden states with --features",
        )
    return MapPair(mine, theirs, one[1] != other[1])
