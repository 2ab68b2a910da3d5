"""How many files a search converts: a constant of the format, so that a slow machine finds what a fast one does."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.types import Format


@dataclass(frozen=True, slots=True)
class Effort:
    """Limits of the search for mixed precision; passes and estimators are few enough in any format.

    Attributes:
        layer_trials: conversions for the layers' sensitivities; None for the default of `sensitivity.analyse`.
        searches: how often the predicted frontier is bisected, with corrected costs.
        refinements, moves: how often single layers are changed, and how many of them each time.
    """

    layer_trials: int | None = None
    searches: int = 2
    refinements: int = 3
    moves: int = 3


FULL = Effort()
#: A conversion to ExecuTorch takes 15 to 20 s for a small network on two cores, ten times that of the other formats:
#: forty of them are ten minutes.
_OF_SLOW_FORMATS: dict[Format, Effort] = {"executorch": Effort(layer_trials=12, searches=1, refinements=1, moves=2)}


def effort_for(format_: Format) -> Effort:
    return _OF_SLOW_FORMATS.get(format_, FULL)
