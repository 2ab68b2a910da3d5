"""Data sets from the user's own Python."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from edgeopt.datasets import open_dataset, select
from edgeopt.datasets.base import Dataset
from edgeopt.errors import DataError, UsageError
from edgeopt.types import Dim, ImagePreprocessing, Preprocessing, TensorSpec

X = (TensorSpec("x", (Dim("batch"), 2), "float32"),)
TWO = (TensorSpec("ids", (1, 2), "int64"), TensorSpec("mask", (1, 2), "int64"))


def made_by(
    tmp_path: Path, code: str, inputs: tuple[TensorSpec, ...] = X, preprocessing: Preprocessing | None = None
) -> Dataset:
    """Open what the code's function `data` returns."""
    (tmp_path / "mine.py").write_text("import numpy as np\n" + textwrap.dedent(code))
    return open_dataset(f"{tmp_path}/mine.py:data", inputs, preprocessing)


ITEMS = {
    "array": ("np.array([i, 1], 'float32')", None),
    "batched": ("np.array([[i, 1]], 'float64')", None),
    "numbers": ("[float(i), 1.0]", None),
    "pair": ("(np.array([i, 1], 'float32'), i)", 1),
    "pair with an array label": ("(np.array([i, 1], 'float32'), np.array([i]))", 1),
    "list": ("[np.array([i, 1], 'float32'), np.int64(i)]", 1),
    "dictionary": ("{'x': [float(i), 1.0], 'label': i, 'id': 0}", 1),
    "dictionary and label": ("({'x': np.array([i, 1.0])}, i)", 1),
    "sample": ("__import__('edgeopt.types').types.Sample({'x': np.array([[i, 1.0]])}, i, f'mine {i}')", 1),
}


@pytest.mark.parametrize("form", ITEMS)
@pytest.mark.parametrize("style", ["[{item} for i in range(3)]", "({item} for i in range(3))"])
def test_forms_of_items(tmp_path: Path, form: str, style: str) -> None:
    item, label = ITEMS[form]
    dataset = made_by(tmp_path, f"def data():\n    return {style.format(item=item)}")
    assert len(dataset) == 3
    assert dataset[1].inputs["x"].tolist() == [[1.0, 1.0]]
    assert dataset[1].inputs["x"].dtype == np.float32
    assert dataset[1].label == label
    assert dataset.is_labelled == (label is not None)
    assert [s.inputs["x"][0, 0] for s in dataset] == [0, 1, 2]
    assert [s.inputs["x"][0, 0] for s in dataset] == [0, 1, 2]
    assert dataset[1].name == ("mine 1" if form == "sample" else "item 1")


@pytest.mark.parametrize(
    ("item", "label"),
    [
        ("(np.arange(2), np.ones(2, int))", None),
        ("(np.arange(2), np.ones(2, int), 3)", 3),
        ("((np.arange(2), np.ones(2, int)), 3)", 3),
        ("({'ids': np.arange(2), 'mask': np.ones(2, bool)}, 3)", 3),
        ("{'ids': [0, 1], 'mask': [1, 1], 'labels': 3}", 3),
    ],
)
def test_several_inputs(tmp_path: Path, item: str, label: int | None) -> None:
    sample = made_by(tmp_path, f"def data():\n    return [{item}]", TWO)[0]
    assert {name: array.tolist() for name, array in sample.inputs.items()} == {"ids": [[0, 1]], "mask": [[1, 1]]}
    assert sample.label == label


def test_torchvision_style_attributes(tmp_path: Path) -> None:
    dataset = made_by(
        tmp_path,
        """
        class Set:
            classes = ["ant", "bee"]
            targets = [0, 1] * 50
            loaded = []
            def __len__(self): return 100
            def __getitem__(self, i):
                self.loaded.append(i)
                return np.zeros(2, "float32"), self.classes[self.targets[i]]
        data = Set
        """,
    )
    assert dataset.class_names == ("ant", "bee")
    subset = select(dataset, 10, 0)
    assert sorted(s.label for s in subset) == [0] * 5 + [1] * 5


def test_torch_data_sets_loaders_and_streams(tmp_path: Path) -> None:
    code = """
        import torch
        from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
        pairs = TensorDataset(torch.arange(8.0).reshape(4, 2).requires_grad_(), torch.arange(4))
        class Stream(IterableDataset):
            def __iter__(self): return iter(pairs)
        def as_map(): return pairs
        def as_stream(): return Stream()
        def as_loader(): return DataLoader(pairs, batch_size=1)
        def as_stream_loader(): return DataLoader(Stream(), batch_size=1)
        def as_batches(): return DataLoader(pairs, batch_size=2)
        data = as_map
        """
    made_by(tmp_path, code)
    prints = set()
    for name in ("as_map", "as_stream", "as_loader", "as_stream_loader"):
        dataset = open_dataset(f"{tmp_path}/mine.py:{name}", X, None)
        assert [(s.inputs["x"].tolist(), s.label) for s in dataset] == [([[2.0 * i, 2 * i + 1]], i) for i in range(4)]
        prints.add(dataset.fingerprint())
    assert len(prints) == 1
    with pytest.raises(DataError, match=r"item 0, input 'x': is a batch of 2; .*batch_size=1"):
        open_dataset(f"{tmp_path}/mine.py:as_batches", X, None)


def test_streams_are_read_forwards_once_per_pass(tmp_path: Path) -> None:
    code = """
        passes = []
        def data():
            passes.append(0)
            for i in range(100):
                passes[-1] += 1
                yield np.array([i, 0], "float32"), i % 10
        """
    dataset = made_by(tmp_path, code)
    passes = sys.modules[[m for m in sys.modules if m.startswith("_edgeopt_user_mine")][-1]].passes
    subset = select(dataset, 20, 0)
    assert list(subset.indices) == sorted(subset.indices)
    before = len(passes)
    assert [s.inputs["x"][0, 0] for s in subset] == list(subset.indices)
    assert len(passes) <= before + 1


def test_streams_that_end_early(tmp_path: Path) -> None:
    code = """
        class Short:
            def __len__(self): return 5
            def __iter__(self): return iter([np.zeros(2, "float32")] * 3)
        def data(): return Short()
        """
    with pytest.raises(DataError, match="ended after 3 of 5 items"):
        made_by(tmp_path, code)[4]


def test_pictures_and_texts_take_the_declared_preprocessing(tmp_path: Path) -> None:
    inputs = (TensorSpec("image", (1, 3, 4, 4), "float32", "NCHW"),)
    code = """
        from PIL import Image
        def data(): return [
            (Image.new("RGB", (8, 8), (51, 51, 51)), 1),
            {"image": np.full((8, 8, 3), 51, "uint8"), "label": 1},
            (np.full((3, 4, 4), 0.2, "float32"), 1),
        ]
        """
    for sample in made_by(tmp_path, code, inputs, ImagePreprocessing(4, 4)):
        np.testing.assert_array_equal(sample.inputs["image"], np.full((1, 3, 4, 4), 0.2, np.float32))
        assert sample.label == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def data(): return []", "is empty"),
        ("def data(): return iter(())", "is empty"),
        ("def data(): return 3", "the factory returned a int; return an object with __len__"),
        ("def data(): return {'x': 1}", "the factory returned a dict"),
        ("def data(): return [(1, 2, 3, 4)]", "item 0: is a tuple of 4, the model has 1 inputs"),
        ("def data(): return ['text']", "item 0: is text, not an array of numbers; declare preprocessing"),
        ("def data(): return [None]", "item 0: is NoneType, not an array"),
        ("def data(): return [{'z': [1., 2.]}]", "item 0: has no array for the model's input 'x'"),
        ("def data(): return [([1., 2.], 'cat')]", "the label 'cat', which is not among the data set's class names"),
        ("def data(): return 1 / 0", r"the factory failed at mine.py:2: ZeroDivisionError"),
        (
            "def data():\n    yield [1., 2.]\n    raise OSError('disk')",
            r"the stream failed at mine.py:4: OSError: disk",
        ),
        (
            "class data:\n    def __len__(self): return 2\n    def __getitem__(self, i): return 1 / 0",
            r"item 0 failed at mine.py:4: ZeroDivisionError",
        ),
    ],
)
def test_mistakes_in_the_users_code_are_one_line(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        made_by(tmp_path, code)
    assert "\n" not in caught.value.line()


def test_factories_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def data(): ...\ndef other(): ...\nfrom pathlib import Path\n")
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    for spec, message in [
        ("mine.py:date", r"has no factory 'date'; did you mean 'data'\?$"),
        ("gone.py:data", r"gone.py: no such file"),
        ("no_such_package.data:make", r"no module named 'no_such_package'"),
        ("broken.py:data", r"running the file failed at broken.py:1: ModuleNotFoundError"),
        ("broken:data", r"importing it failed at broken.py:1: ModuleNotFoundError"),
    ]:
        with pytest.raises(UsageError, match=message):
            open_dataset(spec, X, None)


def test_a_module_of_the_working_directory_and_files_beside_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "helper_of_mine.py").write_text("value = 7.0\n")
    before = list(sys.path)
    dataset = made_by(tmp_path, "import helper_of_mine\ndef data(): return [[helper_of_mine.value, 0.0]]")
    assert dataset[0].inputs["x"][0, 0] == 7
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_data_sets.py").write_text("def data(): return [[1.0, 2.0]]\n")
    assert len(open_dataset("my_data_sets:data", X, None)) == 1
    assert sys.path == before


def test_torch_is_not_imported_for_files_without_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def data(): return [[1.0, 2.0]]\n")
    code = f"""
import sys
from edgeopt.datasets import open_dataset
from edgeopt.types import TensorSpec
open_dataset({str(tmp_path / "mine.py") + ":data"!r}, (TensorSpec("x", (1, 2), "float32"),), None)
assert not {{"torch", "PIL", "scipy", "tokenizers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
