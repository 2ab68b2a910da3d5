"""What differs between two networks of one architecture, as plain data: frozen values that survive JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edgeopt.sources.pruned_attention import PrunedMultiheadAttention
from edgeopt.types import WRAPPED_ATTRIBUTE

LayerKind = Literal["Linear", "Conv1d", "Conv2d", "Conv3d", "Identity", "PassThrough", "PrunedMultiheadAttention"]
TensorType = Literal[
    "float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"
]  # fmt: skip
Argument = bool | int | float | str | tuple[int, ...] | None
#: Values of a module's attributes that can be described.
Attribute = bool | int | float | tuple[int, ...]

#: What a removed block may return beside its input; attention blocks return two or three values.
MAX_OUTPUTS = 16


class PassThrough(nn.Module):
    """Stands where a residual block was: gives its first argument back.

    Args:
        length: None returns the bare tensor; n returns a tuple of the tensor and n - 1 others, as blocks do whose
            callers unpack attention weights or caches.
        handed: for each of these others the place of the argument that it is, as blocks do that hand on what the first
            of them made (T5's position bias), or -1 for None; empty where all are None.
    """

    def __init__(self, length: int | None = None, handed: Sequence[int] = ()) -> None:
        super().__init__()
        if length is not None and not 1 <= length <= MAX_OUTPUTS:
            raise ValueError(f"a block returns 1 to {MAX_OUTPUTS} values, not {length}")
        if handed and (length is None or len(handed) != length - 1):
            raise ValueError(f"{len(handed)} values are handed on, and {length or 1} returned")
        self.length = length
        self.handed = tuple(handed)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        value = args[0] if args else next(iter(kwargs.values()))
        if self.length is None:
            return value
        others = self.handed or (-1,) * (self.length - 1)
        return value, *(args[place] if 0 <= place < len(args) else None for place in others)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A layer that can be built anew.

    Attributes:
        kind: class of `torch.nn`, or one of ours.
        arguments: all of its constructor's.
        dtype: of its tensors, None where it has none.
    """

    kind: LayerKind
    arguments: Mapping[str, Argument]
    dtype: TensorType | None = None


@dataclass(frozen=True, slots=True)
class Replacement:
    """Another layer in a layer's place.

    Attributes:
        paths: where it stands; more than one where parents share the layer.
        layers: what stands there.
        is_sequential: they are the numbered children of a `torch.nn.Sequential`; else there is just one.
    """

    paths: tuple[str, ...]
    layers: tuple[LayerSpec, ...]
    is_sequential: bool


@dataclass(frozen=True, slots=True)
class AttributeEdit:
    """A plain attribute of a layer that has another value."""

    path: str
    name: str
    value: Attribute


@dataclass(frozen=True, slots=True)
class TensorEdit:
    """A parameter or buffer of another shape or type, or tied differently.

    Attributes:
        names: all that are this one tensor.
        shape: None where the layer has none any more.
        dtype: None where shape is.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...] | None
    dtype: TensorType | None


@dataclass(frozen=True, slots=True)
class Structure:
    """Edits that turn a fresh network into the shape of a changed one; applied in the order of the attributes.

    Attributes:
        removed: layers that are gone: left out of lists and sequences, None in other layers.
        replaced, attributes, tensors: see their classes. Paths are those of the user's own module.
    """

    removed: tuple[str, ...] = ()
    replaced: tuple[Replacement, ...] = ()
    attributes: tuple[AttributeEdit, ...] = ()
    tensors: tuple[TensorEdit, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.removed or self.replaced or self.attributes or self.tensors)


_CLASSES: dict[LayerKind, type[nn.Module]] = {
    "Linear": nn.Linear,
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
    "Identity": nn.Identity,
    "PassThrough": PassThrough,
    "PrunedMultiheadAttention": PrunedMultiheadAttention,
}
_CONVOLUTION = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "bias",
)  # fmt: skip
_ATTENTION = (
    "query_width", "key_width", "value_width", "output_width", "num_heads", "head_dim", "has_bias", "dropout",
    "batch_first",
)  # fmt: skip
_ARGUMENTS: dict[LayerKind, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features", "bias"),
    "Conv1d": _CONVOLUTION,
    "Conv2d": _CONVOLUTION,
    "Conv3d": _CONVOLUTION,
    "Identity": (),
    "PassThrough": ("length", "handed"),
    "PrunedMultiheadAttention": _ATTENTION,
}


def spec_of(layer: nn.Module) -> LayerSpec | None:
    """None where it is of no kind that can be described."""
    kind = next((kind for kind, class_ in _CLASSES.items() if type(layer) is class_), None)
    if kind is None:
        return None
    dtypes = {dtype_name(tensor.dtype) for tensor in (*layer.parameters(), *layer.buffers())}
    if len(dtypes) > 1 or None in dtypes:
        return None
    if not all(hasattr(layer, name) for name in _ARGUMENTS[kind]):
        return None
    arguments = {name: getattr(layer, name) for name in _ARGUMENTS[kind]}
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"] is not None
    return LayerSpec(kind, arguments, dtypes.pop() if dtypes else None)


def built(spec: LayerSpec) -> nn.Module:
    """The layer, in eval mode and without memory for its tensors (on the meta device).

    Raises ValueError when its arguments fit no such layer.
    """
    if set(spec.arguments) != set(_ARGUMENTS[spec.kind]):
        raise ValueError(f"{spec.kind} takes {', '.join(_ARGUMENTS[spec.kind]) or 'no arguments'}")
    sizes = [value for value in spec.arguments.values() if isinstance(value, int) and not isinstance(value, bool)]
    if spec.kind != "PassThrough" and any(size < 1 for size in sizes):
        raise ValueError(f"{spec.kind} has a size below 1")
    try:
        with torch.device("meta"):
            layer = _CLASSES[spec.kind](**spec.arguments).eval()
        return layer if spec.dtype is None else layer.to(dtype_of(spec.dtype))
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{spec.kind} can't be built ({str(error).partition(chr(10))[0]})") from error


def dtype_name(dtype: torch.dtype) -> TensorType | None:
    """None for types that files don't hold."""
    names: dict[torch.dtype, TensorType] = {
        torch.float16: "float16",
        torch.bfloat16: "bfloat16",
        torch.float32: "float32",
        torch.float64: "float64",
        torch.int8: "int8",
        torch.uint8: "uint8",
        torch.int16: "int16",
        torch.int32: "int32",
        torch.int64: "int64",
        torch.bool: "bool",
    }
    return names.get(dtype)


def dtype_of(name: TensorType) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def user_module(module: nn.Module) -> nn.Module:
    """The user's own module, out of the source's adapter if it is in one."""
    inner = getattr(module, WRAPPED_ATTRIBUTE, module)
    return inner if isinstance(inner, nn.Module) else module
