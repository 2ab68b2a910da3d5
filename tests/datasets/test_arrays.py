"""Rows of .npy and .npz files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeopt.datasets import open_dataset
from edgeopt.errors import ConfigError, DataError, UsageError
from edgeopt.types import Array, ArrayPreprocessing, Dim, ImagePreprocessing, TensorSpec

X = (TensorSpec("x", (Dim("batch"), 3, 4), "float32"),)
TWO = (TensorSpec("ids", (1, Dim("seq")), "int64"), TensorSpec("mask", (1, Dim("seq")), "int32"))


def values(count: int = 5) -> Array:
    return np.random.default_rng(0).normal(size=(count, 3, 4)).astype(np.float32)


@pytest.mark.parametrize("layout", [np.ascontiguousarray, np.asfortranarray])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_npy_rows(tmp_path: Path, layout: Callable[[Array], Array], dtype: str) -> None:
    np.save(tmp_path / "x.npy", layout(values().astype(dtype)))
    dataset = open_dataset(str(tmp_path / "x.npy"), X, None)
    assert (len(dataset), dataset.is_labelled) == (5, False)
    got = np.concatenate([sample.inputs["x"] for sample in dataset])
    assert got.dtype == np.dtype("float32")
    np.testing.assert_array_equal(got, values().astype(dtype).astype(np.float32))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_labels(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "d.npz", x=values(), y=np.array([[2], [0], [1], [1], [0]], np.uint8))
    dataset = open_dataset(str(tmp_path / "d.npz"), X, None)
    assert [sample.label for sample in dataset] == [2, 0, 1, 1, 0]
    assert dataset[3].name == "row 3"
    np.testing.assert_array_equal(dataset[3].inputs["x"][0], values()[3])


def test_compression_does_not_change_the_fingerprint_and_values_do(tmp_path: Path) -> None:
    prints = []
    for number, (save, x) in enumerate(
        [(np.savez, values()), (np.savez_compressed, values()), (np.savez, values() + 1)]
    ):
        save(tmp_path / f"{number}.npz", x=x)
        prints.append(open_dataset(str(tmp_path / f"{number}.npz"), X, None).fingerprint())
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("names", [["cat", "ant", "cat"], [b"cat", b"ant", b"cat"]])
def test_class_names_as_labels(tmp_path: Path, names: list[str]) -> None:
    np.savez(tmp_path / "d.npz", inputs=values(3), labels=np.array(names))
    dataset = open_dataset(str(tmp_path / "d.npz"), (TensorSpec("image", (1, 3, 4), "float32"),), None)
    assert dataset.class_names == ("ant", "cat")
    assert [sample.label for sample in dataset] == [1, 0, 1]


def test_other_labels_are_arrays(tmp_path: Path) -> None:
    target = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=values(), label=target)
    dataset = open_dataset(str(tmp_path / "d.npz"), X, None)
    assert dataset.is_labelled
    np.testing.assert_array_equal(dataset[4].label, target[4])


def test_several_inputs_of_whole_numbers_are_widened_or_narrowed_when_they_fit(tmp_path: Path) -> None:
    ids, mask = np.arange(12, dtype=np.int32).reshape(2, 6), np.ones((2, 6), bool)
    np.savez(tmp_path / "d.npz", ids=ids, mask=mask)
    sample = open_dataset(str(tmp_path / "d.npz"), TWO, None)[1]
    assert {k: (v.dtype.name, v.shape) for k, v in sample.inputs.items()} == {
        "ids": ("int64", (1, 6)),
        "mask": ("int32", (1, 6)),
    }


def test_array_preprocessing_normalises_floats_and_leaves_ids_alone(tmp_path: Path) -> None:
    inputs = (TensorSpec("x", (1, 2, 2), "float32"), TensorSpec("ids", (1, 2), "int64"))
    np.savez(tmp_path / "d.npz", x=np.full((1, 2, 2), 100, np.uint8), ids=np.array([[5, 6]]))
    declared = ArrayPreprocessing(rescale=10, mean=(4, 6), std=(1, 2))
    sample = open_dataset(str(tmp_path / "d.npz"), inputs, declared)[0]
    assert sample.inputs["x"].tolist() == [[[6, 6], [2, 2]]]
    assert sample.inputs["ids"].tolist() == [[5, 6]]


def test_array_preprocessing_never_broadcasts_one_channel_into_three(tmp_path: Path) -> None:
    inputs = (TensorSpec("x", (1, 3, 4, 4), "float32"),)
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 4, 4), np.float32))
    with pytest.raises(DataError, match=r"row 0, input 'x': has shape \(1, 1, 4, 4\), the model takes \(1, 3, 4, 4\)"):
        open_dataset(str(tmp_path / "x.npy"), inputs, ArrayPreprocessing(mean=(1, 2, 3), std=(1, 1, 1)))


def test_array_preprocessing_that_does_not_suit_the_model_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", values())
    with pytest.raises(ConfigError, match="mean or std has 2 values, but axis 1 of the input is 3 long"):
        open_dataset(str(tmp_path / "x.npy"), X, ArrayPreprocessing(mean=(1, 2), std=(1,)))
    with pytest.raises(ConfigError, match="channel_axis 7 is outside the 3 dimensions"):
        open_dataset(str(tmp_path / "x.npy"), X, ArrayPreprocessing(mean=(1, 2, 3), channel_axis=7))


def test_byte_pictures_in_arrays_take_image_preprocessing(tmp_path: Path) -> None:
    inputs = (TensorSpec("image", (1, 3, 8, 8), "float32", "NCHW"),)
    np.savez(tmp_path / "d.npz", x=np.full((2, 16, 16, 3), 51, np.uint8))
    pixels = open_dataset(str(tmp_path / "d.npz"), inputs, ImagePreprocessing(8, 8))[0].inputs["image"]
    np.testing.assert_array_equal(pixels, np.full((1, 3, 8, 8), 0.2, np.float32))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": np.zeros((4, 3, 4), np.float32), "y": np.zeros(5, int)},
            r"d.npz: arrays differ in length: x 4, label 5",
        ),
        (
            {"x": np.zeros((4, 3, 5), np.float32)},
            r"d.npz, row 0, input 'x': has shape \(1, 3, 5\), the model takes \(batch, 3, 4\)",
        ),
        ({"x": np.zeros((4, 2, 3, 4), np.float32)}, r"input 'x': is a batch of 2; a data set gives single samples"),
        ({"x": np.zeros((4, 3, 4), np.uint8)}, r"is uint8, the model takes float32; declare how numbers become"),
        ({"x": np.zeros((4, 3, 4), complex)}, r"row 0: is ndarray, not an array of numbers"),
        ({"pixels": np.zeros((4, 3, 4), np.float32)}, r"d.npz: has no array 'x' \(it has pixels\)"),
        ({"x": np.zeros((0, 3, 4), np.float32)}, r"is empty"),
        ({"x": np.float32(1)}, r"array 'x': is a single number"),
        ({"x": np.zeros((1, 3, 4), np.float32), "y": np.array([-100])}, r"row 0: -100 is not a class index"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_misfits_are_named(tmp_path: Path, save: Callable[..., None], arrays: dict[str, Array], message: str) -> None:
    save(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_dataset(str(tmp_path / "d.npz"), X, None)


def test_values_that_a_narrower_type_cannot_hold(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", ids=np.array([[1], [2**40]]), mask=np.array([[1], [2**40]]))
    dataset = open_dataset(str(tmp_path / "d.npz"), TWO, None)
    with pytest.raises(DataError, match="row 1, input 'mask': holds int64 values that int32 can't"):
        dataset[1]


def test_dynamic_dimensions_are_bounded_and_agree(tmp_path: Path) -> None:
    inputs = tuple(TensorSpec(n, (1, Dim("seq", 2, 4)), "int64") for n in ("ids", "mask"))
    np.savez(tmp_path / "long.npz", ids=np.ones((1, 5), int), mask=np.ones((1, 5), int))
    with pytest.raises(DataError, match=r"the model takes \(1, seq\) with seq from 2 to 4"):
        open_dataset(str(tmp_path / "long.npz"), inputs, None)
    np.savez(tmp_path / "torn.npz", ids=np.ones((1, 3), int), mask=np.ones((1, 4), int))
    with pytest.raises(DataError, match="but seq is 3 in another input"):
        open_dataset(str(tmp_path / "torn.npz"), inputs, None)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pickles_are_never_loaded(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "d.npz", x=np.array([{"a": 1}, None], dtype=object))
    with pytest.raises(DataError, match="array 'x': holds Python objects, not plain numbers"):
        open_dataset(str(tmp_path / "d.npz"), X, None)
    np.save(tmp_path / "r.npy", np.zeros(3, [("a", "f4"), ("b", "f4")]))
    with pytest.raises(DataError, match=r"r.npy: holds records"):
        open_dataset(str(tmp_path / "r.npy"), X, None)


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", values())
    whole = (tmp_path / "x.npy").read_bytes()
    for name, data, message in [
        ("cut.npy", whole[:-8], "cut.npy: is truncated"),
        ("head.npy", whole[:20], "head.npy: is not a .npy array"),
        ("text.npy", b"hello", "text.npy: is not a .npy array"),
        ("none.npy", b"", "none.npy: is not a .npy array"),
        ("text.npz", b"hello", "text.npz: is not a .npz file"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message):
            open_dataset(str(tmp_path / name), X, None)


def test_a_damaged_compressed_member_is_noticed(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=values(500))
    damaged = bytearray((tmp_path / "d.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / "d.npz").write_bytes(damaged)
    with pytest.raises(DataError, match=r"d.npz, array 'x': is corrupt"):
        open_dataset(str(tmp_path / "d.npz"), X, None)


def test_a_lone_npy_file_feeds_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", values())
    with pytest.raises(UsageError, match=r"the model has 2 \(ids, mask\); use a \.npz"):
        open_dataset(str(tmp_path / "x.npy"), TWO, None)


def test_samples_that_bring_their_own_batch_dimension(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", values()[:, None])
    assert open_dataset(str(tmp_path / "x.npy"), X, None)[0].inputs["x"].shape == (1, 3, 4)


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=values())

    def full(fd: int, data: object) -> int:
        del fd, data
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgeopt.datasets.blob.os.write", full)
    with pytest.raises(UsageError, match=r"can't be unpacked into .*: No space left on device; make room"):
        open_dataset(str(tmp_path / "d.npz"), X, None)
