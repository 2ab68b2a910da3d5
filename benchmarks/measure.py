"""What the case studies share: one file's quality and paired speed, in the terms of a bundle's float twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeopt.bundle import open_bundle
from edgeopt.comparison import in_terms_of
from edgeopt.formats import summarize
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.types import Bundle, Sample
from edgeopt.validation.benchmark import TimedFile, benchmark_pair
from edgeopt.validation.evaluate import evaluate
from edgeopt.validation.metrics import load_metric

MIB = 1 << 20


@dataclass(frozen=True)
class Figures:
    """Of one file against the float twin of a bundle; `speedup` is the twin's time by the file's, timed in turns."""

    metric: float
    float_metric: float
    agreement: float
    sqnr_db: float
    speedup: float
    ms: float
    mib: float


def measure(path: Path, bundle: Bundle, samples: Sequence[Sample], metric: str = "top1") -> Figures:
    """Any file of the bundle's format, a vendor's too."""
    opened = open_bundle(bundle.path)
    twin_terms = opened.float_signature
    assert opened.float_path is not None
    assert twin_terms is not None
    summary = summarize(path)
    runtime = HOST_RUNTIMES[summary.format]
    terms = (
        opened.signature if path == opened.model_path else in_terms_of(opened.signature, summary.signature, str(path))
    )
    engine = load_runtime(runtime)
    with engine.open(opened.float_path, twin_terms, 1) as twin, engine.open(path, terms, 1) as session:
        quality = evaluate(twin, session, samples, load_metric(metric))
    inputs = samples[0].inputs
    timed = benchmark_pair(
        TimedFile("this", path, terms, runtime, inputs),
        TimedFile("float", opened.float_path, twin_terms, runtime, inputs),
        threads=1,
    )
    figures = {(m.name, m.subject): m.value for m in timed}
    assert quality.candidate_metric is not None
    assert quality.reference_metric is not None
    assert quality.agreement is not None
    assert quality.sqnr_db is not None
    return Figures(
        metric=quality.candidate_metric,
        float_metric=quality.reference_metric,
        agreement=quality.agreement,
        sqnr_db=quality.sqnr_db,
        speedup=figures["speedup", "this"],
        ms=figures["latency_ms", "this"],
        mib=path.stat().st_size / MIB,
    )


def model_file(bundle: Bundle) -> Path:
    return open_bundle(bundle.path).model_path
