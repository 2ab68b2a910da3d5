"""Which token comes next: greedy choice and beam search over the scores that the decoder gives.

A search sees one step's scores at a time and says which tokens the decoder's rows read next, and whose cache each of
them continues. It knows no runtime, so the loop around it may run files, torch or an app's own engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeopt.types import Array, Generation


@dataclass(frozen=True, slots=True)
class Rules:
    """When a sequence is over, and how finished ones are ranked.

    Attributes:
        end_ids: tokens that end it.
        suppressed_ids, begin_suppressed_ids: tokens that are never written, nor as the first one.
        max_new: tokens written at most, the end token included; at least 1.
        length_penalty: a finished sequence is worth log(probability) / tokens ** length_penalty, the end token counted
            (Wu et al. 2016, section 7, in the simpler form that transformers uses). Above 0, longer ones gain.
        early_stopping: be content with the first `beams` finished sequences, better ones in sight or not.
    """

    end_ids: tuple[int, ...]
    suppressed_ids: tuple[int, ...]
    begin_suppressed_ids: tuple[int, ...]
    max_new: int
    length_penalty: float = 1.0
    early_stopping: bool = False

    @classmethod
    def of(
        cls, generation: Generation, max_new: int, length_penalty: float = 1.0, early_stopping: bool = False
    ) -> Rules:
        suppressed, begin = generation.suppressed_ids, generation.begin_suppressed_ids
        return cls(generation.end_ids, suppressed, begin, max_new, length_penalty, early_stopping)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step decided, an entry per row of the search.

    Attributes:
        tokens: what the rows read next.
        parents: the row whose sequence, and so whose cache, each of them continues.
        choices: the likeliest next token of each row as it was before, whatever the search made of it.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    choices: tuple[int, ...]


class Search(Protocol):
    """Writes one sequence. `width` rows are scored at each step, until `done`."""

    width: int
    done: bool

    @property
    def ids(self) -> tuple[int, ...]:
        """What was written so far; of several rows, what the best one holds."""
        ...

    def advance(self, logits: Array) -> Step:
        """Take the scores (width, vocabulary), float32, of the tokens that follow."""
        ...


def search_for(rules: Rules, beams: int) -> Greedy | Beam:
    """Greedy for one beam."""
    return Greedy(rules) if beams == 1 else Beam(rules, beams)


class Greedy:
    """The likeliest token at each step; of equal ones that with the lower id."""

    width = 1

    def __init__(self, rules: Rules) -> None:
        self.done = False
        self.ids: tuple[int, ...] = ()
        self._rules = rules

    def rank(self, logits: Array, *, first: bool) -> int:
        return int(_allowed(logits, self._rules, first=first)[0].argmax())

    def advance(self, logits: Array) -> Step:
        token = self.rank(logits, first=not self.ids)
        self.ids = (*self.ids, token)
        self.done = token in self._rules.end_ids or len(self.ids) >= self._rules.max_new
        return Step((token,), (0,), (token,))


class Beam:
    """Beam search that agrees with transformers' `generate(num_beams=...)`.

    At each step the 2 * beams best continuations of all rows are looked at (more where several tokens end a
    sequence), so that `beams` of them go on even if the others end. Those among the first `beams` that end join the
    finished ones, of which the best `beams` are kept. The search is over when no running sequence, ranked at its
    present length, beats the worst of `beams` finished ones. Of equal continuations the one of the lower row, then of
    the lower token is better.

    Args:
        rules: of the sequence.
        beams: sequences that are followed at once, 2 or more.
    """

    def __init__(self, rules: Rules, beams: int) -> None:
        self.width = beams
        self.done = False
        self._rules = rules
        self._kept = max(2, 1 + len(rules.end_ids)) * beams
        # All rows hold the same sequence at first, so only one of them may be continued.
        self._scores = np.full(beams, -np.inf, np.float32)
        self._scores[0] = 0
        self._running: list[tuple[int, ...]] = [()] * beams
        self._finished: list[tuple[float, tuple[int, ...]]] = []

    @property
    def ids(self) -> tuple[int, ...]:
        """The best finished sequence; the best running one while there is none."""
        return self._finished[0][1] if self._finished else self._running[0]

    def rank(self, logits: Array, *, first: bool) -> tuple[Array, Array, Array, tuple[int, ...]]:
        """The best continuations: their scores, rows and tokens, the best first; and the choice of each row.
        `first`: of the sequence's first token."""
        totals = _allowed(logits, self._rules, first=first)
        choices = tuple(map(int, totals.argmax(axis=1)))
        totals = totals + (self._scores - _log_sum_exp(logits))[:, None]
        best = _best(totals.reshape(-1), self._kept)
        rows, tokens = np.divmod(best, logits.shape[1])
        return totals[rows, tokens], rows, tokens, choices

    def advance(self, logits: Array) -> Step:
        scores, rows, tokens, choices = self.rank(logits, first=not self._running[0])
        length = len(self._running[0]) + 1
        going: list[int] = []
        for place, (score, row, token) in enumerate(zip(scores, rows, tokens, strict=True)):
            if token not in self._rules.end_ids and length < self._rules.max_new:
                going.append(place)
            elif place < self.width:
                worth = float(score) / length**self._rules.length_penalty
                self._finished.append((worth, (*self._running[row], int(token))))
        # Stable: of equal ones the older stays before the younger.
        self._finished = sorted(self._finished, key=lambda found: -found[0])[: self.width]
        going = going[: self.width]
        self.done = not going
        if going:
            self._scores = scores[going]
            if len(going) < self.width:  # a vocabulary with hardly more tokens than beams
                self._scores = np.pad(self._scores, (0, self.width - len(going)), constant_values=-np.inf)
                going += [going[0]] * (self.width - len(going))
            self._running = [(*self._running[rows[place]], int(tokens[place])) for place in going]
            self.done = self._is_settled(length)
        return Step(tuple(int(tokens[i]) for i in going), tuple(int(rows[i]) for i in going), choices)

    def _is_settled(self, length: int) -> bool:
        if len(self._finished) < self.width:
            return False
        in_sight = float(self._scores[0]) / length**self._rules.length_penalty
        return self._rules.early_stopping or in_sight <= self._finished[-1][0]


class Replay:
    """Takes the steps that another search took, so that two networks can be compared, or timed, at the same work.

    What `search` would have had to compute is computed all the same; `choices` are those of the scores given here.
    """

    def __init__(self, search: Greedy | Beam, steps: Sequence[Step]) -> None:
        self.width = search.width
        self.done = False
        self.ids: tuple[int, ...] = ()
        self.choices: list[tuple[int, ...]] = []
        self._search = search
        self._steps = steps

    def advance(self, logits: Array) -> Step:
        ranked = self._search.rank(logits, first=not self.choices)
        step = self._steps[len(self.choices)]
        self.choices.append((ranked,) if isinstance(ranked, int) else ranked[3])
        self.done = len(self.choices) == len(self._steps)
        return step


class Forced:
    """Reads a given text and notes how likely each of its tokens was: `log_likelihoods`, natural logarithms."""

    width = 1

    def __init__(self, ids: Sequence[int]) -> None:
        self.done = False
        self.ids: tuple[int, ...] = ()
        self.log_likelihoods: list[float] = []
        self._all = tuple(ids)

    def advance(self, logits: Array) -> Step:
        token = self._all[len(self.ids)]
        self.log_likelihoods.append(float(logits[0, token] - _log_sum_exp(logits)[0]))
        self.ids = (*self.ids, token)
        self.done = len(self.ids) == len(self._all)
        return Step((token,), (0,), (int(logits[0].argmax()),))


def _allowed(logits: Array, rules: Rules, *, first: bool) -> Array:
    """The scores, with those of tokens that may not be written at minus infinity."""
    forbidden = [*rules.suppressed_ids, *(rules.begin_suppressed_ids if first else ())]
    if not forbidden:
        return logits
    allowed = logits.copy()
    allowed[:, forbidden] = -np.inf
    return allowed


def _log_sum_exp(logits: Array) -> Array:
    """log(sum(exp(row))) of each row, float32."""
    highest = logits.max(axis=1)
    sums: Array = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return sums


def _best(values: Array, count: int) -> NDArray[np.intp]:
    """Indices of the highest values, the highest first; of equal ones the lower index comes first and is kept."""
    count = min(count, values.size)
    least = np.partition(values, values.size - count)[values.size - count]
    candidates = np.flatnonzero(values >= least)
    best: NDArray[np.intp] = candidates[np.argsort(-values[candidates], kind="stable")[:count]]
    return best
