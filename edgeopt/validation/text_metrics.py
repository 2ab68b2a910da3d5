"""What written texts are worth beside reference texts, and how well a network predicts a text.

All are kept as sums: no text is remembered. Scores are fractions, a BLEU of 33.1 is 0.331; perplexity is no fraction.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Protocol

from edgeopt.errors import DataError, MissingError, UsageError
from edgeopt.types import GenerationTask

#: Of networks whose metric the user does not name.
DEFAULTS: dict[GenerationTask, str] = {
    "translation": "bleu",
    "summarization": "rougeL",
    "text2text-generation": "exact-match",
    "speech-recognition": "wer",
    "text-generation": "perplexity",
}
PERPLEXITY = "perplexity"


class TextMetric(Protocol):
    """Accumulates over written texts; one object for one network.

    Attributes:
        signature: what another needs to know to get the same figure ("nrefs:1|case:mixed|..."); None before the first
            text, and where the name says it all.
    """

    name: str
    higher_is_better: bool

    @property
    def signature(self) -> str | None: ...

    def update(self, written: str, references: Sequence[str]) -> None:
        """Take note of one text, beside the references of which it should be one; at least one of them."""
        ...

    def value(self) -> float:
        """The metric over all texts so far; at least one."""
        ...


class _Sacre:
    """BLEU (Papineni et al. 2002) or chrF (Popovic 2015) of the corpus, as sacrebleu (Post 2018) computes them.

    Its public methods take all texts at once. What it sums over sentences is had from the methods that its metrics
    offer each other, so that memory does not grow; tests compare with `corpus_score`.
    """

    higher_is_better = True

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self._metric = getattr(_import("sacrebleu.metrics", "sacrebleu", name), kind)()
        self._sums: list[float] = []
        self._counts: set[int] = set()

    @property
    def signature(self) -> str | None:
        if not self._counts:
            return None
        self._metric.num_refs = next(iter(self._counts)) if len(self._counts) == 1 else -1
        return str(self._metric.get_signature())

    def update(self, written: str, references: Sequence[str]) -> None:
        self._counts.add(len(references))
        (sentence,) = self._metric._extract_corpus_statistics([written], [[text] for text in references])
        self._sums = [a + b for a, b in zip(self._sums, sentence, strict=True)] if self._sums else list(sentence)

    def value(self) -> float:
        return float(self._metric._aggregate_and_compute([self._sums]).score) / 100


class _Rouge:
    """Mean F-measure of ROUGE (Lin 2004) as rouge-score computes it, with its stemmer for English; of several
    references the one that fits best counts."""

    higher_is_better = True

    def __init__(self, name: str) -> None:
        self.name = name
        scorer = _import("rouge_score.rouge_scorer", "rouge-score", name)
        self._scorer = scorer.RougeScorer([name], use_stemmer=True)
        self._sum, self._texts = 0.0, 0

    @property
    def signature(self) -> str | None:
        return f"F-measure|stemmer:yes|rouge-score:{version('rouge-score')}"

    def update(self, written: str, references: Sequence[str]) -> None:
        self._sum += float(self._scorer.score_multi(list(references), written)[self.name].fmeasure)
        self._texts += 1

    def value(self) -> float:
        return self._sum / self._texts


class WordErrorRate:
    """Words that must be inserted, removed or replaced, as a share of the references' words; may exceed 1.

    Words are what white space separates, as they are written. Of several references the one with the fewest errors
    for its length counts.
    """

    name = "wer"
    higher_is_better = False
    signature = None

    def __init__(self) -> None:
        self._errors, self._words = 0, 0

    def update(self, written: str, references: Sequence[str]) -> None:
        words = written.split()
        against = [(_edits(words, text.split()), len(text.split())) for text in references]
        errors, length = min(against, key=lambda found: (found[0] / max(found[1], 1), found[0]))
        self._errors += errors
        self._words += length

    def value(self) -> float:
        if not self._words:
            raise DataError("hold no words", where="references", fix="wer needs at least one")
        return self._errors / self._words


class ExactMatch:
    """Share of texts that equal a reference, white space at the ends and its amount apart."""

    name = "exact-match"
    higher_is_better = True
    signature = None

    def __init__(self) -> None:
        self._matches, self._texts = 0, 0

    def update(self, written: str, references: Sequence[str]) -> None:
        self._matches += written.split() in [text.split() for text in references]
        self._texts += 1

    def value(self) -> float:
        return self._matches / self._texts


class Perplexity:
    """exp of the mean negative log-likelihood of a token, each given those before it."""

    def __init__(self) -> None:
        self._sum, self._tokens = 0.0, 0

    def update(self, log_likelihoods: Sequence[float]) -> None:
        """Take note of natural logarithms, one per token."""
        self._sum -= math.fsum(log_likelihoods)
        self._tokens += len(log_likelihoods)

    def value(self) -> float:
        """Infinite where a token was held to be impossible. Raises DataError without tokens."""
        if not self._tokens:
            raise DataError("holds no text to be predicted", where="evaluation data")
        mean = self._sum / self._tokens
        return math.exp(mean) if mean < math.log(1e300) else math.inf


_METRICS: dict[str, Callable[[], TextMetric]] = {
    "bleu": lambda: _Sacre("bleu", "BLEU"),
    "chrf": lambda: _Sacre("chrf", "CHRF"),
    "rouge1": lambda: _Rouge("rouge1"),
    "rouge2": lambda: _Rouge("rouge2"),
    "rougeL": lambda: _Rouge("rougeL"),
    "wer": WordErrorRate,
    "exact-match": ExactMatch,
}
KNOWN = (*_METRICS, PERPLEXITY)


def load_text_metric(name: str) -> Callable[[], TextMetric]:
    """What makes a fresh metric of that name; perplexity, which judges no written text, is not among them.

    Raises:
        UsageError: when there is no such metric.
        MissingError: when the package that computes it is not installed.
    """
    if name not in _METRICS:
        near = difflib.get_close_matches(name.lower(), [known.lower() for known in KNOWN], n=1)
        meant = next((known for known in KNOWN if near and known.lower() == near[0]), None)
        fix = f"did you mean {meant}?" if meant else f"take one of {', '.join(KNOWN)}"
        raise UsageError(f"unknown metric {name!r} of written text", where="metric", fix=fix)
    create = _METRICS[name]
    create()  # so that a missing package is told before hours of work
    return create


def _import(module: str, package: str, metric: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingError.extra(package, "text", f"the metric {metric}") from error


def _edits(written: Sequence[str], reference: Sequence[str]) -> int:
    """Levenshtein's distance."""
    row = list(range(len(reference) + 1))
    for i, word in enumerate(written, 1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(reference, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != wanted))
    return row[-1]
