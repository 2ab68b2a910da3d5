"""Data sets that a Python function of the user's returns: by index, or as a stream."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sized

from edgeopt.datasets.base import MapStyle
from edgeopt.datasets.indexed import IndexedDataset, digest_arrays
from edgeopt.datasets.items import ItemReader
from edgeopt.datasets.transform import Preprocessor, as_array
from edgeopt.errors import DataError
from edgeopt.types import Preprocessing, Sample, TensorSpec
from edgeopt.user_code import UserObject


def in_memory(data: MapStyle | Iterable[object]) -> UserObject:
    """An object of a Python program in the place of the factory that would have made it."""
    return UserObject(type(data).__name__, "", sys.modules[__name__], lambda: data)


def open_factory(
    factory: UserObject, inputs: tuple[TensorSpec, ...], preprocessing: Preprocessing | None, preprocess: Preprocessor
) -> IndexedDataset:
    """Call the factory. Raises UsageError or DataError with one line when that fails or gives no data set."""
    made = factory.call("the factory failed", DataError)
    reader = ItemReader(inputs, preprocessing, preprocess, _class_names(made))
    if isinstance(made, MapStyle) and not isinstance(made, Mapping | str) and not _is_torch_stream(made):
        return MapDataset(factory, made, reader)
    if isinstance(made, Iterable) and not isinstance(made, Mapping | str):
        if isinstance(made, Iterator) and factory.call("the factory failed", DataError) is made:
            raise DataError(
                "is an iterator, which can be read only once",
                where=factory.where,
                fix="give an iterable that starts anew each time, or an object with __len__ and __getitem__",
            )
        return StreamDataset(factory, made, reader)
    raise DataError(
        f"the factory returned a {type(made).__name__}",
        where=factory.where,
        fix="return an object with __len__ and __getitem__, or an iterable",
    )


class FactoryDataset(IndexedDataset):
    """What both kinds share: names, and labels as the first item has them."""

    is_fixed = False

    def __init__(self, factory: UserObject, made: object, reader: ItemReader) -> None:
        self._factory = factory
        self._reader = reader
        self._class_names = _class_names(made)
        self._is_labelled: bool | None = None

    @property
    def is_labelled(self) -> bool:
        if self._is_labelled is None:
            self._is_labelled = len(self) > 0 and self[0].label is not None
        return self._is_labelled

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names

    def digest_of(self, index: int) -> bytes:
        sample = self[index]
        return digest_arrays(sample.inputs, sample.label)


class MapDataset(FactoryDataset):
    """Items by index. A `targets` attribute, as torchvision's data sets have it, tells labels without loading."""

    def __init__(self, factory: UserObject, made: MapStyle, reader: ItemReader) -> None:
        super().__init__(factory, made, reader)
        self._items = made
        targets = getattr(made, "targets", None)
        array = None if targets is None else as_array(targets, f"{factory.where}, targets")
        is_classes = array is not None and array.ndim == 1 and array.dtype.kind in "iu" and len(array) == len(self)
        self._targets = array if is_classes else None

    def __len__(self) -> int:
        with self._factory.running("len() failed", DataError):
            return len(self._items)

    def _load(self, index: int) -> Sample:
        with self._factory.running(f"item {index} failed", DataError):
            item = self._items[index]
        return self._reader.read(item, index)

    def label_of(self, index: int) -> int | None:
        return None if self._targets is None else int(self._targets[index])


class StreamDataset(FactoryDataset):
    """Items in the order of an iterable. Going back calls the factory again, so each call must give the same items."""

    is_sequential = True

    def __init__(self, factory: UserObject, made: Iterable[object], reader: ItemReader) -> None:
        super().__init__(factory, made, reader)
        self._made: object = made
        self._length = _length_of(made)
        self._stream: Iterator[object] = iter(())
        self._position = 0

    def __len__(self) -> int:
        """Counted by a pass of its own, without reading the items."""
        if self._length is None:
            self._length = sum(1 for _ in self._pass())
        return self._length

    def __iter__(self) -> Iterator[Sample]:
        for index, item in enumerate(self._pass()):
            yield self._reader.read(item, index)

    def _load(self, index: int) -> Sample:
        if index < self._position or self._position == 0:
            self._stream, self._position = self._pass(), 0
        for item in self._stream:
            self._position += 1
            if self._position == index + 1:
                return self._reader.read(item, index)
        raise DataError(f"ended after {self._position} of {len(self)} items", where=self._factory.where)

    def _pass(self) -> Iterator[object]:
        """The items from the first one on."""
        made = self._factory.call("the factory failed", DataError) if self._made is None else self._made
        # One pass uses an iterator up; everything else can be iterated again.
        self._made = None if isinstance(made, Iterator) else made
        if not isinstance(made, Iterable):
            raise DataError(f"the factory returned a {type(made).__name__} this time", where=self._factory.where)
        with self._factory.running("the stream failed", DataError):
            yield from made


def _length_of(made: object) -> int | None:
    """None where only a pass tells. A torch `DataLoader` over a stream has a `__len__` that raises TypeError."""
    if not isinstance(made, Sized):
        return None
    try:
        return len(made)
    except TypeError:
        return None


def _class_names(made: object) -> tuple[str, ...]:
    """From the attribute `class_names`, or torchvision's `classes`."""
    names = getattr(made, "class_names", None) or getattr(made, "classes", None)
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()


def _is_torch_stream(made: object) -> bool:
    """An `IterableDataset` inherits a `__getitem__` that only raises; told by name, so that torch isn't imported."""
    return any(base.__name__ == "IterableDataset" for base in type(made).__mro__)
