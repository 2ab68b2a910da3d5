"""Student and teacher as training sees them: their forward returns what is to be matched beside their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeopt.compression.distil.attention import AttentionMap, MapPair, matched_maps, watched_attention
from edgeopt.compression.distil.features import Fit, Pair, captured, feature_of, fit_of, pairs_of
from edgeopt.errors import UsageError
from edgeopt.training.calls import explained, outputs_of


@dataclass(frozen=True, slots=True)
class Matching:
    """What of a student is matched with what of its teacher.

    Attributes:
        outputs: how many outputs both have.
        pairs: of layers. fits: how their features are made comparable.
        maps: of attention.
    """

    outputs: int
    pairs: tuple[Pair, ...] = ()
    fits: tuple[Fit, ...] = ()
    maps: tuple[MapPair, ...] = ()

    @property
    def has_features(self) -> bool:
        """Whether anything is matched beside the outputs."""
        return bool(self.pairs or self.maps)


def match(
    student: nn.Module, teacher: nn.Module, arguments: Sequence[Tensor], features: Sequence[str], *, attention: bool
) -> Matching:
    """Run both networks once, in eval mode, and find out how their parts can be compared.

    Args:
        arguments: of one sample.
        features: "student layer=teacher layer", see `pairs_of`.
        attention: whether attention maps are matched.

    Raises UsageError where outputs, a pair or the attention maps don't fit one another.
    """
    pairs = pairs_of(features, student, teacher)
    with torch.no_grad():
        mine = _observe(student, arguments, [pair.student for pair in pairs], attention=attention)
    with torch.no_grad(), explained("the teacher can't run the student's inputs"):
        theirs = _observe(teacher, arguments, [pair.teacher for pair in pairs], attention=attention)
    shapes, wanted = ([tuple(output.shape) for output in seen.outputs] for seen in (mine, theirs))
    if shapes != wanted:
        raise UsageError(
            f"gives {_listed(wanted)}, and the student {_listed(shapes)}",
            where="teacher",
            fix="take a teacher with the student's outputs",
        )
    found = zip(pairs, mine.features, theirs.features, strict=True)
    fits = tuple(fit_of(pair, one.shape, other.shape) for pair, one, other in found)
    return Matching(len(shapes), pairs, fits, matched_maps(mine.maps, theirs.maps) if attention else ())


class TeacherView(nn.Module):
    """Returns the teacher's outputs, then its features and attention maps, in the order of the matching."""

    def __init__(self, network: nn.Module, matching: Matching) -> None:
        super().__init__()
        self.network = network
        self._matching = matching

    def extra_repr(self) -> str:
        """Tells teachers apart whose outputs are kept on disk."""
        return repr(self._matching)

    def forward(self, *arguments: Tensor) -> list[Tensor]:
        matching = self._matching
        layers = [pair.teacher for pair in matching.pairs]
        seen = _observe(self.network, arguments, layers, attention=bool(matching.maps))
        features = [fit.pooled(feature) for fit, feature in zip(matching.fits, seen.features, strict=True)]
        maps = [_heads(seen.maps[pair.teacher], pair) for pair in matching.maps]
        return [*seen.outputs, *features, *maps]


class StudentView(nn.Module):
    """The same of the student, its features projected to the teacher's width.

    Args:
        seed: of the projections' first weights.
    """

    def __init__(self, network: nn.Module, matching: Matching, seed: int) -> None:
        super().__init__()
        self.network = network
        self._matching = matching
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projections = nn.ModuleList(fit.projection() for fit in matching.fits)

    def forward(self, *arguments: Tensor) -> list[Tensor]:
        matching = self._matching
        layers = [pair.student for pair in matching.pairs]
        seen = _observe(self.network, arguments, layers, attention=bool(matching.maps))
        features = [
            projection(fit.pooled(feature))
            for projection, fit, feature in zip(self.projections, matching.fits, seen.features, strict=True)
        ]
        maps = [_heads(seen.maps[pair.student], pair) for pair in matching.maps]
        return [*seen.outputs, *features, *maps]


@dataclass(frozen=True, slots=True)
class _Seen:
    outputs: list[Tensor]
    features: list[Tensor]
    maps: list[AttentionMap]


def _observe(network: nn.Module, arguments: Sequence[Tensor], layers: Sequence[str], *, attention: bool) -> _Seen:
    with ExitStack() as stack:
        seen = stack.enter_context(captured(network, layers))
        maps = stack.enter_context(watched_attention(network, len(arguments[0]))) if attention else []
        outputs = outputs_of(network, arguments)
    return _Seen(outputs, [feature_of(seen, layer) for layer in layers], maps)


def _heads(found: AttentionMap, pair: MapPair) -> Tensor:
    return found.shares.mean(1, keepdim=True) if pair.averaged else found.shares


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return f"{len(shapes)} output{'s' if len(shapes) != 1 else ''} of shape {', '.join(map(str, shapes))}"
