"""Networks whose shape is not the one that their factory builds: pruned, factorized or shortened ones.

What changed travels as data in the metadata of a .safetensors file, never as pickled code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from edgeopt.errors import UsageError
from edgeopt.json_data import from_plain, loads
from edgeopt.sources.pruned_attention import PrunedMultiheadAttention
from edgeopt.sources.structure_diff import describe, described_attribute, same_kind
from edgeopt.sources.structure_file import METADATA_KEY, load_model, save_model
from edgeopt.sources.structure_values import (
    AttributeEdit,
    PassThrough,
    Replacement,
    Structure,
    TensorEdit,
    built,
    dtype_of,
    user_module,
)

__all__ = [
    "METADATA_KEY", "PassThrough", "PrunedMultiheadAttention", "Structure", "describe", "load_model", "parse",
    "restructure", "restructured", "save_model",
]  # fmt: skip

#: Where a module keeps its tensors.
_TENSORS = ("_parameters", "_buffers")


def restructure(module: nn.Module, structure: Structure) -> None:
    """Give a freshly built module the structure of a changed one, in place; new tensors are zero.

    `restructure(fresh, describe(original, changed))` makes `fresh` take `changed`'s state dict, after which both
    compute the same.

    Raises UsageError, with the module as it was, where the structure belongs to another architecture.
    """
    with restructured(module, structure):
        pass


@contextmanager
def restructured(module: nn.Module, structure: Structure) -> Iterator[None]:
    """`restructure` with a check between: in the context new tensors have their shape but no memory (meta device), and
    an error that leaves it undoes everything."""
    root = user_module(module)
    before = [(part, dict(part.__dict__), _registered(part)) for part in root.modules()]
    try:
        fresh = _apply(root, structure)
        yield
        _materialize(root, fresh)
    except BaseException:
        for part, attributes, registered in before:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            for name, entries in registered.items():
                part.__dict__[name].clear()
                part.__dict__[name].update(entries)
        raise


def parse(text: str, where: str) -> Structure:
    """A structure from untrusted JSON. Raises UsageError naming `where` and the key."""
    plain = loads(text, where)
    known = [field.name for field in fields(Structure)]
    if isinstance(plain, dict) and (unknown := [key for key in plain if key not in known]):
        raise UsageError(
            f"has a structure with {unknown[0]!r}, which this version of edgeopt can't rebuild", where=where
        )
    return from_plain(Structure, plain, where)


def _registered(part: nn.Module) -> dict[str, dict[str, object]]:
    """What the module's registries hold, for undoing."""
    return {name: dict(part.__dict__[name]) for name in ("_modules", *_TENSORS)}


def _apply(root: nn.Module, structure: Structure) -> set[int]:
    """Returns the identities of the new tensors, which are on the meta device."""
    fresh: set[int] = set()
    for path in structure.removed:
        _remove(root, path)
    for replacement in structure.replaced:
        layer = _built(replacement)
        fresh.update(id(tensor) for tensor in (*layer.parameters(), *layer.buffers()))
        for path in replacement.paths:
            parent, name = _place(root, path)
            parent._modules[name] = layer
    for attribute in structure.attributes:
        _set_attribute(root, attribute)
    for tensor in structure.tensors:
        fresh.update(_set_tensor(root, tensor))
    return fresh


def _built(replacement: Replacement) -> nn.Module:
    where = f"layer {', '.join(replacement.paths)!r}"
    if not replacement.paths:
        raise UsageError("has a replacement without a place", where="the structure")
    if not replacement.is_sequential and len(replacement.layers) != 1:
        raise UsageError("needs one layer in its place", where=where)
    try:
        layers = [built(spec) for spec in replacement.layers]
    except ValueError as error:
        raise UsageError(str(error), where=where) from error
    return nn.Sequential(*layers).eval() if replacement.is_sequential else layers[0]


def _remove(root: nn.Module, path: str) -> None:
    parent, name = _place(root, path)
    if isinstance(parent, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        del parent._modules[name]
    else:
        parent._modules[name] = None


def _set_attribute(root: nn.Module, edit: AttributeEdit) -> None:
    layer = _layer(root, edit.path)
    before = layer.__dict__.get(edit.name)
    old = described_attribute(before)
    if old is None or not same_kind(old, edit.value):
        raise UsageError(f"has no such attribute {edit.name!r}", where=f"layer {edit.path!r}")
    value: object = edit.value
    if isinstance(edit.value, tuple) and isinstance(before, list):
        value = list(edit.value)
    elif isinstance(edit.value, tuple) and isinstance(before, torch.Size):
        value = torch.Size(edit.value)
    layer.__dict__[edit.name] = value


def _set_tensor(root: nn.Module, edit: TensorEdit) -> list[int]:
    if not edit.names:
        raise UsageError("has a tensor without a name", where="the structure")
    slots = [_slot(root, name) for name in edit.names]
    tensor: Tensor | None = None
    if edit.shape is not None and edit.dtype is not None:
        try:
            tensor = torch.empty(edit.shape, dtype=dtype_of(edit.dtype), device="meta")
        except (RuntimeError, TypeError, OverflowError) as error:
            raise UsageError(f"can't have the shape {edit.shape}", where=f"tensor {edit.names[0]!r}") from error
        if any(slot.is_parameter for slot in slots):
            olds = [slot.tensors[slot.name] for slot in slots]
            learns = tensor.is_floating_point() and any(old is None or old.requires_grad for old in olds)
            tensor = nn.Parameter(tensor, requires_grad=learns)
    for slot in slots:
        slot.tensors[slot.name] = tensor
    return [] if tensor is None else [id(tensor)]


def _materialize(root: nn.Module, fresh: set[int]) -> None:
    made: dict[int, Tensor] = {}
    for part in root.modules():
        for kind in _TENSORS:
            slots: dict[str, Tensor | None] = part.__dict__[kind]
            for name, tensor in slots.items():
                if tensor is None or id(tensor) not in fresh:
                    continue
                if id(tensor) not in made:
                    zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(zeros, tensor.requires_grad) if is_parameter else zeros
                slots[name] = made[id(tensor)]


def _layer(root: nn.Module, path: str) -> nn.Module:
    """By its path through registered layers alone: a file must not reach any other attribute."""
    layer: nn.Module | None = root
    for name in path.split(".") if path else ():
        layer = layer._modules.get(name) if layer is not None else None
    if layer is None:
        raise UsageError("there is no such layer", where=f"layer {path!r}")
    return layer


def _place(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The parent of a layer, and the name that it has there."""
    parent, _, name = path.rpartition(".")
    owner = _layer(root, parent)
    if name not in owner._modules:
        raise UsageError("there is no such layer", where=f"layer {path!r}")
    return owner, name


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a layer keeps a parameter or buffer."""

    tensors: dict[str, Tensor | None]
    name: str
    is_parameter: bool


def _slot(root: nn.Module, path: str) -> _Slot:
    parent, _, name = path.rpartition(".")
    layer = _layer(root, parent)
    for kind in _TENSORS:
        if name in layer.__dict__[kind]:
            return _Slot(layer.__dict__[kind], name, kind == "_parameters")
    raise UsageError("there is no such tensor", where=f"tensor {path!r}")
