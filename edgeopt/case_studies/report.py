"""What the study found, as one page."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeopt.case_studies.corpus import Task
from edgeopt.case_studies.entries import SHARES, Curve, Entry, entries
from edgeopt.case_studies.outcome import CORE, Figure, Outcome
from edgeopt.case_studies.page import Block, Code, Heading, Paragraph, Picture, Table
from edgeopt.report.units import quantity
from edgeopt.types import PartName

#: What a text is worth: the metric that decides, and another one.
METRICS: Mapping[Task, tuple[str, str]] = {"translation": ("bleu", "chrf"), "summarization": ("rougeL", "rouge1")}
#: Of a whole text; of the encoder; of one more token.
_SENTENCE, _ENCODER, _TOKEN = "latency_ms", "encoder_latency_ms", "decoder_step_ms"
_NAMES = {"bleu": "BLEU", "chrf": "chrF", "rougeL": "ROUGE-L", "rouge1": "ROUGE-1"}
_MOST_EXAMPLES = 8
_PARTS: tuple[PartName, ...] = ("encoder", "decoder")


@dataclass(frozen=True, slots=True)
class Goal:
    """What the whole recipe has to reach; `measured` is None where that is not known."""

    name: str
    limit: float
    measured: float | None
    unit: str

    @property
    def is_met(self) -> bool:
        return self.measured is not None and self.measured >= self.limit


@dataclass(frozen=True, slots=True)
class Study:
    """All that the page tells.

    Attributes:
        outcomes: name of an entry -> what came out; entries that were not run are missing.
        data: name of a file -> SHA-256. teacher: the same of the teacher's files.
        checkpoint_bytes: size of the teacher's weights as they were saved.
        settings: name -> value, of the run.
    """

    task: Task
    title: str
    outcomes: Mapping[str, Outcome]
    data: Mapping[str, str]
    teacher: Mapping[str, str]
    checkpoint_bytes: int
    settings: Mapping[str, str]
    tools: Mapping[str, str]
    commands: str


def goals(study: Study) -> tuple[Goal, ...]:
    """The three that ExpressText's own figures are beaten by, and that the teacher is worth beating."""
    last = study.outcomes.get("all")
    found = (
        Goal("smaller", 8.0, None if last is None else study.checkpoint_bytes / last.size_bytes, "x"),
        Goal("faster", 4.0, None if last is None else _speedup(last), "x"),
        Goal("kept", 0.99, None if last is None else _kept(last, study.task), "fraction"),
    )
    if study.task != "translation":
        return found
    first = study.outcomes.get("float")
    return (*found, Goal("teacher's BLEU", 33.0, None if first is None else _score(first, "bleu"), ""))


def page_of(study: Study) -> list[Block]:
    return [
        Heading(f"ExpressText: {study.title}", 1),
        Paragraph(_summary(study)),
        *_comparison(study),
        *_steps(study),
        *_curves(study),
        *_sparsity(study),
        *_examples(study),
        *_how(study),
    ]


def _summary(study: Study) -> str:
    reached = ", ".join(
        f"{goal.name}: {quantity(goal.measured, goal.unit)} (goal {quantity(goal.limit, goal.unit)})"
        for goal in goals(study)
    )
    return (
        f"A teacher, the files made of it with one recipe, and that recipe's steps one by one. {reached}. Texts were "
        "written by the exported files in their runtimes, one sentence at a time, on one thread. Times are medians "
        "with quartiles on this machine; the teacher's float files ran in turns with each entry's. Instructions are "
        f"those of an emulated {CORE}, for one run of a part."
    )


def _comparison(study: Study) -> list[Block]:
    """ExpressText's figures as its authors give them, beside ours."""
    last, first = study.outcomes.get("all"), study.outcomes.get("float")
    smaller, faster, kept = goals(study)[:3]
    rows = (
        ("float model", "1.5 GB", _bytes(study.checkpoint_bytes)),
        ("shipped files", "300 MB", _bytes(None if last is None else last.size_bytes)),
        ("smaller", "5x", quantity(smaller.measured, "x")),
        ("faster", "3x on a phone", f"{quantity(faster.measured, 'x')} here{_on_core(first, last)}"),
        ("accuracy kept", "97 %", quantity(kept.measured, "fraction")),
    )
    note = (
        "The float model is the checkpoint, in which the embeddings are stored once; the exported encoder and decoder "
        "each hold them, which counts against us."
    )
    return [Heading("Beside ExpressText"), Table(("", "ExpressText", "here"), rows), Paragraph(note)]


def _on_core(first: Outcome | None, last: Outcome | None) -> str:
    """Ratios of instructions, by part."""
    if first is None or last is None or not last.instructions or not first.instructions:
        return ""
    ratios = (f"{part} {first.instructions[part] / last.instructions[part]:.1f}x" for part in _PARTS)
    return f"; fewer instructions on {CORE}: {', '.join(ratios)}"


def _steps(study: Study) -> list[Block]:
    metric, other = METRICS[study.task]
    columns = (
        "entry", "target", "size", "smaller", _NAMES[metric], "kept", _NAMES[other], "ms per text", "faster",
        "encoder ms", "token ms", "M instructions, encoder", "M instructions, decoder step",
    )  # fmt: skip
    rows = [_row(study, entry) for entry in entries() if entry.curve is None and entry.name in study.outcomes]
    missing = [entry.title.lower() for entry in entries() if entry.name not in study.outcomes]
    reasons = dict.fromkeys(one.not_counted for one in study.outcomes.values() if one.not_counted is not None)
    notes = [Paragraph(f"Instructions are missing where they could not be counted: {reason}.") for reason in reasons]
    if missing:
        notes.append(Paragraph(f"Not run: {'; '.join(missing)}."))
    return [Heading("Steps and combinations"), Table(columns, tuple(rows), left=2), *notes]


def _row(study: Study, entry: Entry) -> tuple[str, ...]:
    outcome, (metric, other) = study.outcomes[entry.name], METRICS[study.task]
    shipped = outcome.shipped
    return (
        entry.title,
        outcome.target,
        _bytes(outcome.size_bytes),
        f"{study.checkpoint_bytes / outcome.size_bytes:.2f}x",
        _points(_score(outcome, metric)),
        quantity(_kept(outcome, study.task), "fraction"),
        _points(_score(outcome, other)),
        _time(shipped.get(_SENTENCE)),
        quantity(_speedup(outcome), "x"),
        _time(shipped.get(_ENCODER)),
        _time(shipped.get(_TOKEN)),
        *(_millions(outcome.instructions.get(part)) for part in _PARTS),
    )


def _curves(study: Study) -> list[Block]:
    metric = METRICS[study.task][0]
    first = study.outcomes.get("float")
    start = None if first is None else _score(first, metric)
    series: dict[str, list[float | None]] = {}
    for curve, told in _CURVES.items():
        points = [_on_curve(study, curve, share) for share in SHARES]
        if any(point is not None for point in points):
            series[told] = [start, *(None if point is None else _score(point, metric) for point in points)]
    if not series:
        return []
    names = ["0 %", *(f"{100 * share:.0f} %" for share in SHARES)]
    drawn = {told: [math.nan if value is None else value for value in values] for told, values in series.items()}
    svg = _drawn(names, drawn, f"{_NAMES[metric]} by share of zero weights", _NAMES[metric])
    rows = tuple((told, *map(_points, values)) for told, values in series.items())
    return [
        Heading("Pruning single weights"),
        Picture("expresstext-pruning.svg", f"{_NAMES[metric]} by the share of weights that are zero", svg),
        Table(("zeros", *names), rows),
    ]


_CURVES: Mapping[Curve, str] = {"one-shot": "at once, untrained", "cubic": "cubic schedule, trained"}


def _on_curve(study: Study, curve: Curve, share: float) -> Outcome | None:
    name = next(entry.name for entry in entries() if entry.curve == curve and entry.share == share)
    return study.outcomes.get(name)


def _sparsity(study: Study) -> list[Block]:
    """The same network with and without zeros, on every runtime that both were built for."""
    pairs = [("float", "sparsity"), ("float-onnx", "sparsity-onnx"), ("float-executorch", "sparsity-executorch")]
    rows = []
    for one, other in pairs:
        dense, sparse = study.outcomes.get(one), study.outcomes.get(other)
        if dense is None or sparse is None:
            continue
        rows.append(
            (
                sparse.runtime,
                f"{sparse.size_bytes / dense.size_bytes:.2f}",
                f"{sparse.packed_bytes / dense.packed_bytes:.2f}",
                quantity(_speedup(sparse), "x"),
                *(_ratio(sparse.instructions.get(part), dense.instructions.get(part)) for part in _PARTS),
            )
        )
    if not rows:
        return []
    columns = (
        "runtime", "file, of dense", "packed file, of dense", "speed", "instructions, encoder, of dense",
        "instructions, decoder step, of dense",
    )  # fmt: skip
    told = (
        "A zero is stored and multiplied like any other number unless a runtime has kernels for sparse weights. What "
        "zeros save elsewhere is what packing saves: the download, not the memory and not the time."
    )
    return [Heading("What unstructured zeros buy"), Table(columns, tuple(rows)), Paragraph(told)]


def _examples(study: Study) -> list[Block]:
    last = study.outcomes.get("all")
    if last is None or not last.examples:
        return []
    rows = tuple(
        (example.source, example.reference or "", example.float_text, example.text)
        for example in last.examples[:_MOST_EXAMPLES]
    )
    columns = ("source", "reference", "teacher, float", "shipped")
    return [Heading("Before and after"), Table(columns, rows, left=4)]


def _how(study: Study) -> list[Block]:
    last = study.outcomes.get("all")
    hashes = (
        *(("data", name, digest) for name, digest in study.data.items()),
        *(("teacher", name, digest) for name, digest in study.teacher.items()),
        *(("shipped", name, digest) for name, digest in (sorted(last.files.items()) if last is not None else ())),
    )
    facts = (*study.settings.items(), *study.tools.items())
    return [
        Heading("How to get the same"),
        Code(study.commands),
        Table(("", "value"), facts, left=2),
        Table(("", "file", "SHA-256"), hashes, left=3),
    ]


def _drawn(names: Sequence[str], series: Mapping[str, Sequence[float]], title: str, axis: str) -> str:
    from edgeopt.report.plot import save_lines

    with tempfile.TemporaryDirectory(prefix="edgeopt-") as folder:
        path = Path(folder) / "curve.svg"
        save_lines(path, names, series, title=title, axis=axis)
        return path.read_text(encoding="utf-8")


def _speedup(outcome: Outcome) -> float | None:
    """Of a whole text, against the teacher's float files in the same run."""
    measured = outcome.shipped.get("speedup")
    return None if measured is None else measured.value


def _kept(outcome: Outcome, task: Task) -> float | None:
    own, teacher = (figures.get(METRICS[task][0]) for figures in (outcome.shipped, outcome.teacher))
    return None if own is None or teacher is None or not teacher.value else own.value / teacher.value


def _score(outcome: Outcome, metric: str) -> float | None:
    """In points, as the literature has it: 33.1, not 0.331."""
    figure = outcome.shipped.get(metric)
    return None if figure is None else 100 * figure.value


def _points(score: float | None) -> str:
    return "-" if score is None else f"{score:.1f}"


def _time(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    spread = "" if figure.spread is None else f" ({figure.spread[0]:.2f}-{figure.spread[1]:.2f})"
    return f"{figure.value:.2f}{spread}"


def _millions(number: int | None) -> str:
    return "-" if number is None else f"{number / 1e6:.1f}"


def _ratio(number: int | None, of: int | None) -> str:
    return "-" if number is None or not of else f"{number / of:.2f}"


def _bytes(number: int | None) -> str:
    return "-" if number is None else quantity(number, "bytes")
