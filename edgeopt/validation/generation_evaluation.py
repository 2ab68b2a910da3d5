"""Two networks that write, side by side over a data set: what their texts are worth, and where they part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from edgeopt.errors import DataError
from edgeopt.generation.tokens import Tokens
from edgeopt.generation.writer import Writer, Written
from edgeopt.types import Generation, Sample
from edgeopt.validation.generation_samples import Assignment, assignment_of
from edgeopt.validation.text_metrics import PERPLEXITY, Perplexity, TextMetric, load_text_metric


@dataclass(frozen=True, slots=True)
class Example:
    """One text before and after, for people to read; without a float twin both are the same."""

    source: str
    reference: str | None
    float_text: str
    text: str


@dataclass(slots=True)
class Texts:
    """What one network wrote.

    Attributes:
        written: how many texts.
        unended: of them, those that were cut before an end token came.
        empty: of them, those that hold nothing but it.
    """

    written: int = 0
    unended: int = 0
    empty: int = 0

    def add(self, written: Written, text: str | None) -> None:
        self.written += 1
        self.unended += not written.ended
        # Without a tokenizer the end token alone is all that counts as empty.
        self.empty += not text if text is not None else len(written.ids) <= written.ended


@dataclass(frozen=True, slots=True)
class GenerationEvaluation:
    """What the comparison found.

    Attributes:
        samples: how many were run through both.
        metrics: name -> (value of the float twin, or None without one; value of the shipped network).
        higher_is_better: for each of them.
        signature: of the first metric.
        agreement: share of tokens at which both choose alike, the same tokens before them being given: those that the
            float twin wrote, or, where perplexity is the metric, those of the sample. None without a twin.
        float_texts, texts: what each of them wrote.
        examples: spread evenly over the data.
    """

    samples: int
    metrics: dict[str, tuple[float | None, float]]
    higher_is_better: dict[str, bool]
    signature: str | None
    agreement: float | None
    float_texts: Texts | None
    texts: Texts
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class HowToWrite:
    """What both networks are asked for.

    Attributes:
        tokens: None where there is no text, but only tokens.
        metric: a name in `text_metrics.KNOWN`; None without references.
        max_new: tokens of a text at most; None leaves it to the cache.
        count: samples, of which `examples` are kept.
    """

    generation: Generation
    tokens: Tokens | None
    metric: str | None
    max_new: int | None
    count: int
    examples: int


def evaluate_generation(
    reference: Writer | None, candidate: Writer, samples: Iterable[Sample], how: HowToWrite
) -> GenerationEvaluation:
    """Let both write from each sample, or predict it where perplexity is the metric; keeps none but the examples.

    Raises:
        DataError: when there are no samples, or one lacks the references or the label that the metric needs.
        ConversionError: when a network answers NaN.
    """
    comparison = _Comparison(reference, candidate, how)
    for index, sample in enumerate(samples):
        comparison.add(index, assignment_of(sample, how.generation, how.tokens))
    return comparison.result()


@dataclass(slots=True)
class _Side:
    """One network and what adds up for it."""

    writer: Writer
    metrics: list[TextMetric]
    perplexity: Perplexity = field(default_factory=Perplexity)
    texts: Texts = field(default_factory=Texts)


class _Comparison:
    def __init__(self, reference: Writer | None, candidate: Writer, how: HowToWrite) -> None:
        self._how = how
        factories = _factories(how.metric)
        self._candidate = _Side(candidate, [create() for create in factories])
        self._reference = _Side(reference, [create() for create in factories]) if reference is not None else None
        self._samples = self._alike = self._compared = 0
        self._examples: list[Example] = []

    def add(self, index: int, assignment: Assignment) -> None:
        self._samples += 1
        is_example = index % max(1, self._how.count // max(1, self._how.examples)) == 0
        is_example = is_example and len(self._examples) < self._how.examples and self._how.tokens is not None
        if self._how.metric == PERPLEXITY:
            self._predict(assignment)
            if not is_example:
                return
        float_text = None
        if self._reference is not None:
            expected = self._write(self._reference, assignment)
            float_text = self._text(expected)
            self._judge(self._reference, expected, float_text, assignment)
        found = self._write(self._candidate, assignment)
        text = self._text(found)
        self._judge(self._candidate, found, text, assignment)
        if self._reference is not None and self._how.metric != PERPLEXITY:
            self._compare(expected, found, assignment)
        if is_example and text is not None:
            before = text if float_text is None else float_text
            self._examples.append(Example(self._source(assignment), _first(assignment.references), before, text))

    def result(self) -> GenerationEvaluation:
        """Raises DataError when nothing was added."""
        if not self._samples:
            raise DataError("holds no samples", where="evaluation data")
        own, other = self._candidate, self._reference
        values: dict[str, tuple[float | None, float]] = {}
        if self._how.metric == PERPLEXITY:
            values[PERPLEXITY] = (other.perplexity.value() if other else None, own.perplexity.value())
        for place, metric in enumerate(own.metrics):
            values[metric.name] = (other.metrics[place].value() if other else None, metric.value())
        return GenerationEvaluation(
            samples=self._samples,
            metrics=values,
            higher_is_better={m.name: m.higher_is_better for m in own.metrics} | {PERPLEXITY: False},
            signature=own.metrics[0].signature if own.metrics else None,
            agreement=self._alike / self._compared if self._compared else None,
            float_texts=other.texts if other else None,
            texts=own.texts,
            examples=tuple(self._examples),
        )

    def _write(self, side: _Side, assignment: Assignment) -> Written:
        return side.writer.write(assignment.inputs, self._how.max_new)

    def _text(self, written: Written) -> str | None:
        return self._how.tokens.text(written.ids) if self._how.tokens is not None else None

    def _judge(self, side: _Side, written: Written, text: str | None, assignment: Assignment) -> None:
        side.texts.add(written, text)
        if side.metrics and not assignment.references:
            raise DataError(
                f"has no reference text, which the metric {side.metrics[0].name} needs",
                where=f"sample {assignment.name!r}",
            )
        for metric in side.metrics:
            metric.update(text or "", assignment.references)

    def _compare(self, expected: Written, found: Written, assignment: Assignment) -> None:
        """Count where the candidate chooses as the reference did, on the way that the reference went."""
        if [(s.tokens, s.parents) for s in expected.steps] == [(s.tokens, s.parents) for s in found.steps]:
            choices = [step.choices for step in found.steps]  # it went the same way by itself
        else:
            choices = self._candidate.writer.replay(assignment.inputs, expected)[1]
        for step, chosen in zip(expected.steps, choices, strict=True):
            self._count(step.choices, chosen)

    def _predict(self, assignment: Assignment) -> None:
        if assignment.told is None:
            raise DataError("has no label to be predicted", where=f"sample {assignment.name!r}")
        if not assignment.told:
            return
        found = self._candidate.writer.score(assignment.given, assignment.told)
        self._candidate.perplexity.update(found.log_likelihoods)
        if self._reference is not None:
            expected = self._reference.writer.score(assignment.given, assignment.told)
            self._reference.perplexity.update(expected.log_likelihoods)
            self._count(expected.choices, found.choices)

    def _count(self, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
        self._alike += sum(a == b for a, b in zip(expected, found, strict=True))
        self._compared += len(expected)

    def _source(self, assignment: Assignment) -> str:
        ids = assignment.inputs.get("input_ids")
        tokens = self._how.tokens
        return tokens.text(ids[0].tolist()) if ids is not None and tokens is not None else assignment.name


def _factories(metric: str | None) -> list[Callable[[], TextMetric]]:
    """The metric, and beside BLEU chrF, which tells more of languages with long words."""
    if metric is None or metric == PERPLEXITY:
        return []
    return [load_text_metric(name) for name in ((metric, "chrf") if metric == "bleu" else (metric,))]


def _first(references: tuple[str, ...]) -> str | None:
    return references[0] if references else None
