"""Layers of a student and a teacher whose outputs are to be alike, and the projections between them.

A pair "student layer=teacher layer" is matched as FitNets does (Romero et al. 2015) and, for hidden states, TinyBERT
(Jiao et al. 2020): where the widths differ a linear map is learned from the student's to the teacher's, which is thrown
away after training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgeopt.errors import UsageError
from edgeopt.layer_names import strip_wrapper


@dataclass(frozen=True, slots=True)
class Pair:
    """Paths of two layers, in the student's and in the teacher's `Model.module`."""

    student: str
    teacher: str

    @property
    def name(self) -> str:
        """As the user writes it."""
        return f"{strip_wrapper(self.student)}={strip_wrapper(self.teacher)}"


def pairs_of(features: Sequence[str], student: nn.Module, teacher: nn.Module) -> tuple[Pair, ...]:
    """The pairs that "student layer=teacher layer" names, in the given order.

    Either side is a path or a shell pattern, in which "*" stands for one part of a path; one path stands for both.
    Patterns pair what they match in the modules' own order.

    Raises UsageError where a side matches nothing, or both match different numbers of layers.
    """
    found: list[Pair] = []
    for feature in features:
        mine, _, theirs = (part.strip() for part in feature.partition("="))
        students = _matching(mine, student, "student", feature)
        teachers = _matching(theirs or mine, teacher, "teacher", feature)
        if len(students) != len(teachers):
            raise UsageError(
                f"names {_counted(students)} of the student and {_counted(teachers)} of the teacher",
                where=f"features {feature!r}",
                fix="write a pair for each student layer",
            )
        found += [Pair(*paths) for paths in zip(students, teachers, strict=True)]
    return tuple(dict.fromkeys(found))


def _matching(pattern: str, module: nn.Module, whose: str, feature: str) -> list[str]:
    names = {strip_wrapper(path): path for path, _ in module.named_modules() if strip_wrapper(path)}
    if pattern in names:
        return [names[pattern]]
    matched = [path for name, path in names.items() if _matches(name, pattern)]
    if not matched:
        near = get_close_matches(pattern, names, n=1, cutoff=0.0)
        raise UsageError(
            f"the {whose} has no layer {pattern!r}",
            where=f"features {feature!r}",
            fix=f"did you mean {near[0]!r}?" if near else None,
        )
    return matched


def _matches(name: str, pattern: str) -> bool:
    """Part by part: "layer.*" is every layer, without all that is in them."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _counted(layers: Sequence[str]) -> str:
    return f"{len(layers)} layer{'s' if len(layers) != 1 else ''}"


@contextmanager
def captured(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of these layers while the block runs the network: of a tuple the first tensor, of several calls the
    last.

    Hooks are there inside the block only, so that copies of the network are never tied to it.
    """
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: object, output: object) -> None:
            tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
            if tensor is not None:
                seen[path] = tensor

        return network.get_submodule(path).register_forward_hook(hook)

    handles = [keep(path) for path in dict.fromkeys(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def feature_of(seen: Mapping[str, Tensor], path: str) -> Tensor:
    """Raises UsageError where that layer did not run, or returned no real tensor."""
    feature = seen.get(path)
    if feature is None or not feature.is_floating_point():
        what = "does not run, or returns no tensor" if feature is None else "returns integers"
        raise UsageError(what, where=f"features: layer {strip_wrapper(path)!r}", fix="name another layer")
    return feature


@dataclass(frozen=True, slots=True)
class Fit:
    """How two features are made comparable.

    Attributes:
        kind: of the student's projection: "channels" maps axis 1, "last" the last axis; None needs none.
        channels: of the student and of the teacher.
        size: both are pooled to these sizes of the axes from 2 on; None leaves them.
    """

    kind: str | None
    channels: tuple[int, int]
    size: tuple[int, ...] | None

    def pooled(self, feature: Tensor) -> Tensor:
        if self.size is None:
            return feature
        # "area" is adaptive average pooling in as many dimensions as there are.
        return nn.functional.interpolate(feature, list(self.size), mode="area")

    def projection(self) -> nn.Module:
        """From the student's channels to the teacher's, with torch's default initialisation."""
        return nn.Identity() if self.kind is None else _Projection(self.kind, *self.channels)


class _Projection(nn.Linear):
    """A linear map of one axis; along axis 1 it is a 1x1 convolution."""

    def __init__(self, kind: str, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out)
        self._axis = 1 if kind == "channels" else -1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(self._axis, -1)).movedim(-1, self._axis)


def fit_of(pair: Pair, student: torch.Size, teacher: torch.Size) -> Fit:
    """How features of these shapes, batch first, can be compared.

    Pictures (N, C, H, W), volumes and signals (N, C, T) are pooled to the smaller of both sizes, and projected along
    C. Token sequences (N, T, C) and vectors (N, C) are projected along their last axis.

    Raises UsageError naming the pair and both shapes where they have nothing in common.
    """
    mine, theirs = tuple(student[1:]), tuple(teacher[1:])
    if mine == theirs:
        return Fit(None, (0, 0), None)
    if len(mine) == len(theirs) and mine:
        if mine[:-1] == theirs[:-1]:
            return Fit("last", (mine[-1], theirs[-1]), None)
        if len(mine) == 2 and mine[1] == theirs[1]:
            return Fit("channels", (mine[0], theirs[0]), None)
        if len(mine) > 2:
            size = None if mine[1:] == theirs[1:] else tuple(map(min, mine[1:], theirs[1:]))
            kind = None if mine[0] == theirs[0] else "channels"
            return Fit(kind, (mine[0], theirs[0]), size)
    raise UsageError(
        f"the student's output has shape {tuple(student)}, the teacher's {tuple(teacher)}, which can't be matched",
        where=f"features {pair.name!r}",
        fix="pair layers whose outputs have the same number of axes and of positions",
    )
