"""Real inputs with what a shipped file makes of them, for the bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.bundle import GoldenVector
from edgeopt.bundle.generation_contents import GoldenSequence
from edgeopt.errors import DataError
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.types import Array, Artifact, Generation
from edgeopt.validation.generation_samples import assignment_of
from edgeopt.validation.prove import emulated_by

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.generation.tokens import Tokens
    from edgeopt.generation.writer import Writer

#: Each costs its inputs and outputs in bundle size.
GOLDEN_VECTORS = 4


def golden_vectors(artifact: Artifact, twin: Artifact, samples: Dataset, runtime_name: str) -> Iterator[GoldenVector]:
    """The first samples with what the shipped file and its float twin make of them, on one thread."""
    emulated = emulated_by(artifact, runtime_name) is not None
    host = load_runtime(HOST_RUNTIMES[twin.format] if emulated else runtime_name)
    runtime = load_runtime(runtime_name)
    with (
        runtime.open(artifact.runnable, artifact.signature) as shipped,
        host.open(twin.path, twin.signature) as float_,
    ):
        for sample in islice(samples, GOLDEN_VECTORS):
            native = shipped.encode(sample.inputs)
            yield GoldenVector(native, shipped.run_native(native), float_.run(sample.inputs), sample.label)


def golden_sequences(
    writer: Writer, samples: Dataset, generation: Generation, tokens: Tokens | None, beams: int
) -> Iterator[GoldenSequence]:
    """The first samples with what the shipped files write.

    Args:
        samples: of the whole network; what was to be written is left out.
        tokens: with the prefix of every text that is read; None where the prompt is no text.
    """
    for sample in islice(samples, GOLDEN_VECTORS):
        asked = assignment_of(sample, generation, tokens).inputs
        given = {name: values for name, values in asked.items() if name in writer.reads}
        most = writer.most_new(given)
        written = writer.write(given, most)
        prompt = None if tokens is None else _prompt(tokens, given)
        text = None if tokens is None else tokens.text(written.ids)
        yield GoldenSequence(prompt, given if prompt is None else {}, written.ids, text, beams, most)


def _prompt(tokens: Tokens, given: Mapping[str, Array]) -> str | None:
    """The text of these tokens; None where it would be read as others, as one with unknown words would, or was
    heard."""
    ids = given.get("input_ids")
    if ids is None:
        return None
    prompt = tokens.text([int(token) for token in ids[0]]).removeprefix(tokens.prefix)
    try:
        again = tokens.inputs(prompt)["input_ids"]
    except DataError:
        return None
    return prompt if np.array_equal(again, ids) else None
