"""What `edgeopt coverage` tells: which operators run where, for many targets side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.compression.rewrites.base import Applied, Suggestion
from edgeopt.types import Format, NpuKind, Placement


@dataclass(frozen=True, slots=True)
class TargetCoverage:
    """What one target makes of the model.

    Attributes:
        accelerator: None for targets that run on the CPU, where "on the accelerator" reads "in a fast kernel".
        placement: None where `problem` says why there is none.
        problem: "can't convert: ...", "needs edgeopt[...]".
        latency_ms: estimated by the compiler or a model of the device; None where nobody can tell.
        warnings: limits of the device that the file misses.
    """

    target: str
    format: Format
    accelerator: NpuKind | None
    device: str
    placement: Placement | None
    problem: str | None = None
    latency_ms: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def on_cpu(self) -> int | None:
        """How many operators fall back; None where there is no placement."""
        return None if self.placement is None else len(self.placement.on_cpu)


@dataclass(frozen=True, slots=True)
class Cell:
    """`on` of `all` layers (of a kind without layers: operators) run on the accelerator with all their operators."""

    on: int
    all: int


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of source layer, or one layer.

    Attributes:
        name: the layer's class ("Conv2d"), or its path and class; "(add)" for operators between layers.
        count: of such layers in the model; 0 where they are no layers.
        cells: by target; none where a target's file has no operator left of them.
    """

    name: str
    count: int
    cells: Mapping[str, Cell]


@dataclass(frozen=True, slots=True)
class Fallback:
    """Operators of one type that fall back for one reason.

    `counts` is how many, by target.
    """

    type: str
    reason: str
    fix: str | None
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A rewrite that was tried. `helped` are the targets on which fewer operators of its layers fall back than before;
    of those that could not take the model before, the ones on which none does. Empty where it was refused."""

    applied: Applied
    helped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CoverageReport:
    """A model against its targets.

    Attributes:
        calibration: what the files were quantized with, one sentence.
        rows: by kind; `layers` the same by layer.
        suggestions: rewrites worth trying.
        outcomes: what became of them, where they were applied.
        after: of the rewritten model, where any rewrite was done.
    """

    model: str
    calibration: str
    targets: tuple[TargetCoverage, ...]
    rows: tuple[Row, ...]
    layers: tuple[Row, ...]
    fallbacks: tuple[Fallback, ...]
    suggestions: tuple[Suggestion, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    after: CoverageReport | None = None

    @property
    def recommended(self) -> tuple[str, ...]:
        """Names of the rewrites that helped a target."""
        return tuple(outcome.applied.suggestion.name for outcome in self.outcomes if outcome.helped)
