import sys

import numpy as np
import pytest

from edgeopt.errors import DataError, UsageError
from edgeopt.types import Sample
from edgeopt.validation.metrics import load_metric


def score(spec, rows, labels, name="logits"):
    metric = load_metric(spec)()
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        metric.update({"boxes": np.zeros(3), name: np.asarray(row, dtype=np.float32)}, Sample({}, label, f"s{i}"))
    return metric.value()


def test_top_k_against_a_sort():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 1, 20))
    labels = [int(label) for label in rng.integers(0, 20, 200)]
    order = np.argsort(-rows[:, 0], axis=1)
    for k in (1, 3, 5):
        expected = np.mean([label in row[:k] for row, label in zip(order, labels, strict=True)])
        assert score(f"top{k}", rows, labels) == pytest.approx(expected)


def test_equal_scores_rank_as_argmax_does():
    assert score("top1", [[[1, 1, 0]]], [0]) == 1
    assert score("top1", [[[1, 1, 0]]], [1]) == 0


def test_nan_is_never_right():
    assert score("top1", [[[np.nan, 1, 0]]], [0]) == 0
    assert score("top5", [[[np.nan, 1, 0]]], [1]) == 0


def test_labels_per_position_skip_negative_ones():
    rows = [np.eye(3)[[0, 1, 2, 0]][None]]
    assert score("top1", rows, [np.array([[0, 1, 1, -100]])]) == pytest.approx(2 / 3)


def test_an_output_can_be_named():
    assert score("top1@scores", [[[0, 1]]], [1], name="scores") == 1
    with pytest.raises(UsageError, match=r"top1@other: no output 'other'; it has boxes, logits"):
        score("top1@other", [[[0, 1]]], [1])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "sample 's0': has no label"),
        (2, "has label 2, but the model tells 2 classes apart"),
        (np.array([0, 1]), "has 2 labels for 1 rows"),
        (np.array(0.5), "its label is float64, not a class index"),
    ],
)
def test_labels_that_do_not_fit(label, message):
    with pytest.raises(DataError, match=message):
        score("top1", [[[0, 1]]], [label])


def test_nothing_to_score():
    with pytest.raises(DataError, match="holds no labels"):
        load_metric("top1")().value()
    with pytest.raises(UsageError, match="no output has a class axis"):
        load_metric("top1")().update({"y": np.zeros((1, 1))}, Sample({}, 0, "s"))


@pytest.mark.parametrize(("spec", "near"), [("top-1", "top1"), ("top", "top1"), ("acc", "top"), ("Top5", "top5")])
def test_an_unknown_metric_names_the_nearest(spec, near):
    with pytest.raises(UsageError, match=f"unknown metric '{spec}'; did you mean {near}"):
        load_metric(spec)


def test_top_0_is_refused():
    with pytest.raises(UsageError, match="k starts at 1"):
        load_metric("top0")


CODE = """
import numpy as np
from dataclasses import dataclass

def error(outputs, label):
    return float(np.abs(outputs["y"] - label).mean())
error.higher_is_better = False

@dataclass
class Last:
    seen: float = 0.0
    def update(self, outputs, label):
        self.seen = float(outputs["y"][0])
    def value(self):
        return self.seen

class Half:
    def update(self, outputs, label): ...

class Picky:
    def __init__(self, needed): ...

def fails(outputs, label):
    return outputs["logits"]

def not_finite(outputs, label):
    return float("nan")

constant = 3
"""


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "my_metrics.py"
    path.write_text(CODE)
    return path


def run_user(spec):
    metric = load_metric(spec)()
    for y, label in ((1.0, 2.0), (5.0, 2.0)):
        metric.update({"y": np.array([y])}, Sample({}, np.array(label), "s"))
    return metric, metric.value()


def test_a_function_of_the_users_is_averaged(code):
    metric, value = run_user(f"{code}:error")
    assert value == 2.0
    assert metric.higher_is_better is False
    assert metric.name == f"{code}:error"


def test_a_class_of_the_users_accumulates(code):
    metric, value = run_user(f"{code}:Last")
    assert value == 5.0
    assert metric.higher_is_better is True


def test_a_module_of_the_users(code, monkeypatch):
    monkeypatch.chdir(code.parent)
    before = list(sys.path)
    assert run_user("my_metrics:error")[1] == 2.0
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "has no function or class 'missing'; it has error, Last"),
        ("constant", "is a int, not a function or a class"),
        ("Half", r"lacks update\(\) or value\(\)"),
        ("Picky", r"takes the arguments \w+, and is called without any"),
        ("fails", r"failed on sample 's' at my_metrics.py:\d+: KeyError: 'logits'"),
        ("not_finite", "is nan; it must be a finite number"),
    ],
)
def test_what_is_wrong_with_the_users_code_is_said(code, name, message):
    with pytest.raises(UsageError, match=message):
        run_user(f"{code}:{name}")


def test_code_that_is_not_there_or_does_not_run(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load_metric(f"{tmp_path}/none.py:f")
    with pytest.raises(UsageError, match="no module named 'no_such_module_here'; install it"):
        load_metric("no_such_module_here:f")
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(UsageError, match=r"running the file failed at broken\.py:1: ZeroDivisionError"):
        load_metric(f"{broken}:f")
