"""Choosing samples: seeded, stratified, disjoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeopt.datasets import open_dataset, select
from edgeopt.datasets.base import Dataset
from edgeopt.errors import DataError, UsageError
from edgeopt.types import Sample, TensorSpec

INPUTS = (TensorSpec("x", (1, 1), "float32"),)


def labelled(tmp_path: Path, labels: list[int] | None, count: int = 0) -> Dataset:
    arrays = {"x": np.arange(len(labels) if labels else count, dtype=np.float32)[:, None]}
    if labels:
        arrays["y"] = np.array(labels)
    np.savez(tmp_path / "d.npz", **arrays)
    return open_dataset(str(tmp_path / "d.npz"), INPUTS, None)


def test_every_class_keeps_its_share(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, [0] * 600 + [1] * 300 + [2] * 100)
    for seed in range(20):
        chosen = select(dataset, 50, seed)
        counts = Counter(sample.label for sample in chosen)
        assert all(abs(counts[c] - share) <= 1 for c, share in ((0, 30), (1, 15), (2, 5)))


def test_more_classes_than_samples_gives_each_class_once_at_most(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, [i // 4 for i in range(400)])
    assert len({sample.label for sample in select(dataset, 60, 3)}) == 60


def test_the_choice_within_a_class_depends_on_the_seed(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, [0, 1] * 100)
    assert select(dataset, 20, 7).indices == select(dataset, 20, 7).indices
    assert set(select(dataset, 20, 7).indices) != set(select(dataset, 20, 8).indices)


def test_the_order_is_shuffled(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, [0] * 50 + [1] * 50)
    for count in (None, 20):
        indices = select(dataset, count, 0).indices
        assert list(indices) != sorted(indices)


def test_none_and_too_many_mean_all(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, None, count=9)
    for count in (None, 9, 1000):
        assert sorted(select(dataset, count, 1).indices) == list(range(9))


def test_excluded_samples_stay_out(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, [0, 1] * 10)
    calibration = select(dataset, 8, 0)
    evaluation = select(dataset, None, 0, exclude=frozenset(calibration.indices))
    assert sorted((*calibration.indices, *evaluation.indices)) == list(range(20))
    with pytest.raises(DataError, match="none of the 20 samples is left"):
        select(dataset, None, 0, exclude=frozenset(range(20)))


def test_a_subset_is_a_data_set(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, [0, 1, 2, 0, 1, 2])
    subset = select(dataset, 4, 0)
    assert [s.name for s in subset] == [f"row {i}" for i in subset.indices]
    assert [s.label for s in subset] == [i % 3 for i in subset.indices]
    assert (len(subset), subset.is_labelled, subset[1].name) == (4, True, f"row {subset.indices[1]}")
    again = select(subset, 2, 0)
    assert {s.name for s in again} <= {s.name for s in subset}
    with pytest.raises(IndexError):
        subset[4]


def test_fingerprints_tell_choices_apart(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, None, count=50)
    prints = {select(dataset, 10, seed).fingerprint() for seed in range(5)}
    assert len(prints) == 5
    assert select(dataset, 10, 0).fingerprint() in prints


def test_nonsense_is_refused(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, None, count=5)
    for count in (0, -1):
        with pytest.raises(UsageError, match=f"can't choose {count} samples"):
            select(dataset, count, 0)
    with pytest.raises(UsageError, match="the seed -1 is negative"):
        select(dataset, 3, -1)


class Foreign:
    """A data set of someone who knows only the Protocol."""

    is_labelled = False
    class_names = ()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Sample:
        return Sample({"x": np.float32([[index]])}, None, str(index))

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(6))

    def fingerprint(self) -> str:
        return "f"


def test_data_sets_of_others_work_too() -> None:
    subset = select(Foreign(), 3, 0)
    assert [s.name for s in subset] == [str(i) for i in subset.indices]
    assert subset.fingerprint() == select(Foreign(), 3, 0).fingerprint() != select(Foreign(), 3, 1).fingerprint()
