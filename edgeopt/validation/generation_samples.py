"""Samples of a whole, teacher-forced network, as what is asked of one that writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeopt.errors import DataError
from edgeopt.generation.tokens import Tokens
from edgeopt.types import Array, Generation, Sample


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one sample asks for.

    Attributes:
        name: of the sample.
        inputs: what to write from: the encoder's inputs, or a prompt.
        references: texts of which one should be written, where nobody gave texts what the label's tokens say; ()
            where nobody says.
        given, told: for perplexity: `told` follows `given`, token by token; () where a text of one token leaves
            nothing to tell, None without a label.
    """

    name: str
    inputs: Mapping[str, Array]
    references: tuple[str, ...]
    given: Mapping[str, Array]
    told: tuple[int, ...] | None


def assignment_of(sample: Sample, generation: Generation, tokens: Tokens | None) -> Assignment:
    """Raises DataError where a sample of a decoder-only network has other inputs than the tokens of one text.

    A label that skips its beginning (below 0) marks the prompt of a decoder-only network. Where it does not, the text
    is its own target: its first half is the prompt, the second the reference.
    """
    label = np.zeros(0, np.int64) if sample.label is None else np.asarray(sample.label).reshape(-1)
    told = None if sample.label is None else tuple(int(token) for token in label if token >= 0)
    if generation.kind == "encoder-decoder":
        references = sample.references or ((tokens.text(told),) if tokens is not None and told else ())
        return Assignment(sample.name, sample.inputs, references, sample.inputs, told)
    ids = _text(sample, generation)
    first = int(np.argmax(label >= 0)) if told else 0
    given = ids[: first + 1]
    if first:
        return Assignment(sample.name, _prompt(given), sample.references, _prompt(given), told)
    half = ids[: max(1, min(ids.size // 2, generation.max_source))]
    rest = (tokens.text(ids[half.size :].tolist()),) if tokens is not None and ids.size > half.size else ()
    return Assignment(sample.name, _prompt(half), rest, _prompt(given), told)


def _text(sample: Sample, generation: Generation) -> Array:
    """The tokens without the padding at their end."""
    if len(sample.inputs) != 1:
        names = ", ".join(sample.inputs)
        raise DataError(f"has the inputs {names}; one text is needed", where=f"sample {sample.name!r}")
    ids: Array = next(iter(sample.inputs.values())).reshape(-1)
    kept = np.flatnonzero(ids != generation.pad_id)
    return ids[: kept[-1] + 1] if kept.size else ids[:1]


def _prompt(ids: Array) -> dict[str, Array]:
    return {"input_ids": ids[None]}
