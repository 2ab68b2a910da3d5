"""Teacher outputs on disk: read instead of computed, and never the wrong ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.datasets import open_dataset
from edgeopt.datasets.base import Dataset
from edgeopt.errors import DataError, UsageError
from edgeopt.progress import Silent
from edgeopt.training.config import Teaching, TrainingConfig
from edgeopt.training.fit import FitData, fit
from edgeopt.training.teacher_cache import KeptOutputs, TeacherCache
from edgeopt.training.trainable import Trainable
from edgeopt.types import TensorSpec

SPECS = (TensorSpec("x", (1, 6), "float32"),)
VALUES = np.random.default_rng(0).normal(size=(21, 6)).astype(np.float32)
DATA = open_dataset(list(VALUES), SPECS, None)
CONFIG = TrainingConfig(epochs=3, batch_size=4, learning_rate=1e-2)


class Teacher(nn.Module):
    """A scores layer, then some code; counts the samples that it is asked about."""

    def __init__(self, code: str = "") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(6, 4)
        self.code = code
        self.asked: list[int] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Teacher:
        return self  # training takes a copy, whose calls are to be seen here

    def forward(self, x: Tensor) -> object:
        self.asked.append(len(x))
        y = self.layer(x)
        match self.code:
            case "many":
                return [y, {"half": y.half(), "index": y.argmax(-1)}, *(y + i for i in range(12))]
            case "rows":
                return y.reshape(-1, 2)
            case "squeeze":
                return y.squeeze()
            case "varying":
                return y[:, : 2 + int(x.sum() > 0)]
            case "double":
                return 2 * y
        return y


class Watched(Silent):
    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, title: str) -> None:
        self.steps.append(title)


def cache(folder: Path, teacher: Teacher, progress: Silent | None = None, batch_size: int = 4) -> TeacherCache:
    network = Trainable(teacher, (1,)).eval()
    return TeacherCache(folder, network, SPECS, batch_size, torch.device("cpu"), progress or Silent())


def kept(folder: Path, teacher: Teacher, data: Dataset = DATA) -> KeptOutputs:
    outputs = cache(folder, teacher).of(data)
    assert outputs is not None
    return outputs


def direct(teacher: Teacher, indices: list[int]) -> Tensor:
    with torch.no_grad():
        outputs = teacher(torch.from_numpy(VALUES[indices]))
    assert isinstance(outputs, Tensor)
    return outputs


@pytest.mark.parametrize("code", ["", "rows", "squeeze"])
def test_gives_what_the_teacher_gives_in_any_order(tmp_path: Path, code: str) -> None:
    teacher = Teacher(code)
    (found,) = kept(tmp_path, teacher).of([20, 3, 3, 0])
    torch.testing.assert_close(found, direct(teacher, [20, 3, 3, 0]))


def test_keeps_many_outputs_in_their_order_and_half_floats_as_float32(tmp_path: Path) -> None:
    plain = direct(Teacher(), [7, 2])
    first, half, index, *others = kept(tmp_path, Teacher("many")).of([7, 2])
    torch.testing.assert_close(first, plain)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain.half().float())
    assert torch.equal(index, plain.argmax(-1))
    for i, other in enumerate(others):
        torch.testing.assert_close(other, plain + i)


def test_a_second_run_asks_the_teacher_about_one_batch_only(tmp_path: Path) -> None:
    kept(tmp_path, Teacher())
    again = Teacher()
    kept(tmp_path, again)
    assert again.asked == [4]


def test_another_teacher_or_other_data_have_a_place_of_their_own(tmp_path: Path) -> None:
    kept(tmp_path, Teacher())
    other = Teacher()
    with torch.no_grad():
        other.layer.bias.add_(1)
    torch.testing.assert_close(kept(tmp_path, other).of([1])[0], direct(other, [1]))
    shuffled = open_dataset(list(VALUES[::-1].copy()), SPECS, None)
    torch.testing.assert_close(kept(tmp_path, Teacher(), shuffled).of([0])[0], direct(Teacher(), [20]))
    assert len(list(tmp_path.iterdir())) == 3


def test_settings_that_are_no_weights_have_a_place_of_their_own(tmp_path: Path) -> None:
    for slope in (0.1, 0.2):
        teacher = Teacher()
        teacher.act = nn.LeakyReLU(slope)
        kept(tmp_path, teacher)
    assert len(list(tmp_path.iterdir())) == 2


def _cut(place: Path) -> None:
    (place / "0.bin").write_bytes((place / "0.bin").read_bytes()[:-4])


def _flip(place: Path) -> None:
    content = bytearray((place / "0.bin").read_bytes())
    content[-1] ^= 1
    (place / "0.bin").write_bytes(bytes(content))


def _foreign(place: Path) -> None:
    listing = json.loads((place / "outputs.json").read_text())
    (place / "outputs.json").write_text(json.dumps({**listing, "key": "0" * 64}))


def _objects(place: Path) -> None:
    listing = json.loads((place / "outputs.json").read_text())
    listing["outputs"][0]["dtype"] = "|O"
    (place / "outputs.json").write_text(json.dumps(listing))


def _gone(place: Path) -> None:
    (place / "0.bin").unlink()


def _nonsense(place: Path) -> None:
    (place / "outputs.json").write_text("[]")


@pytest.mark.parametrize("damage", [_cut, _flip, _foreign, _objects, _gone, _nonsense])
def test_what_is_damaged_or_foreign_is_computed_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    kept(tmp_path, Teacher())
    (place,) = tmp_path.iterdir()
    damage(place)
    again = Teacher()
    torch.testing.assert_close(kept(tmp_path, again).of([5])[0], direct(Teacher(), [5]))
    assert sum(again.asked) >= len(VALUES)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_code_that_was_changed_shows(tmp_path: Path) -> None:
    kept(tmp_path, Teacher())
    changed = Teacher("double")  # the same weights
    torch.testing.assert_close(kept(tmp_path, changed).of([5])[0], direct(changed, [5]))


class Augmented:
    """Noise at every reading."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(VALUES)

    def __getitem__(self, index: int) -> object:
        return (VALUES[index] + self._rng.normal(size=6)).astype(np.float32)

    def __iter__(self) -> Iterator[object]:
        return (self[i] for i in range(len(self)))


class Flipped(Augmented):
    """Turned round half of the time, as a picture may be: often the first reading and the second are alike."""

    def __getitem__(self, index: int) -> object:
        return VALUES[index, :: -1 if self._rng.random() < 0.5 else 1].copy()


class Late(Augmented):
    """Only the last sample changes."""

    def __getitem__(self, index: int) -> object:
        return super().__getitem__(index) if index == len(VALUES) - 1 else VALUES[index]


@pytest.mark.parametrize("seed", range(10))
def test_flips_are_noticed(tmp_path: Path, seed: int) -> None:
    data = Flipped()
    data._rng = np.random.default_rng(seed)
    assert cache(tmp_path, Teacher()).of(open_dataset(data, SPECS, None)) is None


def test_a_sample_that_the_teacher_did_not_see_is_never_taught(tmp_path: Path) -> None:
    data = FitData(open_dataset(Late(), SPECS, None), None, SPECS, 4, tmp_path)
    with pytest.raises(DataError, match="sample 20: is another one than the teacher saw"):
        fit(student(), Teacher(), data, Teaching(), replace(CONFIG, batch_size=3), 0, Silent())


def test_what_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Watched()
    assert cache(tmp_path, Teacher("varying"), progress, batch_size=1).of(DATA) is None
    assert cache(tmp_path, Teacher(), progress).of(open_dataset(Augmented(), SPECS, None)) is None
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    assert cache(tmp_path, Teacher(), progress).of(DATA) is None
    assert progress.steps == [
        "Not keeping the teacher's outputs: their shapes depend on the sample",
        "Not keeping the teacher's outputs: the samples change from one reading to the next",
        "Not keeping the teacher's outputs: they would take 0.0 GB, which the disk does not have",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be kept here"):
        cache(tmp_path / "file" / "folder", Teacher()).of(DATA)


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def test_training_from_kept_outputs_is_the_same_training(tmp_path: Path) -> None:
    """With shuffling, a last batch that is left out, and judged without labels."""
    data = FitData(DATA, DATA, SPECS, 4)
    expected, found, again = student(), student(), Teacher()
    result = fit(expected, Teacher(), data, Teaching(), CONFIG, 0, Silent())
    asked = Teacher()
    assert fit(found, asked, replace(data, cache=tmp_path), Teaching(), CONFIG, 0, Silent()) == replace(
        result, score=pytest.approx(result.score, rel=1e-4)
    )
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], atol=1e-6, rtol=1e-5)
    fit(student(), again, data, Teaching(teacher_cache=tmp_path), CONFIG, 0, Silent())
    # The first batch, whole, one by one and to rehearse the step, and one more to check what was kept for each set.
    assert sum(again.asked) == 5 * 4
    assert sum(asked.asked) == sum(again.asked) - 4 + len(VALUES)
