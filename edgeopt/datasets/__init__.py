"""Streams of samples for calibration and evaluation, and the one implementation of declared preprocessing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edgeopt.datasets.base import Dataset, MapStyle
from edgeopt.datasets.declared import check_preprocessing, dump_preprocessing, load_preprocessing
from edgeopt.datasets.match import match_labels
from edgeopt.datasets.subset import Subset, select
from edgeopt.datasets.transform import Preprocessor
from edgeopt.errors import DataError, UsageError
from edgeopt.types import Preprocessing, TensorSpec
from edgeopt.user_code import load_user_object

__all__ = [
    "DataSource",
    "Dataset",
    "Preprocessor",
    "Subset",
    "check_preprocessing",
    "dump_preprocessing",
    "load_preprocessing",
    "match_labels",
    "open_dataset",
    "resolve_preprocessing",
    "select",
]

#: What `open_dataset` opens: a spec, an object with __len__ and __getitem__, or an iterable that can start anew.
DataSource = str | MapStyle | Iterable[object]

FORMS = (
    "a folder, or a .csv, .npz, .npy, .jsonl, .jsonl.gz or .txt file, two files of parallel texts as train.{en,de}.gz, "
    "or file.py:factory"
)


def open_dataset(spec: DataSource, inputs: tuple[TensorSpec, ...], preprocessing: Preprocessing | None) -> Dataset:
    """Open a data set and check that its first sample fits the model.

    Args:
        spec: path of a folder or file, `file.py:factory` or `package.module:factory`; see docs/datasets.md. From
            Python also what such a factory would return.
        inputs: the model's inputs.
        preprocessing: what the model declares; None takes arrays as they are and derives what to do with pictures.

    Raises UsageError when `spec` is no data set, DataError when it is empty, unreadable or doesn't fit, ConfigError
    when the preprocessing makes no sense for it, MissingError when a package is needed that isn't installed.
    """
    preprocessing = resolve_preprocessing(spec, inputs, preprocessing)
    dataset = _open(spec, inputs, preprocessing, Preprocessor(preprocessing, inputs))
    if len(dataset) == 0:
        raise DataError("is empty", where=spec if isinstance(spec, str) else type(spec).__name__)
    dataset[0]
    return dataset


def resolve_preprocessing(
    spec: DataSource, inputs: tuple[TensorSpec, ...], preprocessing: Preprocessing | None
) -> Preprocessing | None:
    """What `open_dataset` applies: the declared preprocessing, or what a picture's way into the input must be.

    Raises UsageError when `spec` holds files to decode and the input's shape doesn't tell how.
    """
    if preprocessing is not None or not isinstance(spec, str) or not _is_media(Path(spec).expanduser()):
        return preprocessing
    from edgeopt.datasets.image import default_preprocessing

    return default_preprocessing(inputs)


def _open(
    spec: DataSource, inputs: tuple[TensorSpec, ...], preprocessing: Preprocessing | None, preprocess: Preprocessor
) -> Dataset:
    if not isinstance(spec, str):
        from edgeopt.datasets.factory import in_memory, open_factory

        return open_factory(in_memory(spec), inputs, preprocessing, preprocess)
    from edgeopt.datasets.parallel import open_parallel, parallel_files

    path = Path(spec).expanduser()
    if not path.exists() and (files := parallel_files(spec)) is not None:
        return open_parallel(files, preprocessing, preprocess)
    if not path.exists():
        if ":" not in spec:
            raise UsageError("no such data set", where=spec, fix=f"give {FORMS}")
        from edgeopt.datasets.factory import open_factory

        return open_factory(load_user_object(spec, "factory"), inputs, preprocessing, preprocess)
    if _is_media(path):
        from edgeopt.datasets.media import open_media

        return open_media(path, preprocessing, preprocess)
    if path.suffix in (".npz", ".npy"):
        from edgeopt.datasets.arrays import ArrayDataset

        open_arrays = ArrayDataset.from_npz if path.suffix == ".npz" else ArrayDataset.from_npy
        return open_arrays(path, inputs, preprocess)
    if path.name.removesuffix(".gz").endswith((".jsonl", ".txt")):
        from edgeopt.datasets.lines import open_lines

        return open_lines(path, inputs, preprocessing, preprocess)
    raise UsageError("is no data set that edgeopt can read", where=spec, fix=f"give {FORMS}")


def _is_media(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".csv"
