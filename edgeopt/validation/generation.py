"""Everything that is claimed about an exported network that writes, measured on its files in their runtime."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError
from edgeopt.generation.tokens import Tokens
from edgeopt.generation.writer import Writer
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.types import (
    Artifact,
    Finding,
    Gates,
    Generation,
    Measurement,
    OpTiming,
    PartName,
    Provenance,
    Report,
    Sample,
    UnquantizedOp,
)
from edgeopt.validation.benchmark import subject_of
from edgeopt.validation.evaluate import Evaluation
from edgeopt.validation.gates import judge, without_limit
from edgeopt.validation.generation_benchmark import BUDGET_S, Conditions, TimedNetwork, benchmark_generation, sizes
from edgeopt.validation.generation_evaluation import (
    Example,
    GenerationEvaluation,
    HowToWrite,
    Texts,
    evaluate_generation,
)
from edgeopt.validation.generation_samples import assignment_of
from edgeopt.validation.prove import emulated_by
from edgeopt.validation.text_metrics import PERPLEXITY

if TYPE_CHECKING:
    from edgeopt.progress import Progress
    from edgeopt.runtimes.base import Session

#: Samples whose sequences are timed, over and over.
TIMED_SAMPLES = 16

Parts = Mapping[PartName, Artifact]


@dataclass(frozen=True, slots=True)
class GenerationTerms:
    """How to judge: data, metric, limits, and how to write.

    Attributes:
        runtime: decides everything. Where it emulates another machine, nothing is timed.
        generation: of the network; a float twin of another size writes by it too.
        tokenizer: the tokenizer.json; None where there are tokens only, which perplexity alone can judge.
        samples: of the whole network, teacher-forced; a fresh iterator at each call; `count` of them; `origin` says
            in words what they are.
        metric: a name in `edgeopt.validation.text_metrics.KNOWN`; None where the samples have no references.
        required_gates: fields of `Gates` that the user set and that must not be skipped.
        advice: check name -> what to try when it fails.
        beams, length_penalty, early_stopping: see `edgeopt.generation.search`. 1 beam is greedy.
        max_new: tokens of a text at most; None leaves it to the cache.
        examples: texts kept for people to read.
        budget_s: seconds of timing.
    """

    model: str
    target: str
    runtime: str
    generation: Generation
    tokenizer: Path | None
    samples: Callable[[], Iterator[Sample]]
    count: int
    origin: str
    metric: str | None
    gates: Gates
    required_gates: frozenset[str]
    advice: Mapping[str, str]
    threads: int = 1
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    max_new: int | None = None
    examples: int = 8
    budget_s: float = BUDGET_S


@dataclass(frozen=True, slots=True)
class Proof:
    """The report, and texts as they were written before and after."""

    report: Report
    examples: tuple[Example, ...]


def prove_generation(
    shipped: Parts,
    twin: Parts | None,
    terms: GenerationTerms,
    findings: tuple[Finding, ...],
    progress: Progress,
) -> Proof:
    """Evaluate, time and judge a network's parts together. A missed gate is in the report; only what can't be run
    raises.

    Args:
        shipped: the files that ship, by part.
        twin: the float files of the network before anything was done to it; None when `shipped` are those.
        findings: to be kept in the report, before those made here.

    Raises:
        UsageError: when a limit on the metric is required and there is no metric, or text is to be judged without a
            tokenizer.
        DataError: when there are no samples, or one lacks what the metric needs.
        ConversionError: when a runtime refuses a file, or a network answers NaN.
        MissingError: when the runtime, or the package that computes the metric, is not installed.
    """
    _check(terms)
    tokens = Tokens(terms.tokenizer, terms.generation) if terms.tokenizer is not None else None
    emulates = emulated_by(shipped["decoder"], terms.runtime)
    evaluation, timings = _observe(shipped, twin, terms, tokens, emulates is not None, progress)
    networks = _networks(shipped, twin, terms, emulates is not None)
    own = networks[0].subject
    if emulates is None:
        progress.step("Timing quantized against float" if twin else "Timing")
        sources = [assignment_of(s, terms.generation, tokens).inputs for s in islice(terms.samples(), TIMED_SAMPLES)]
        conditions = Conditions(
            generation=terms.generation,
            beams=terms.beams,
            length_penalty=terms.length_penalty,
            early_stopping=terms.early_stopping,
            max_new=terms.max_new,
            threads=terms.threads,
            budget_s=terms.budget_s,
        )
        measured = benchmark_generation(networks[0], networks[1] if twin else None, sources, conditions)
    else:
        measured = sizes(networks)
    judged = _judged(evaluation, terms.metric)
    checks = (
        *judge(terms.gates, judged, measured, terms.advice, terms.required_gates, timings),
        *without_limit(terms.gates, judged, measured),
    )
    report = Report(
        status="passed" if all(check.passed for check in checks) else "failed",
        model=terms.model,
        target=terms.target,
        runtime=terms.runtime,
        checks=checks,
        measurements=(*_quality(evaluation, own, "emulated" if emulates else "measured-host", terms), *measured),
        unquantized_ops=_unquantized(shipped),
        op_timings=timings,
        findings=(*findings, *_findings(evaluation, measured, own, terms)),
        evaluation={
            "samples": evaluation.samples,
            "origin": terms.origin,
            "metric": terms.metric,
            "metric_signature": evaluation.signature,
            "threads": terms.threads,
            "machine": platform.machine(),
            "emulates": emulates,
            "beams": terms.beams,
            "length_penalty": terms.length_penalty,
            "max_new_tokens": terms.max_new,
        },
    )
    return Proof(report, evaluation.examples)


def _check(terms: GenerationTerms) -> None:
    if terms.metric is None:
        limits = {
            "max_accuracy_drop": terms.gates.max_accuracy_drop,
            "min_accuracy_kept": terms.gates.min_accuracy_kept,
        }
        # One that was switched off is the user's decision too.
        asked = (gate for gate, limit in limits.items() if limit is not None and gate in terms.required_gates)
        if (needy := next(asked, None)) is not None:
            raise UsageError(
                "can't be measured: the evaluation data have no texts to compare with",
                where=needy.replace("_", "-"),
                fix="give pairs with --evaluation DATA, or --metric perplexity",
            )
    elif terms.metric != PERPLEXITY and terms.tokenizer is None:
        raise UsageError(
            "judges texts, and the network has no tokenizer.json to make them with",
            where=f"metric {terms.metric!r}",
            fix=f"take --metric {PERPLEXITY}, or give the tokenizer",
        )


def _observe(
    shipped: Parts,
    twin: Parts | None,
    terms: GenerationTerms,
    tokens: Tokens | None,
    is_emulated: bool,
    progress: Progress,
) -> tuple[GenerationEvaluation, tuple[OpTiming, ...]]:
    """Run both over the samples; then time the shipped decoder's operators."""
    how = HowToWrite(terms.generation, tokens, terms.metric, terms.max_new, terms.count, terms.examples)
    with ExitStack() as stack:

        def writer(parts: Parts, runtime: str) -> tuple[Writer, dict[PartName, Session]]:
            sessions = {
                part: stack.enter_context(load_runtime(runtime).open(x.runnable, x.signature, terms.threads))
                for part, x in parts.items()
            }
            penalty, early = terms.length_penalty, terms.early_stopping
            made = Writer(sessions, terms.generation, terms.beams, length_penalty=penalty, early_stopping=early)
            return made, sessions

        candidate, sessions = writer(shipped, terms.runtime)
        reference = writer(twin, _host(twin, terms, is_emulated))[0] if twin else None
        samples = progress.track(terms.samples(), "Writing", terms.count)
        evaluation = evaluate_generation(reference, candidate, samples, how)
        timings: tuple[OpTiming, ...] = ()
        if not is_emulated:
            progress.step("Profiling")
            timings = sessions["decoder"].profile(candidate.decoder_inputs())
    return evaluation, tuple(OpTiming(f"decoder/{t.name}", t.type, t.ms) for t in timings)


def _host(parts: Parts, terms: GenerationTerms, is_emulated: bool) -> str:
    return HOST_RUNTIMES[parts["decoder"].format] if is_emulated else terms.runtime


def _networks(shipped: Parts, twin: Parts | None, terms: GenerationTerms, is_emulated: bool) -> list[TimedNetwork]:
    own = subject_of(shipped["decoder"], twin["decoder"] if twin else None)
    networks = [TimedNetwork(own, shipped, terms.runtime)]
    if twin:
        networks.append(TimedNetwork("float", twin, _host(twin, terms, is_emulated)))
    return networks


def _judged(evaluation: GenerationEvaluation, metric: str | None) -> Evaluation:
    """As gates see it. What should be low is turned round, so that a drop and a share kept mean something: word errors
    to the share of right words, perplexity to the float network's by this one's."""
    before, after = evaluation.metrics[metric] if metric is not None else (None, None)
    if metric == PERPLEXITY and before is not None and after is not None:
        before, after = 1.0, before / after
    elif metric is not None and after is not None and not evaluation.higher_is_better[metric]:
        before, after = None if before is None else 1 - before, 1 - after
    return Evaluation(
        samples=evaluation.samples,
        metric=metric,
        higher_is_better=True,
        reference_metric=before,
        candidate_metric=after,
        outputs=(),
        agreement=evaluation.agreement,
        sqnr_db=None,
    )


def _quality(
    evaluation: GenerationEvaluation, own: str, obtained: Provenance, terms: GenerationTerms
) -> tuple[Measurement, ...]:
    """Metrics and agreement as measurements, the twin's first."""
    found = []
    for name, (before, after) in evaluation.metrics.items():
        unit = "" if name == PERPLEXITY else "fraction"
        for subject, value in (("float", before), (own, after)):
            if value is not None:
                how: Provenance = obtained if subject == own else "measured-host"
                found.append(
                    Measurement(name, subject, value, unit, how, terms.runtime, repetitions=evaluation.samples)
                )
    if evaluation.agreement is not None:
        agreement = evaluation.agreement
        found.append(
            Measurement(
                "agreement", own, agreement, "fraction", obtained, terms.runtime, repetitions=evaluation.samples
            )
        )
    return tuple(found)


def _unquantized(parts: Parts) -> tuple[UnquantizedOp, ...]:
    return tuple(
        UnquantizedOp(f"{part}/{op.name}", op.type, op.reason)
        for part, artifact in parts.items()
        for op in artifact.unquantized_ops
    )


def _findings(
    evaluation: GenerationEvaluation, measured: tuple[Measurement, ...], own: str, terms: GenerationTerms
) -> Iterator[Finding]:
    texts, before = evaluation.texts, evaluation.float_texts
    # A language model may go on for ever; a translation that does is broken, or the cache too short for it.
    expected = before.unended if before and terms.generation.kind == "decoder" else 0
    limit = f"{terms.max_new} tokens" if terms.max_new is not None else "the cache's end"
    if texts.unended > expected and (before is not None or terms.generation.kind == "encoder-decoder"):
        told = f"{_share(texts.unended, texts)} were cut at {limit} without an end token{_beside(before, 'unended')}"
        yield Finding("never-ends", terms.model, told)
    if texts.empty:
        yield Finding("empty-text", terms.model, f"{_share(texts.empty, texts)} are empty{_beside(before, 'empty')}")
    speedup = next((m.value for m in measured if m.name == "speedup" and m.subject == own), None)
    if own == "quantized" and speedup is not None and speedup <= 1:
        told = f"writing takes {1 / speedup:.2f}x as long as with the float files: it saves space only"
        yield Finding("no-faster", terms.target, told)


def _share(count: int, texts: Texts) -> str:
    return f"{count} of {texts.written} texts"


def _beside(before: Texts | None, which: str) -> str:
    if before is None:
        return ""
    return f" (of the float network {before.unended if which == 'unended' else before.empty})"
