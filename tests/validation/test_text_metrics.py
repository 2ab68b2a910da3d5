from __future__ import annotations

import math
import sys

import pytest

from edgeopt.errors import DataError, MissingError, UsageError
from edgeopt.validation.text_metrics import DEFAULTS, KNOWN, Perplexity, load_text_metric

WRITTEN = ["Ein Hund schläft.", "Zwei Männer spielen Fußball im Park", "Eine Frau liest.", "", "Das ist alles falsch"]
REFERENCES = [
    "Ein Hund schläft auf dem Sofa.",
    "Zwei Männer spielen Fußball in einem Park.",
    "Eine Frau liest.",
    "Ein Kind lacht.",
    "Drei Vögel fliegen",
]


def score(name: str, pairs: list[tuple[str, list[str]]]) -> float:
    metric = load_text_metric(name)()
    for written, references in pairs:
        metric.update(written, references)
    return metric.value()


@pytest.mark.parametrize(("name", "kind"), [("bleu", "BLEU"), ("chrf", "CHRF")])
def test_summed_up_as_sacrebleu_scores_the_corpus(name: str, kind: str) -> None:
    metrics = pytest.importorskip("sacrebleu.metrics")
    theirs = getattr(metrics, kind)()
    expected = theirs.corpus_score(WRITTEN, [REFERENCES]).score
    metric = load_text_metric(name)()
    assert metric.signature is None
    for written, reference in zip(WRITTEN, REFERENCES, strict=True):
        metric.update(written, [reference])
    assert metric.value() == pytest.approx(expected / 100, abs=1e-12)
    assert metric.signature == str(theirs.get_signature())
    assert "nrefs:1" in metric.signature


@pytest.mark.parametrize(("name", "kind"), [("bleu", "BLEU"), ("chrf", "CHRF")])
def test_several_references(name: str, kind: str) -> None:
    metrics = pytest.importorskip("sacrebleu.metrics")
    second = [None, None, "Die Frau liest.", "Ein Kind lacht laut.", None]
    expected = getattr(metrics, kind)().corpus_score(WRITTEN, [REFERENCES, second]).score
    metric = load_text_metric(name)()
    for written, *references in zip(WRITTEN, REFERENCES, second, strict=True):
        metric.update(written, [text for text in references if text is not None])
    assert metric.value() == pytest.approx(expected / 100, abs=1e-12)
    assert "nrefs:var" in str(metric.signature)


def test_perfect_translations_score_one() -> None:
    for name in ("bleu", "chrf", "exact-match"):
        assert score(name, [(text, [text]) for text in REFERENCES]) == pytest.approx(1)
    assert score("wer", [(text, [text]) for text in REFERENCES]) == 0


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_mean_over_texts(name: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer([name], use_stemmer=True)
    written, reference = "the cats sat on a mat", "the cat sat on the mat"
    expected = scorer.score(reference, written)[name].fmeasure
    assert 0 < expected < 1
    assert score(name, [(written, [reference]), (reference, [reference])]) == pytest.approx((expected + 1) / 2)
    assert score(name, [(written, ["dogs", reference])]) == pytest.approx(expected)


def test_word_errors_are_counted_over_all_words() -> None:
    pairs = [("a b c d", ["a x c"]), ("", ["one two"]), ("same", ["same"])]
    assert score("wer", pairs) == pytest.approx((2 + 2 + 0) / (3 + 2 + 1))
    assert score("wer", [("a b", ["x y z", "a c"])]) == pytest.approx(1 / 2)


def test_references_without_words() -> None:
    with pytest.raises(DataError, match="references: hold no words"):
        score("wer", [("a", [""])])


def test_exact_match_forgives_white_space() -> None:
    assert score("exact-match", [(" a  b\n", ["x", "a b"]), ("A b", ["a b"])]) == 0.5


def test_perplexity_of_a_uniform_guess_is_the_number_of_tokens() -> None:
    perplexity = Perplexity()
    perplexity.update([math.log(1 / 50)] * 3)
    perplexity.update([math.log(1 / 50)])
    assert perplexity.value() == pytest.approx(50)
    perplexity.update([-math.inf])
    assert perplexity.value() == math.inf
    with pytest.raises(DataError, match="no text to be predicted"):
        Perplexity().value()


def test_an_unknown_metric() -> None:
    with pytest.raises(UsageError, match=r"unknown metric 'rouge-l' of written text; did you mean rougeL\?"):
        load_text_metric("rouge-l")
    with pytest.raises(UsageError, match="take one of bleu, chrf"):
        load_text_metric("quality")


@pytest.mark.parametrize(("name", "module"), [("bleu", "sacrebleu"), ("rougeL", "rouge_score")])
def test_a_missing_package_is_told_at_once(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingError, match=rf"the metric {name} needs the package .*pip install 'edgeopt\[text\]'"):
        load_text_metric(name)


def test_every_task_has_a_known_metric() -> None:
    assert set(DEFAULTS.values()) <= set(KNOWN)
