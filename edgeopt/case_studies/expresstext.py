"""The study: a teacher, one recipe whole and in parts, and a page about what came out.

The teacher, the data and the recipe are laid into one folder, from which everything else is ordinary `edgeopt export`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Literal

from edgeopt.bundle.generation_reader import open_generation_bundle
from edgeopt.case_studies import made_up, multi30k, summarization
from edgeopt.case_studies.corpus import Corpus, Task
from edgeopt.case_studies.entries import Entry, brief, config_of_entry, entries, key_of, tool_versions
from edgeopt.case_studies.outcome import Outcome, load_outcome, read_outcome, save_outcome
from edgeopt.case_studies.page import Picture, html_page, markdown
from edgeopt.case_studies.report import METRICS, Goal, Study, goals, page_of
from edgeopt.case_studies.teacher import UNFINISHED, TeacherConfig, train_teacher
from edgeopt.case_studies.whole_file import write_whole
from edgeopt.config import RunConfig, load_config
from edgeopt.emulator.download import sha256_of
from edgeopt.errors import ConfigError, UsageError
from edgeopt.json_data import dumps
from edgeopt.pipeline import export
from edgeopt.progress import Progress, Silent
from edgeopt.types import Bundle

Scale = Literal["smoke", "full"]
Exporter = Callable[[RunConfig, Progress], Sequence[Bundle]]

RECIPE, STUDENT, TEACHER = "edgeopt.toml", "student.py", "teacher"
_CLAIM, _RESULTS = "study.json", "results"
_WEIGHTS = "model.safetensors"
#: Of the teacher: what decides what it writes.
_TEACHER_FILES = ("config.json", _WEIGHTS, "tokenizer.json")
_SMOKE_PAIRS = 300
_SMOKE_TEACHER = TeacherConfig(
    vocabulary=500, width=32, layers=1, heads=2, feed_forward=64,
    epochs=20, tokens_per_batch=800, lr=5e-3, warmup_steps=10, dropout=0.0,
)  # fmt: skip
#: A smoke run does these: every kind of step, and a point of a curve.
_SMOKE_ENTRIES = ("float", "all", "sparsity-40-one-shot")
#: Tokens that are read and written at most.
_SUMMARY_LENGTHS = {"max_source_length": 128, "max_target_length": 40}


@dataclass(frozen=True, slots=True)
class Result:
    """Where the page is, and what it says.

    Attributes:
        goals: judged at full scale only.
    """

    page: Path
    html: Path
    study: Study
    goals: tuple[Goal, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for.

    Attributes:
        data: folder with the data's files; None downloads them, and makes sentences up at the scale "smoke".
        teacher: folder as `save_pretrained` leaves it, with a tokenizer.json; None trains one.
        only: names of entries; empty means all.
    """

    task: Task = "translation"
    scale: Scale = "full"
    data: Path | None = None
    teacher: Path | None = None
    only: tuple[str, ...] = ()


def run(order: Order, directory: Path, progress: Progress | None = None, exporter: Exporter = export) -> Result:
    """Do what is not done yet, and write the page.

    Whatever is finished stays: the teacher, the steps, each entry's result. The folder's recipe is used as it is, so
    that it can be changed; what depends on the change is done anew.

    Args:
        directory: gets teacher/, data/, the recipe, student.py, bundles/, results/, expresstext.md and .html.

    Raises:
        UsageError: an entry that there is none of, a folder with another study or another teacher.
        any error of the data sets and of `export`.
    """
    progress = progress or Silent()
    chosen = _chosen(order)
    corpus = _corpus(order, progress)
    _claim(order, directory)
    corpus.write(directory / "data")
    _teach(order, corpus, directory / TEACHER, progress)
    _lay_out(directory)
    recipe = _recipe(order, directory)
    inputs = _digest(directory)
    outcomes: dict[str, Outcome] = {}
    for number, entry in enumerate(chosen, 1):
        progress.step(f"Entry {number} of {len(chosen)}: {entry.title}")
        outcomes[entry.name] = _outcome(entry, config_of_entry(recipe, entry), inputs, directory, exporter, progress)
    outcomes = {**_finished(recipe, inputs, directory), **outcomes}
    study = _study(order, corpus, directory, recipe, outcomes)
    return _write(study, directory)


def _claim(order: Order, directory: Path) -> None:
    """Raises UsageError where the folder is another study's: its teacher would be taken for this one's."""
    mine = dumps({"task": order.task, "scale": order.scale})
    path = directory / _CLAIM
    if not path.exists():
        write_whole(path, mine)
    elif path.read_text(encoding="utf-8") != mine:
        raise UsageError(
            "holds the study of another task or scale", where=str(directory), fix="give another --output-dir"
        )


def _chosen(order: Order) -> tuple[Entry, ...]:
    known = {entry.name: entry for entry in entries()}
    names = order.only or (_SMOKE_ENTRIES if order.scale == "smoke" else tuple(known))
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"give one of {', '.join(known)}"
            raise UsageError("there is no such entry", where=f"--only {name}", fix=fix)
    return tuple(known[name] for name in dict.fromkeys(names))


def _corpus(order: Order, progress: Progress) -> Corpus:
    if order.scale == "smoke" and order.data is None:
        return made_up.load(order.task, _SMOKE_PAIRS)
    load = multi30k.load if order.task == "translation" else summarization.load
    corpus = load(order.data, progress)
    if order.scale == "full":
        return corpus
    return replace(corpus, train=corpus.train[:_SMOKE_PAIRS], validation=corpus.validation[:30], test=corpus.test[:30])


def _teach(order: Order, corpus: Corpus, directory: Path, progress: Progress) -> None:
    """Train the teacher, or take the one that was given."""
    # Weights that a killed run was about to write have its state beside them.
    finished = (directory / _WEIGHTS).is_file() and not (directory / UNFINISHED).exists()
    if order.teacher is None:
        if not finished:
            config = _SMOKE_TEACHER if order.scale == "smoke" else TeacherConfig()
            train_teacher(corpus.train, config, directory, progress)
        return
    missing = [name for name in _TEACHER_FILES if not (order.teacher / name).is_file()]
    if missing:
        fix = "give a folder as Hugging Face's save_pretrained leaves it, with its fast tokenizer"
        raise UsageError(f"has no {missing[0]}", where=str(order.teacher), fix=fix)
    if not finished:
        part = directory.with_name(f"{TEACHER}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(order.teacher, part, ignore=shutil.ignore_patterns(UNFINISHED))
        shutil.rmtree(directory, ignore_errors=True)
        part.rename(directory)
    elif any(sha256_of(directory / name) != sha256_of(order.teacher / name) for name in _TEACHER_FILES):
        raise UsageError(
            "holds another teacher already",
            where=str(directory),
            fix="give another --output-dir, or leave --teacher out",
        )


def _lay_out(directory: Path) -> None:
    """The recipe and the student beside the teacher, where they are not there yet."""
    for name in (RECIPE, STUDENT):
        path = directory / name
        if not path.exists():
            write_whole(path, (files("edgeopt.case_studies") / "recipe" / name).read_text(encoding="utf-8"))


def _recipe(order: Order, directory: Path) -> RunConfig:
    overrides: dict[str, object] = {"output_dir": str(directory.absolute()), "metric": METRICS[order.task][0]}
    if order.task == "summarization":
        overrides |= _SUMMARY_LENGTHS
    recipe = load_config((directory / RECIPE).absolute(), overrides)
    return brief(recipe) if order.scale == "smoke" else recipe


def _outcome(
    entry: Entry, config: RunConfig, inputs: str, directory: Path, exporter: Exporter, progress: Progress
) -> Outcome:
    """What was kept of that entry, or what a run of it gives."""
    key, results = key_of(config, inputs), directory / _RESULTS
    kept = load_outcome(key, results)
    if kept is None:
        (bundle,) = exporter(config, progress)
        kept = read_outcome(entry.name, key, open_generation_bundle(bundle.path), progress)
        save_outcome(kept, results)
    return kept


def _finished(recipe: RunConfig, inputs: str, directory: Path) -> dict[str, Outcome]:
    """What earlier runs have left of entries that fit this recipe, for the page."""
    found: dict[str, Outcome] = {}
    for entry in entries():
        with suppress(ConfigError):  # the recipe may lack that entry's step
            kept = load_outcome(key_of(config_of_entry(recipe, entry), inputs), directory / _RESULTS)
            if kept is not None:
                found[entry.name] = kept
    return found


def _digest(directory: Path) -> str:
    """Of the teacher, the data and the code beside the recipe: the student's, and what it or a loss is made of."""
    whole = hashlib.sha256()
    data, code = (directory / "data").glob("*.jsonl"), directory.glob("*.py")
    for path in (*_teacher_files(directory), *sorted(data), *sorted(code)):
        whole.update(f"{path.name} {sha256_of(path)}\n".encode())
    return whole.hexdigest()


def _teacher_files(directory: Path) -> Collection[Path]:
    return [directory / TEACHER / name for name in _TEACHER_FILES]


def _study(order: Order, corpus: Corpus, directory: Path, recipe: RunConfig, outcomes: dict[str, Outcome]) -> Study:
    settings = {
        "data": corpus.title,
        "pairs": f"{len(corpus.train)} to train, {len(corpus.validation)} to validate, {len(corpus.test)} to test",
        "scale": order.scale,
        "seed": str(recipe.seed),
        "beams": str(recipe.num_beams),
        "threads": str(recipe.threads),
    }
    return Study(
        task=order.task,
        title=corpus.title,
        outcomes=outcomes,
        data=corpus.files,
        teacher={path.name: sha256_of(path) for path in _teacher_files(directory)},
        checkpoint_bytes=(directory / TEACHER / _WEIGHTS).stat().st_size,
        settings=settings,
        tools=tool_versions(),
        commands=_commands(order),
    )


def _commands(order: Order) -> str:
    words = ["edgeopt case-study expresstext"]
    if order.task != "translation":
        words.append(f"--task {order.task}")
    if order.scale != "full":
        words.append(f"--scale {order.scale}")
    words += [f"--only {name}" for name in order.only]
    return f"{' '.join(words)} --output-dir DIR\ncd DIR && edgeopt export    # the recipe alone, once more"


def _write(study: Study, directory: Path) -> Result:
    blocks = page_of(study)
    page, html = directory / "expresstext.md", directory / "expresstext.html"
    contents = {page: markdown(blocks), html: html_page("ExpressText", blocks)}
    contents |= {directory / block.file: block.svg for block in blocks if isinstance(block, Picture)}
    for path, text in contents.items():
        write_whole(path, text)
    return Result(page, html, study, goals(study))
