"""Comparing a changed network with the one that it was made from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from numbers import Integral

import torch
from torch import Tensor, nn

from edgeopt.errors import ConversionError
from edgeopt.sources.pruned_attention import PrunedMultiheadAttention
from edgeopt.sources.structure_values import (
    Attribute,
    AttributeEdit,
    LayerSpec,
    Replacement,
    Structure,
    TensorEdit,
    built,
    dtype_name,
    spec_of,
    user_module,
)

#: Attributes that torch itself manages, or that say how a module is used rather than what it is.
_BOOKKEEPING = ("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def describe(original: nn.Module, changed: nn.Module) -> Structure:
    """How `changed` differs in structure from `original`: values of tensors in the state dict don't count.

    Raises:
        ConversionError: something differs that is no layer, tensor or plain attribute and that a state dict doesn't
            hold either; names the layer.
    """
    comparison = _Comparison()
    comparison.compare("", user_module(original), user_module(changed))
    return comparison.structure()


def described_attribute(value: object) -> Attribute | None:
    """A plain value as it is written down; None for what is not plain."""
    match value:
        case bool():
            return value
        case Integral():
            return int(value)
        case float():
            return value
        case tuple() | list() if type(value) in (tuple, list, torch.Size) and all(_is_size(item) for item in value):
            return tuple(int(item) for item in value)
    return None


def _is_size(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class _Comparison:
    """Collects the edits while it walks through both modules at once."""

    def __init__(self) -> None:
        self._removed: list[str] = []
        self._attributes: list[AttributeEdit] = []
        self._replaced: dict[int, tuple[list[str], nn.Module]] = {}
        self._twins: dict[int, nn.Module] = {}
        self._sources: dict[int, nn.Module] = {}
        # What replaced layers with layers within are when new; as long as they live, no other has their identity.
        self._fresh: list[nn.Module] = []
        self._old: dict[str, Tensor | None] = {}
        self._new: dict[str, Tensor | None] = {}

    def compare(self, path: str, old: nn.Module, new: nn.Module) -> None:
        if not _same_class(old, new):
            raise _indescribable(path, f"is a {type(new).__name__} in place of a {type(old).__name__}")
        if id(old) in self._twins or id(new) in self._sources:
            if self._twins.get(id(old)) is not new or self._sources.get(id(new)) is not old:
                raise _indescribable(path, "is shared with other layers than before")
            return
        self._twins[id(old)], self._sources[id(new)] = new, old
        if isinstance(old, torch.fx.GraphModule) and old.code != getattr(new, "code", None):
            raise _indescribable(path, "is an exported graph with other operators")
        self._compare_attributes(path, old, new)
        self._compare_tensors(path, old, new)
        self._compare_children(path, old, new)

    def _compare_children(self, path: str, old: nn.Module, new: nn.Module) -> None:
        if added := [name for name in new._modules if name not in old._modules]:
            raise _indescribable(_join(path, added[0]), "was added")
        for name, child in old._modules.items():
            twin, place = new._modules.get(name), _join(path, name)
            if twin is None and child is not None:
                if (name in new._modules) is isinstance(old, nn.ModuleList | nn.Sequential | nn.ModuleDict):
                    raise _indescribable(place, "was taken away in another way than layers of its kind are")
                self._removed.append(place)
            elif twin is not None and (child is None or not _same_class(child, twin)):
                self._replace(place, twin)
            elif twin is not None and child is not None:
                self.compare(place, child, twin)

    def _replace(self, path: str, new: nn.Module) -> None:
        paths, _ = self._replaced.setdefault(id(new), ([], new))
        paths.append(path)
        if isinstance(new, PrunedMultiheadAttention) and len(paths) == 1 and (spec := spec_of(new)) is not None:
            self._fresh.append(built(spec))
            self.compare(path, self._fresh[-1], new)

    def _compare_attributes(self, path: str, old: nn.Module, new: nn.Module) -> None:
        for name in dict.fromkeys((*old.__dict__, *new.__dict__)):
            if name in _BOOKKEEPING:
                continue
            if name not in old.__dict__ or name not in new.__dict__:
                if not name.startswith("_"):
                    raise _indescribable(path, f"has gained or lost the attribute {name!r}")
                continue
            before, after = old.__dict__[name], new.__dict__[name]
            was, is_ = described_attribute(before), described_attribute(after)
            if was is not None and is_ is not None and same_kind(was, is_):
                if was != is_ and not (was != was and is_ != is_):
                    self._attributes.append(AttributeEdit(path, name, is_))
            elif not name.startswith("_") and not _is_same(before, after):
                raise _indescribable(path, f"has another {name!r}")

    def _compare_tensors(self, path: str, old: nn.Module, new: nn.Module) -> None:
        for slots, others in ((old._parameters, new._parameters), (old._buffers, new._buffers)):
            if differing := sorted(set(slots) ^ set(others)):
                raise _indescribable(path, f"has gained or lost the tensor {differing[0]!r}")
            for name, before in slots.items():
                after = others[name]
                if name in old._non_persistent_buffers_set:
                    if not _is_same(before, after):
                        raise _indescribable(path, f"has another buffer {name!r}, which state dicts leave out")
                    continue
                self._old[_join(path, name)], self._new[_join(path, name)] = before, after

    def structure(self) -> Structure:
        return Structure(tuple(self._removed), self._replacements(), tuple(self._attributes), self._tensors())

    def _replacements(self) -> tuple[Replacement, ...]:
        kept = {id(tensor) for tensor in self._new.values()}
        found = []
        for paths, layer in self._replaced.values():
            if not isinstance(layer, PrunedMultiheadAttention):  # whose tensors are among those that are compared
                own = _tensors_of(layer)
                if kept & set(own) or len(own) != len(set(own)):
                    raise _indescribable(paths[0], "shares tensors with another layer")
                kept |= set(own)
            is_sequential = type(layer) is nn.Sequential
            children = list(layer._modules) if is_sequential else []
            if children != [str(index) for index in range(len(children))]:
                raise _indescribable(paths[0], "was replaced by layers with names instead of numbers")
            layers = tuple(_spec(paths[0], part) for part in (layer.children() if is_sequential else (layer,)))
            found.append(Replacement(tuple(paths), layers, is_sequential))
        return tuple(found)

    def _tensors(self) -> tuple[TensorEdit, ...]:
        ties, old_ties = _ties(self._new), set(_ties(self._old))
        edits = []
        for names in ties:
            before, after = self._old[names[0]], self._new[names[0]]
            assert after is not None
            is_same = before is not None and before.shape == after.shape and before.dtype == after.dtype
            if is_same and names in old_ties:
                continue
            if (dtype := dtype_name(after.dtype)) is None:
                raise _indescribable(names[0], f"is of type {after.dtype}")
            edits.append(TensorEdit(names, tuple(after.shape), dtype))
        gone = [name for name, tensor in self._new.items() if tensor is None and self._old[name] is not None]
        return (*edits, *(TensorEdit((name,), None, None) for name in gone))


def _ties(tensors: Mapping[str, Tensor | None]) -> list[tuple[str, ...]]:
    """Names of each tensor."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor is not None:
            names[id(tensor)].append(name)
    return [tuple(group) for group in names.values()]


def _tensors_of(layer: nn.Module) -> list[int]:
    """Identities of its tensors, as often as it holds them."""
    parts = layer.modules()
    held = [tensor for part in parts for tensor in (*part._parameters.values(), *part._buffers.values())]
    return [id(tensor) for tensor in held if tensor is not None]


def _spec(path: str, layer: nn.Module) -> LayerSpec:
    if (spec := spec_of(layer)) is None:
        raise _indescribable(path, f"was replaced by a {type(layer).__name__}")
    return spec


def _same_class(one: nn.Module, other: nn.Module) -> bool:
    """By name, too: a user's file that is loaded twice defines its classes twice."""
    return type(one) is type(other) or (
        type(one).__qualname__ == type(other).__qualname__
        and type(one).__module__.rpartition(".")[2] == type(other).__module__.rpartition(".")[2]
    )


def same_kind(one: Attribute, other: Attribute) -> bool:
    """Numbers can take one another's place, truths and sequences only their like."""
    return isinstance(one, bool) == isinstance(other, bool) and isinstance(one, tuple) == isinstance(other, tuple)


def _is_same(one: object, other: object) -> bool:
    """Whether two values that can't be described are alike, as far as can be told without knowing their class."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and _same_tensor(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(_is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_is_same(a, b) for a, b in zip(one, other, strict=True))
    return one == other if isinstance(one, str | bytes | int | set | frozenset) else True


def _same_tensor(one: object, other: object) -> bool:
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one.cpu(), other.cpu()))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _indescribable(path: str, what: str) -> ConversionError:
    return ConversionError(
        f"{what}, which can't be written beside the weights",
        where=f"layer {path!r}" if path else "the model",
        fix="leave that layer out of the steps that change it (protect)",
    )
