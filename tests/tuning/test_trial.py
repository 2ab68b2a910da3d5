"""Scoring, recording and resuming."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from edgeopt.errors import DataError, UsageError
from edgeopt.runtimes.base import Session
from edgeopt.tuning.analysis import metric_source
from edgeopt.tuning.journal import Journal
from edgeopt.tuning.samples import Recording
from edgeopt.tuning.trial import FOLDS, Score, Terms, Trials, score
from edgeopt.types import Array, Artifact, EstimatorSpec, LayerRules, Sample, Scheme, Signature
from edgeopt.validation.metrics import load_metric


class Model(Session):
    """Answers by a function of its one input."""

    def __init__(self, answer: Callable[[Array], Array]) -> None:
        super().__init__(Signature((), ()))
        self._answer = answer

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"scores": self._answer(inputs["x"])}

    def encode(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(inputs)

    def decode(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(outputs)

    def close(self) -> None:
        """Nothing to free."""


def _samples(count: int = 12) -> list[Sample]:
    random = np.random.default_rng(0)
    inputs = [random.normal(size=(1, 5)).astype(np.float32) for _ in range(count)]
    return [Sample({"x": x}, int(x.argmax()), f"row {k}") for k, x in enumerate(inputs)]


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return Recording(_samples(), Model(lambda x: x), tmp_path)


def test_a_recording_gives_back_samples_and_what_the_float_model_said(recording: Recording) -> None:
    pairs = list(recording)
    assert len(pairs) == len(recording) == 12
    for original, (sample, expected) in zip(_samples(), pairs, strict=True):
        assert np.array_equal(sample.inputs["x"], original.inputs["x"])
        assert np.array_equal(expected["scores"], original.inputs["x"])
        assert (sample.label, sample.name) == (original.label, original.name)


def test_a_recording_is_known_by_its_content(tmp_path: Path, recording: Recording) -> None:
    (tmp_path / "again").mkdir()
    (tmp_path / "other").mkdir()
    assert Recording(_samples(), Model(lambda x: x), tmp_path / "again").fingerprint == recording.fingerprint
    assert Recording(_samples(), Model(lambda x: 2 * x), tmp_path / "other").fingerprint != recording.fingerprint


def test_a_recording_is_known_by_every_value_of_its_labels(tmp_path: Path) -> None:
    # Regression: of a label with more than 1000 values only the ends counted.
    prints = set()
    for value in (0, 1):
        label = np.zeros(5000, np.int64)
        label[2500] = value
        folder = tmp_path / str(value)
        folder.mkdir()
        sample = Sample({"x": np.ones((1, 5), np.float32)}, label, "a")
        prints.add(Recording([sample], Model(lambda x: x), folder).fingerprint)
    assert len(prints) == 2


class Bench:
    """Makes nothing; all files are alike."""

    rules = LayerRules()

    def quantized_artifact(self, *_: object) -> tuple[Artifact, tuple[()]]:
        return Artifact(Path("q"), "onnx", "w8a8", Signature((), ()), 1, "0", (), {}, ()), ()


def test_finished_trials_are_kept_apart_by_metric_and_its_code(tmp_path: Path, recording: Recording) -> None:
    # Regression: a drop by one metric was taken for the drop by another.
    code = tmp_path / "mine.py"

    def journals(metric: str) -> int:
        terms = Terms(
            "onnx", Scheme("w8a8", "static"), "onnxruntime", recording, load_metric(metric), 1, tmp_path / "state",
            metric_source(metric),
        )  # fmt: skip
        trials = Trials(Bench(), EstimatorSpec(), terms)  # type: ignore[arg-type]
        journal = trials._journal
        assert journal is not None
        journal.add("a", _score(20.0, (20.0,) * 4))
        return len(list((tmp_path / "state").iterdir()))

    assert journals("top1") == journals("top1") == 1
    assert journals("top2") == 2
    for number, text in enumerate(("return 0.0", "return 1.0"), start=3):
        code.write_text(f"def f(outputs, label):\n    {text}\n")
        assert journals(f"{code}:f") == number
        assert journals(f"{code}:f") == number


@pytest.mark.parametrize(("samples", "answer"), [([], 1.0), (_samples(2), np.nan)])
def test_nothing_can_be_tuned_on_no_samples_or_nan(tmp_path: Path, samples: list[Sample], answer: float) -> None:
    with pytest.raises(DataError):
        Recording(samples, Model(lambda x: x * answer), tmp_path)


def test_a_score_holds_fidelity_folds_and_metric(recording: Recording) -> None:
    found = score(Model(lambda x: x * np.float32(0.9)), recording, load_metric("top1"), 77)
    assert (found.samples, found.size_bytes, found.agreement, found.drop) == (12, 77, 1.0, 0.0)
    assert found.sqnr_db == pytest.approx(20.0, abs=1e-4)
    assert len(found.folds_db) == FOLDS
    assert found.noise == pytest.approx(0.01, rel=1e-4)


def test_the_drop_is_that_of_the_metric(recording: Recording) -> None:
    found = score(Model(lambda x: -x), recording, load_metric("top1"), 0)
    assert found.drop == 1.0
    assert found.agreement == 0.0
    assert score(Model(lambda x: -x), recording, None, 0).drop is None


def _score(db: float, folds: tuple[float, ...]) -> Score:
    return Score(100, db, folds, 0.9, None, 1)


def test_better_means_better_everywhere() -> None:
    plain = _score(20.0, (20.0, 20.0, 20.0, 20.0))
    assert _score(20.5, (20.1, 20.7, 20.6, 20.4)).beats(plain)
    assert not _score(20.5, (19.9, 20.7, 20.6, 20.4)).beats(plain)
    assert not _score(20.01, (20.01, 20.01, 20.01, 20.01)).beats(plain)


def test_a_gain_on_few_samples_must_be_clear() -> None:
    # Regression: with one sample the folds were one, and any gain was more than chance.
    def few(db: float) -> Score:
        return Score(3, db, (db,) * 3, 1.0, None, 1)

    assert not few(20.9).beats(few(20.0))
    assert few(21.1).beats(few(20.0))


@pytest.mark.parametrize(
    ("samples", "agreement", "before", "better"),
    [(256, 0.97, 0.95, True), (256, 0.955, 0.95, False), (1, 1.0, 0.0, False), (20, 1.0, 0.95, False)],
)
def test_integer_outputs_must_agree_more_than_chance_would_have_it(
    samples: int, agreement: float, before: float, better: bool
) -> None:
    # Regression: without real outputs there are no folds, and any gain was more than chance.
    one, other = (Score(samples, None, (), share, None, 1) for share in (agreement, before))
    assert one.beats(other) is better
    assert not other.beats(one)


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_a_journal_remembers(tmp_path: Path) -> None:
    path = tmp_path / "state" / "trials.jsonl"
    kept = _score(20.5, (20.1, 20.7, 20.6, 20.4))
    Journal(path, Score).add("a", kept)
    again = Journal(path, Score)
    assert again.get("a") == kept
    assert again.get("b") is None


def test_a_line_that_was_cut_short_is_dropped_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    journal = Journal(path, Score)
    for name in ("a", "b"):
        journal.add(name, _score(20.0, (20.0,) * 4))
    path.write_text(path.read_text()[:-20])
    again = Journal(path, Score)
    assert again.get("a") is not None
    assert again.get("b") is None
    again.add("b", _score(21.0, (21.0,) * 4))
    assert Journal(path, Score).get("b") is not None


@pytest.mark.parametrize(
    "content", ['{"something": "else"}\n', "not JSON\n", '{"trial": "a", "result": {"samples": 1}}\n']
)
def test_a_file_of_somebody_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"trials\.jsonl:1"):
        Journal(path, Score)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="resume"):
        Journal(tmp_path / "file" / "trials.jsonl", Score)
