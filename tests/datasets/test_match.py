"""Class names decide which of the model's classes a sample is of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeopt.datasets import match_labels, open_dataset, select
from edgeopt.datasets.base import Dataset
from edgeopt.errors import DataError
from edgeopt.types import TensorSpec

INPUTS = (TensorSpec("x", (1, 1), "float32"),)


def of(tmp_path: Path, labels: list[str] | list[int]) -> Dataset:
    np.savez(tmp_path / "d.npz", x=np.arange(len(labels), dtype=np.float32)[:, None], y=np.array(labels))
    return open_dataset(str(tmp_path / "d.npz"), INPUTS, None)


def test_names_become_the_models_indices(tmp_path: Path) -> None:
    dataset = of(tmp_path, ["cat", "dog", "ant", "cat"])
    matched = match_labels(dataset, ("dog", "cat", "bee", "ant"))
    assert [sample.label for sample in matched] == [1, 0, 3, 1]
    assert [matched[i].label for i in range(4)] == [1, 0, 3, 1]
    assert matched.class_names == ("dog", "cat", "bee", "ant")
    assert matched.fingerprint() == dataset.fingerprint()


def test_a_choice_of_them_is_stratified_and_matched(tmp_path: Path) -> None:
    matched = match_labels(of(tmp_path, ["cat"] * 10 + ["dog"] * 10), ("dog", "cat"))
    chosen = select(matched, 4, 0)
    assert sorted(sample.label for sample in chosen) == [0, 0, 1, 1]
    assert all(sample.label == (1 if index < 10 else 0) for sample, index in zip(chosen, chosen.indices, strict=True))


def test_case_and_underscores_make_no_difference(tmp_path: Path) -> None:
    matched = match_labels(of(tmp_path, ["ant", "polar_bear"]), ("Polar Bear", "Ant"))
    assert [sample.label for sample in matched] == [1, 0]


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (["cat", "dog"], ()),
        ([1, 0], ("dog", "cat")),
        (["n01", "n02"], ("dog", "cat")),
        (["cat", "dog"], ("cat", "dog")),
    ],
)
def test_without_common_names_the_numbers_count(
    tmp_path: Path, data: list[str] | list[int], labels: tuple[str, ...]
) -> None:
    dataset = of(tmp_path, data)
    assert match_labels(dataset, labels) is dataset


def test_names_of_which_only_some_are_the_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 classes that are not among the model's labels: 'cow'"):
        match_labels(of(tmp_path, ["cat", "cow"]), ("dog", "cat"))


def test_a_name_of_two_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'crane' could be several of the model's classes"):
        match_labels(of(tmp_path, ["crane", "ant"]), ("crane", "ant", "crane"))
