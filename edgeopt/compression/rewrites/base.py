"""What every rewrite does: operators of a network in another form, which computes the same and which more
accelerators take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, get_args

from edgeopt.types import NpuKind

if TYPE_CHECKING:
    from torch.fx import Node

#: In dB. What float32 rounding leaves of a form that is the same in exact arithmetic.
EXACT_DB = 80.0
ALL: frozenset[NpuKind] = frozenset(get_args(NpuKind))

#: Called with the operator's arguments, all of them, in the order of its schema; returns what the operator would.
Form = Callable[..., object]


class Rewrite(Protocol):
    """One form of an operator for another. Implementations are frozen dataclasses without fields.

    Attributes:
        name: kebab-case.
        summary: what becomes what, in a few words: "GELU by its tanh form".
        helps: accelerators that may take the new form where they don't take the old one.
        min_sqnr_db: what the outputs of the rewritten network keep of the original's at the least.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    helps: ClassVar[frozenset[NpuKind]]
    min_sqnr_db: ClassVar[float]

    def form(self, node: Node) -> Form | None:
        """The other form of one ATen operator of an exported graph; None where it has none. It is traced, so it is
        written in plain torch; what it computes from weights alone becomes new weights."""
        ...


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A rewrite that a model has operators for.

    Attributes:
        name, summary: of the rewrite.
        layers: paths of the source layers, in execution order; "" for the model's own code.
        helps: of those that were asked for.
    """

    name: str
    summary: str
    layers: tuple[str, ...]
    helps: tuple[NpuKind, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a suggestion.

    Attributes:
        sqnr_db: of the rewritten network's outputs against the original's, the worst of all samples that were tried;
            infinite where they are the same. None where it could not be run.
        refused: why the network was left as it was; None where the rewrite was done.
    """

    suggestion: Suggestion
    sqnr_db: float | None
    min_sqnr_db: float
    refused: str | None = None
